//! What the agent tells of a container, as the commands print it. It is the guest's word: any numbers
//! and texts there are.

use std::collections::HashMap;

use protocol::agent::{ContainerStatsResponse, ListProcessesResponse};
use serde_json::{Value, json};

/// The most processes, devices and counters of memory that are told.
const PROCESSES: usize = 4096;
const DEVICES: usize = 256;
const COUNTERS: usize = 256;

/// The processes in the guest, as `bulkhead ps` prints them.
pub fn processes(list: &ListProcessesResponse) -> Value {
    let processes = list.processes.iter().take(PROCESSES).map(|process| {
        let words = process.arguments.split(|byte| *byte == 0);
        let words: Vec<_> = words.map(String::from_utf8_lossy).collect();
        let command = match words.join(" ").trim_end() {
            "" => format!("[{}]", String::from_utf8_lossy(&process.name)),
            words => words.to_owned(),
        };
        json!({
            "pid": process.pid,
            "ppid": process.parent_pid,
            "uid": process.uid,
            "started_ns": process.started_at_ns,
            "cpu_us": process.cpu_us,
            "tty": crate::text::printable(&process.terminal, 20),
            "command": crate::text::printable(&command, 4096),
        })
    });
    processes.collect()
}

/// The counters, as `bulkhead events` prints them.
pub fn stats(stats: &ContainerStatsResponse) -> Value {
    let ns = |us: u64| us.saturating_mul(1000);
    let io: Vec<_> = stats
        .io
        .iter()
        .take(DEVICES)
        .flat_map(|device| {
            let entry = |operation: &str, value: u64| {
                json!({
                    "major": device.major, "minor": device.minor, "op": operation, "value": value
                })
            };
            [
                entry("Read", device.read_bytes),
                entry("Write", device.written_bytes),
            ]
        })
        .collect();
    let usage = |usage: u64, limit: u64, failures: u64| json!({"limit": limit, "usage": usage, "failcnt": failures});
    // Names as the kernel gives them: others could be text for a terminal.
    let named = |name: &str| {
        name.bytes()
            .all(|byte| byte == b'_' || byte.is_ascii_alphanumeric())
    };
    let counters = stats.memory_stat.iter().filter(|(name, _)| named(name));
    let memory_stat: HashMap<_, _> = counters.take(COUNTERS).collect();
    json!({
        "cpu": {
            "usage": {
                "total": ns(stats.cpu_usage_us),
                "kernel": ns(stats.cpu_system_us),
                "user": ns(stats.cpu_user_us),
            },
            "throttling": {
                "periods": stats.cpu_periods,
                "throttledPeriods": stats.cpu_throttled_periods,
                "throttledTime": ns(stats.cpu_throttled_us),
            },
        },
        "memory": {
            "cache": stats.memory_stat.get("file").copied().unwrap_or_default(),
            "usage": {
                "limit": stats.memory_max_bytes,
                "usage": stats.memory_current_bytes,
                "max": stats.memory_peak_bytes,
                "failcnt": stats.memory_events.get("max").copied().unwrap_or_default(),
            },
            "swap": usage(stats.swap_current_bytes, stats.swap_max_bytes, 0),
            "raw": memory_stat,
        },
        "pids": {"current": stats.pids_current, "limit": limit(stats.pids_max)},
        "blkio": {"ioServiceBytesRecursive": io},
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": null,
        "oom_kills": stats.oom_kills,
    })
}

/// No limit is 0.
fn limit(value: u64) -> u64 {
    match value {
        u64::MAX => 0,
        value => value,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protobuf::Message;
    use protocol::agent::{DeviceIo, ProcessDetails};

    use super::*;

    #[test]
    fn a_process_that_names_itself_cannot_write_to_the_terminal() {
        let process = ProcessDetails {
            terminal: "\u{1b}[2J".to_owned(),
            arguments: b"sh\0\x1b]0;owned\x07\0".to_vec(),
            ..Default::default()
        };
        let list = ListProcessesResponse {
            processes: vec![process],
            ..Default::default()
        };
        let told = processes(&list);
        for field in ["tty", "command"] {
            let text = told[0][field].as_str().expect("text");
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
    }

    #[test]
    fn more_than_a_guest_can_have_is_not_told() {
        let list = ListProcessesResponse {
            processes: vec![ProcessDetails::default(); PROCESSES + 1],
            ..Default::default()
        };
        assert_eq!(processes(&list).as_array().map(Vec::len), Some(PROCESSES));
        let name = |number| format!("counter_{number}");
        let counters = ContainerStatsResponse {
            io: vec![DeviceIo::default(); DEVICES + 1],
            memory_stat: (0..=COUNTERS).map(|number| (name(number), 1)).collect(),
            ..Default::default()
        };
        let told = stats(&counters);
        let io = told["blkio"]["ioServiceBytesRecursive"].as_array();
        assert_eq!(io.map(Vec::len), Some(2 * DEVICES));
        let raw = told["memory"]["raw"].as_object();
        assert_eq!(raw.map(serde_json::Map::len), Some(COUNTERS));
    }

    #[test]
    fn a_counter_whose_name_is_text_for_a_terminal_is_not_told() {
        let names = ["anon", "\u{9b}2J", "a b"];
        let counters = ContainerStatsResponse {
            memory_stat: names.map(|name| (name.to_owned(), 1)).into(),
            ..Default::default()
        };
        assert_eq!(stats(&counters)["memory"]["raw"], json!({"anon": 1}));
    }

    proptest! {
        #[test]
        fn whatever_the_agent_answers_can_be_told(bytes: Vec<u8>) {
            if let Ok(list) = ListProcessesResponse::parse_from_bytes(&bytes) {
                let told = list.processes.len().min(PROCESSES);
                prop_assert_eq!(processes(&list).as_array().map(Vec::len), Some(told));
            }
            if let Ok(counters) = ContainerStatsResponse::parse_from_bytes(&bytes) {
                prop_assert!(stats(&counters)["pids"].is_object());
            }
        }
    }
}
