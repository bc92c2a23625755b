//! Messages become the agent's types, and its types messages.

use protocol::{
    Disk, StreamId,
    agent::{self as message, event, root_filesystem},
};

use super::Error;
use crate::{
    cgroup::{self, Pressure, Stall, Stats},
    container::{Layer, Layers, LifeState, Source, State, StreamIds, Upper},
    disks::{self, HostDevice},
    events::{Event, What},
    guest,
    processes::Details,
};

pub(super) fn streams(streams: Option<&message::Streams>) -> StreamIds {
    let id = |number: u64| StreamId::from_bytes(number.to_le_bytes());
    streams.map_or_else(StreamIds::default, |streams| StreamIds {
        stdin: id(streams.stdin),
        stdout: id(streams.stdout),
        stderr: id(streams.stderr),
    })
}

pub(super) fn source(root: Option<message::RootFilesystem>) -> Result<Source, Error> {
    match root.and_then(|root| root.source) {
        Some(root_filesystem::Source::Path(path)) => Ok(Source::Directory(path)),
        Some(root_filesystem::Source::Block(block)) if block.overlay => {
            Ok(Source::Layers(Layers {
                lower: vec![Layer::Block {
                    device: block.device,
                    filesystem: block.filesystem,
                }],
                upper: Upper::Memory { bytes: None },
            }))
        }
        Some(root_filesystem::Source::Block(block)) => Ok(Source::Block {
            device: block.device,
            filesystem: block.filesystem,
            options: block.options,
        }),
        Some(root_filesystem::Source::Layers(root)) => Ok(Source::Layers(layers(root))),
        Some(_) | None => Err(Error::NoRoot),
    }
}

pub(super) fn devices(devices: &[message::HostDevice]) -> Result<Vec<HostDevice>, Error> {
    let device = |device: &message::HostDevice| {
        let slot = u8::try_from(device.slot).ok().and_then(Disk::in_slot);
        Ok(HostDevice {
            major: device.major.into(),
            minor: device.minor.into(),
            disk: slot.ok_or(disks::Error::Slot(device.slot))?,
        })
    };
    devices.iter().map(device).collect()
}

fn layers(root: message::LayeredRoot) -> Layers {
    let layer = |layer: message::Layer| {
        if layer.filesystem.is_empty() {
            Layer::Directory(layer.source)
        } else {
            Layer::Block {
                device: layer.source,
                filesystem: layer.filesystem,
            }
        }
    };
    Layers {
        lower: root.layers.into_iter().map(layer).collect(),
        upper: if root.upper_device.is_empty() {
            Upper::Memory {
                bytes: (root.upper_bytes != 0).then_some(root.upper_bytes),
            }
        } else {
            Upper::Block {
                device: root.upper_device,
                filesystem: root.upper_filesystem,
            }
        },
    }
}

pub(super) fn shared_directories(
    shared: Vec<message::SharedDirectory>,
) -> Vec<guest::SharedDirectory> {
    shared
        .into_iter()
        .map(|shared| guest::SharedDirectory {
            tag: shared.tag,
            mount_point: shared.mount_point,
            read_only: shared.read_only,
        })
        .collect()
}

pub(super) fn state(state: State) -> message::ProcessStateResponse {
    let life = match state.life {
        LifeState::Created => message::LifeState::LIFE_STATE_CREATED,
        LifeState::Running => message::LifeState::LIFE_STATE_RUNNING,
        LifeState::Paused => message::LifeState::LIFE_STATE_PAUSED,
        LifeState::Stopped => message::LifeState::LIFE_STATE_STOPPED,
    };
    message::ProcessStateResponse {
        state: life.into(),
        pid: state.pid,
        exit_status: state.exit.map_or(0, |exit| exit.status),
        exited_at_ns: state.exit.map_or(0, |exit| exit.at_ns),
        oom_killed: state.oom_killed,
        ..Default::default()
    }
}

pub(super) fn event(event: Event) -> message::Event {
    let what = match event.what {
        What::OutOfMemory(kills) => event::What::OutOfMemory(message::OutOfMemory {
            kills,
            ..Default::default()
        }),
    };
    message::Event {
        number: event.number,
        at_ns: event.at_ns,
        container_id: event.container.to_string(),
        what: Some(what),
        ..Default::default()
    }
}

pub(super) fn details(details: Details) -> message::ProcessDetails {
    message::ProcessDetails {
        pid: details.pid,
        container_pid: details.container_pid,
        parent_pid: details.parent_pid,
        uid: details.uid,
        gid: details.gid,
        started_at_ns: details.started_at_ns,
        cpu_us: details.cpu_us,
        state: details.state.into(),
        terminal: details.terminal,
        resident_kib: details.resident_kib,
        virtual_kib: details.virtual_kib,
        threads: details.threads,
        nice: details.nice,
        name: details.name,
        arguments: details.arguments,
        ..Default::default()
    }
}

pub(super) fn stats(stats: Stats) -> message::ContainerStatsResponse {
    let Stats {
        memory,
        cpu,
        pids,
        io,
        io_pressure,
        huge_pages,
    } = stats;
    let sum = |of: fn(&cgroup::DeviceIo) -> u64| io.iter().map(of).fold(0, u64::saturating_add);
    message::ContainerStatsResponse {
        memory_current_bytes: memory.current,
        memory_peak_bytes: memory.peak,
        memory_max_bytes: memory.max,
        cpu_usage_us: cpu.usage,
        cpu_user_us: cpu.user,
        cpu_system_us: cpu.system,
        cpu_throttled_us: cpu.throttled,
        pids_current: pids.current,
        io_read_bytes: sum(|io| io.read_bytes),
        io_written_bytes: sum(|io| io.written_bytes),
        oom_kills: memory.events.get("oom_kill").copied().unwrap_or(0),
        pids_max: pids.max,
        cpu_periods: cpu.periods,
        cpu_throttled_periods: cpu.throttled_periods,
        memory_stat: memory.stat.into_iter().collect(),
        swap_current_bytes: memory.swap_current,
        swap_max_bytes: memory.swap_max,
        memory_events: memory.events.into_iter().collect(),
        cpu_pressure: pressure(cpu.pressure).into(),
        memory_pressure: pressure(memory.pressure).into(),
        io_pressure: pressure(io_pressure).into(),
        io: io.into_iter().map(device_io).collect(),
        huge_pages: huge_pages.into_iter().map(pages).collect(),
        ..Default::default()
    }
}

fn pressure(pressure: Pressure) -> Option<message::Pressure> {
    let stall = |stall: Stall| {
        let [average_10, average_60, average_300] = stall.averages;
        Some(message::Stall {
            average_10,
            average_60,
            average_300,
            total_us: stall.total,
            ..Default::default()
        })
    };
    Some(message::Pressure {
        some: stall(pressure.some).into(),
        full: stall(pressure.full).into(),
        ..Default::default()
    })
}

fn device_io(io: cgroup::DeviceIo) -> message::DeviceIo {
    message::DeviceIo {
        major: io.major,
        minor: io.minor,
        read_bytes: io.read_bytes,
        written_bytes: io.written_bytes,
        reads: io.reads,
        writes: io.writes,
        ..Default::default()
    }
}

fn pages(pages: cgroup::HugePages) -> message::HugePages {
    message::HugePages {
        page_size: pages.page_size,
        current_bytes: pages.current,
        max_bytes: pages.max,
        limit_met: pages.limit_met,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use ttrpc::proto::Codec as _;

    use super::*;
    use crate::{container::MOST_LISTED, processes};

    #[test]
    fn the_longest_list_of_processes_is_an_answer_that_the_host_takes() {
        let longest = Details {
            pid: 4 << 20,
            container_pid: 4 << 20,
            parent_pid: 4 << 20,
            uid: u32::MAX,
            gid: u32::MAX,
            started_at_ns: u64::MAX,
            cpu_us: u64::MAX,
            state: 'S',
            terminal: "pts/1048575".to_owned(),
            resident_kib: u64::MAX,
            virtual_kib: u64::MAX,
            threads: 4 << 20,
            nice: -20,
            name: vec![b'x'],
            arguments: vec![0; processes::MOST_TEXT / processes::MOST - 1],
        };
        let answer = message::ListProcessesResponse {
            pids: vec![4 << 20; MOST_LISTED],
            processes: vec![details(longest); processes::MOST],
            ..Default::default()
        };
        // The status of the call is in the frame, too.
        let length = answer.size() as usize + 64;
        assert!(length <= protocol::ANSWER_MAX, "{length} bytes");
    }
}
