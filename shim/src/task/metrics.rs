//! A container's counters in the form that containerd's clients read.

use protobuf::{Message, MessageField, well_known_types::any::Any};
use protocol::agent::ContainerStatsResponse;

use super::proto::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};

/// The form's name, by which clients tell it from that of cgroup v1.
const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// The most devices that are told of.
const DEVICES: usize = 256;

/// What the guest counted. Its numbers are its own claim.
///
/// # Panics
/// Never: a message of plain fields can always be written.
pub fn metrics(stats: &ContainerStatsResponse) -> Any {
    let memory = |name: &str| stats.memory_stat.get(name).copied().unwrap_or(0);
    let event = |name: &str| stats.memory_events.get(name).copied().unwrap_or(0);
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: limit(stats.pids_max),
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_periods,
            nr_throttled: stats.cpu_throttled_periods,
            throttled_usec: stats.cpu_throttled_us,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: memory("anon"),
            file: memory("file"),
            kernel_stack: memory("kernel_stack"),
            slab: memory("slab"),
            sock: memory("sock"),
            shmem: memory("shmem"),
            file_mapped: memory("file_mapped"),
            file_dirty: memory("file_dirty"),
            file_writeback: memory("file_writeback"),
            anon_thp: memory("anon_thp"),
            inactive_anon: memory("inactive_anon"),
            active_anon: memory("active_anon"),
            inactive_file: memory("inactive_file"),
            active_file: memory("active_file"),
            unevictable: memory("unevictable"),
            slab_reclaimable: memory("slab_reclaimable"),
            slab_unreclaimable: memory("slab_unreclaimable"),
            pgfault: memory("pgfault"),
            pgmajfault: memory("pgmajfault"),
            usage: stats.memory_current_bytes,
            usage_limit: stats.memory_max_bytes,
            swap_usage: stats.swap_current_bytes,
            swap_limit: stats.swap_max_bytes,
            max_usage: stats.memory_peak_bytes,
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            ..Default::default()
        }),
        io: MessageField::some(IOStat {
            usage: stats.io.iter().take(DEVICES).map(io).collect(),
            ..Default::default()
        }),
        ..Default::default()
    };
    Any {
        type_url: TYPE.to_owned(),
        value: metrics
            .write_to_bytes()
            .expect("a message of plain fields can be written"),
        ..Default::default()
    }
}

fn io(device: &protocol::agent::DeviceIo) -> IOEntry {
    IOEntry {
        major: device.major.into(),
        minor: device.minor.into(),
        rbytes: device.read_bytes,
        wbytes: device.written_bytes,
        rios: device.reads,
        wios: device.writes,
        ..Default::default()
    }
}

/// No limit is 0 there.
fn limit(max: u64) -> u64 {
    if max == u64::MAX { 0 } else { max }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_counters_have_their_names_of_cgroup_v2() {
        let mut stats = ContainerStatsResponse {
            memory_current_bytes: 4096,
            memory_max_bytes: u64::MAX,
            cpu_usage_us: 12,
            pids_current: 3,
            pids_max: u64::MAX,
            ..Default::default()
        };
        stats.memory_stat.insert("anon".to_owned(), 77);
        stats.memory_events.insert("oom_kill".to_owned(), 2);
        let any = metrics(&stats);
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&any.value).expect("a Metrics");
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 0));
        assert_eq!(metrics.cpu.usage_usec, 12);
        assert_eq!(metrics.memory.usage, 4096);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(metrics.memory.anon, 77);
        assert_eq!(metrics.memory_events.oom_kill, 2);
    }
}
