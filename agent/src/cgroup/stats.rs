//! Reading a cgroup's files.

use std::{fs, path::Path};

/// A container's counters.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Memory in use, in bytes.
    pub memory_current_bytes: u64,
    /// The most that was in use.
    pub memory_peak_bytes: u64,
    /// The limit; the largest number where there is none.
    pub memory_max_bytes: u64,
    /// CPU time in microseconds.
    pub cpu_usage_us: u64,
    /// CPU time in user mode.
    pub cpu_user_us: u64,
    /// CPU time in the kernel.
    pub cpu_system_us: u64,
    /// Time throttled.
    pub cpu_throttled_us: u64,
    /// Processes and threads.
    pub pids_current: u64,
    /// Bytes read from block devices.
    pub io_read_bytes: u64,
    /// Bytes written to block devices.
    pub io_written_bytes: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
}

impl Stats {
    /// Reads the files of the cgroup at `path`; those that are absent count as 0.
    pub(super) fn read(path: &Path) -> Self {
        let cpu = |name| field(path, "cpu.stat", name).unwrap_or(0);
        let io = fs::read_to_string(path.join("io.stat")).unwrap_or_default();
        Self {
            memory_current_bytes: number(path, "memory.current").unwrap_or(0),
            memory_peak_bytes: number(path, "memory.peak").unwrap_or(0),
            memory_max_bytes: number(path, "memory.max").unwrap_or(u64::MAX),
            cpu_usage_us: cpu("usage_usec"),
            cpu_user_us: cpu("user_usec"),
            cpu_system_us: cpu("system_usec"),
            cpu_throttled_us: cpu("throttled_usec"),
            pids_current: number(path, "pids.current").unwrap_or(0),
            io_read_bytes: io_sum(&io, "rbytes"),
            io_written_bytes: io_sum(&io, "wbytes"),
            oom_kills: field(path, "memory.events", "oom_kill").unwrap_or(0),
        }
    }
}

/// The single number of a file; the largest for `max`.
fn number(path: &Path, file: &str) -> Option<u64> {
    let text = fs::read_to_string(path.join(file)).ok()?;
    match text.trim() {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}

/// The number behind `name` in a file of `name number` lines.
pub(super) fn field(path: &Path, file: &str, name: &str) -> Option<u64> {
    field_text(path, file, name)?.parse().ok()
}

/// The text behind `name` in a file of `name text` lines.
pub(super) fn field_text(path: &Path, file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path.join(file)).ok()?;
    lookup(&text, name).map(str::to_owned)
}

fn lookup<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

/// The sum of `name=` over all devices of an io.stat.
fn io_sum(text: &str, name: &str) -> u64 {
    text.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .filter(|(key, _)| *key == name)
        .filter_map(|(_, value)| value.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "populated 1\nfrozen 0\n";
        assert_eq!(lookup(text, "frozen"), Some("0"));
        assert_eq!(lookup(text, "froze"), None);
    }

    #[test]
    fn io_is_summed_over_devices() {
        let text = "254:0 rbytes=100 wbytes=1 rios=2\n254:16 rbytes=23 wbytes=0\n";
        assert_eq!(io_sum(text, "rbytes"), 123);
        assert_eq!(io_sum("garbage = x=y rbytes=-1", "rbytes"), 0);
    }
}
