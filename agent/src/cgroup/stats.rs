//! Reading a cgroup's files. Their lines are the kernel's, but their number may
//! be as many as there are devices: all lists are bounded.

use std::{collections::BTreeMap, fs, path::Path};

/// A container's counters; what the kernel does not tell is 0.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Stats {
    /// Memory.
    pub memory: Memory,
    /// CPU time.
    pub cpu: Cpu,
    /// Processes and threads.
    pub pids: Pids,
    /// I/O of each block device.
    pub io: Vec<DeviceIo>,
    /// Time lost in waiting for I/O.
    pub io_pressure: Pressure,
    /// Huge pages of each size.
    pub huge_pages: Vec<HugePages>,
}

/// Memory, in bytes; limits are the largest number where there is none.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Memory {
    /// In use.
    pub current: u64,
    /// The most that was in use.
    pub peak: u64,
    /// The limit.
    pub max: u64,
    /// Swap in use.
    pub swap_current: u64,
    /// The limit of swap.
    pub swap_max: u64,
    /// memory.stat.
    pub stat: BTreeMap<String, u64>,
    /// memory.events.
    pub events: BTreeMap<String, u64>,
    /// Time lost for want of memory.
    pub pressure: Pressure,
}

/// CPU time, in microseconds.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Cpu {
    /// All of it.
    pub usage: u64,
    /// In user mode.
    pub user: u64,
    /// In the kernel.
    pub system: u64,
    /// Periods of the limit.
    pub periods: u64,
    /// Periods in which the limit throttled.
    pub throttled_periods: u64,
    /// Time throttled.
    pub throttled: u64,
    /// Time lost for want of CPUs.
    pub pressure: Pressure,
}

/// Processes and threads.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Pids {
    /// How many there are.
    pub current: u64,
    /// How many there may be.
    pub max: u64,
}

/// I/O of a block device.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct DeviceIo {
    /// The device's major number.
    pub major: u32,
    /// The device's minor number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Huge pages of one size, in bytes.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct HugePages {
    /// The size, such as `2MB`.
    pub page_size: String,
    /// In use.
    pub current: u64,
    /// The limit.
    pub max: u64,
    /// How often the limit was met.
    pub limit_met: u64,
}

/// Time lost: by some processes, by all at once.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Pressure {
    /// By some.
    pub some: Stall,
    /// By all.
    pub full: Stall,
}

/// A line of a pressure file.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Stall {
    /// Percent of the last 10, 60 and 300 seconds.
    pub averages: [f64; 3],
    /// Microseconds.
    pub total: u64,
}

/// The most lines that are taken of a file.
const MOST_LINES: usize = 256;

/// The most sizes of huge pages.
const MOST_SIZES: usize = 16;

impl Stats {
    /// Reads the files of the cgroup at `path`.
    pub(super) fn read(path: &Path) -> Self {
        let text = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
        let number = |file: &str| number(&text(file)).unwrap_or(0);
        let limit = |file: &str| self::number(&text(file)).unwrap_or(u64::MAX);
        let cpu = numbers(&text("cpu.stat"));
        let cpu_field = |name: &str| cpu.get(name).copied().unwrap_or(0);
        Self {
            memory: Memory {
                current: number("memory.current"),
                peak: number("memory.peak"),
                max: limit("memory.max"),
                swap_current: number("memory.swap.current"),
                swap_max: limit("memory.swap.max"),
                stat: numbers(&text("memory.stat")),
                events: numbers(&text("memory.events")),
                pressure: pressure(&text("memory.pressure")),
            },
            cpu: Cpu {
                usage: cpu_field("usage_usec"),
                user: cpu_field("user_usec"),
                system: cpu_field("system_usec"),
                periods: cpu_field("nr_periods"),
                throttled_periods: cpu_field("nr_throttled"),
                throttled: cpu_field("throttled_usec"),
                pressure: pressure(&text("cpu.pressure")),
            },
            pids: Pids {
                current: number("pids.current"),
                max: limit("pids.max"),
            },
            io: device_io(&text("io.stat")),
            io_pressure: pressure(&text("io.pressure")),
            huge_pages: page_sizes(path)
                .into_iter()
                .map(|size| HugePages {
                    current: number(&format!("hugetlb.{size}.current")),
                    max: limit(&format!("hugetlb.{size}.max")),
                    limit_met: numbers(&text(&format!("hugetlb.{size}.events")))
                        .get("max")
                        .copied()
                        .unwrap_or(0),
                    page_size: size,
                })
                .collect(),
        }
    }
}

/// The sizes that the cgroup at `path` has files for.
fn page_sizes(path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    let mut sizes: Vec<_> = entries
        .flatten()
        .filter_map(|entry| page_size(entry.file_name().to_str()?).map(str::to_owned))
        .take(MOST_SIZES)
        .collect();
    sizes.sort();
    sizes
}

/// The size in the name of a file such as `hugetlb.2MB.max`.
fn page_size(file: &str) -> Option<&str> {
    file.strip_prefix("hugetlb.")?
        .strip_suffix(".max")
        .filter(|size| !size.contains('.'))
}

/// The single number of a file; the largest for `max`.
fn number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}

/// A file of `name number` lines.
fn numbers(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .take(MOST_LINES)
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, number)| Some((name.to_owned(), number.parse().ok()?)))
        .collect()
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

/// An io.stat: `major:minor` and `key=number` pairs in each line.
fn device_io(text: &str) -> Vec<DeviceIo> {
    text.lines()
        .take(MOST_LINES)
        .filter_map(|line| {
            let (device, counters) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let counter = |name: &str| {
                counters
                    .split_whitespace()
                    .filter_map(|word| word.split_once('='))
                    .find(|(key, _)| *key == name)
                    .and_then(|(_, number)| number.parse().ok())
                    .unwrap_or(0)
            };
            Some(DeviceIo {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                read_bytes: counter("rbytes"),
                written_bytes: counter("wbytes"),
                reads: counter("rios"),
                writes: counter("wios"),
            })
        })
        .collect()
}

/// A pressure file: a line for some, a line for full.
fn pressure(text: &str) -> Pressure {
    let stall = |name: &str| lookup(text, name).map(stall).unwrap_or_default();
    Pressure {
        some: stall("some"),
        full: stall("full"),
    }
}

/// `avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
fn stall(text: &str) -> Stall {
    let value = |name: &str| {
        text.split_whitespace()
            .filter_map(|word| word.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    };
    let average = |name| {
        value(name)
            .and_then(|text| text.parse::<f64>().ok())
            .filter(|share| share.is_finite())
            .unwrap_or(0.0)
    };
    Stall {
        averages: ["avg10", "avg60", "avg300"].map(average),
        total: value("total")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "populated 1\nfrozen 0\n";
        assert_eq!(lookup(text, "frozen"), Some("0"));
        assert_eq!(lookup(text, "froze"), None);
    }

    #[test]
    fn io_is_told_for_each_device() {
        let text = "254:0 rbytes=100 wbytes=1 rios=2 wios=3 dbytes=0\n254:16 rbytes=23\n";
        let io = device_io(text);
        assert_eq!(
            io[0],
            DeviceIo {
                major: 254,
                minor: 0,
                read_bytes: 100,
                written_bytes: 1,
                reads: 2,
                writes: 3
            }
        );
        assert_eq!((io[1].minor, io[1].read_bytes), (16, 23));
        assert_eq!(device_io("garbage = x=y rbytes=-1"), []);
    }

    #[test]
    fn pressure_is_read_for_some_and_full() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=5\n";
        let read = pressure(text);
        assert_eq!(read.some.averages, [1.5, 0.25, 0.0]);
        assert_eq!((read.some.total, read.full.total), (77, 5));
    }

    #[test]
    fn a_page_size_is_taken_from_its_files_name() {
        assert_eq!(page_size("hugetlb.2MB.max"), Some("2MB"));
        assert_eq!(page_size("hugetlb.2MB.rsvd.max"), None);
        assert_eq!(page_size("memory.max"), None);
    }

    #[test]
    fn a_missing_limit_is_the_largest_number() {
        assert_eq!(number("max\n"), Some(u64::MAX));
        assert_eq!(number("17\n"), Some(17));
        assert_eq!(number("-1"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_within_bounds(text in "([a-z0-9:=. ]{0,20}\n){0,300}") {
            prop_assert!(numbers(&text).len() <= MOST_LINES);
            prop_assert!(device_io(&text).len() <= MOST_LINES);
            let Pressure { some, full } = pressure(&text);
            prop_assert!(some.averages.iter().chain(&full.averages).all(|share| share.is_finite()));
        }
    }
}
