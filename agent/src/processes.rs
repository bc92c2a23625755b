//! What /proc tells of a process: the columns of ps. The texts are whatever
//! the process made of them, so they are bounded and stay bytes.

use std::{fs::File, io::Read as _};

use crate::{guest, sys};

/// What is known of a process.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Details {
    /// Its id in the guest.
    pub pid: u32,
    /// Its id as its container sees it.
    pub container_pid: u32,
    /// Its parent's id in the guest.
    pub parent_pid: u32,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
    /// When it started, in nanoseconds since the epoch.
    pub started_at_ns: u64,
    /// CPU time, in microseconds.
    pub cpu_us: u64,
    /// The letter of its state.
    pub state: char,
    /// Its terminal, empty where it has none.
    pub terminal: String,
    /// Memory resident, in KiB.
    pub resident_kib: u64,
    /// Memory mapped, in KiB.
    pub virtual_kib: u64,
    /// Its threads.
    pub threads: u32,
    /// Its nice value.
    pub nice: i32,
    /// Its name.
    pub name: Vec<u8>,
    /// Its arguments, each ended by a zero byte.
    pub arguments: Vec<u8>,
}

/// The most bytes of a name and of arguments.
const MAX_NAME: usize = 64;
const MAX_ARGUMENTS: u64 = 4096;

/// The most processes told, and the most bytes of all their texts: what one answer holds
/// ([`protocol::ANSWER_MAX`]).
pub(crate) const MOST: usize = 4096;
pub(crate) const MOST_TEXT: usize = 384 << 10;

/// /proc counts time in hundredths of a second, whatever the kernel's own clock.
const TICK_NS: u64 = 10_000_000;

/// What is known of the processes `pids`. One that has ended is left out.
pub fn details(pids: &[u32]) -> Vec<Details> {
    let boot_ns = guest::now_ns().saturating_sub(sys::boottime_ns());
    let mut text = 0;
    pids.iter()
        .filter_map(|pid| read(*pid, boot_ns))
        .take(MOST)
        .take_while(|details| {
            text += details.name.len() + details.arguments.len();
            text <= MOST_TEXT
        })
        .collect()
}

fn read(pid: u32, boot_ns: u64) -> Option<Details> {
    let file = |name: &str, most: u64| {
        let mut bytes = Vec::new();
        let file = File::open(format!("/proc/{pid}/{name}")).ok()?;
        file.take(most).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    let mut details = parse_stat(&file("stat", 4096)?, boot_ns)?;
    details.pid = pid;
    let status = file("status", 16 << 10)?;
    let status = String::from_utf8_lossy(&status);
    details.uid = status_field(&status, "Uid:", Some(1))?;
    details.gid = status_field(&status, "Gid:", Some(1))?;
    details.container_pid = status_field(&status, "NSpid:", None).unwrap_or(pid);
    // Of a process that is ending, or the kernel's, there are none.
    details.arguments = file("cmdline", MAX_ARGUMENTS).unwrap_or_default();
    Some(details)
}

/// Reads /proc/PID/stat. The name in parentheses may hold anything, parentheses too.
fn parse_stat(stat: &[u8], boot_ns: u64) -> Option<Details> {
    let open = stat.iter().position(|byte| *byte == b'(')?;
    let close = stat.iter().rposition(|byte| *byte == b')')?;
    let name = stat.get(open + 1..close)?;
    let rest = std::str::from_utf8(stat.get(close + 1..)?).ok()?;
    // The first of them is the third of the file.
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).copied();
    let number = |at: usize| field(at)?.parse::<u64>().ok();
    let ticks = number(14)?.saturating_add(number(15)?);
    Some(Details {
        state: field(3)?.chars().next()?,
        parent_pid: field(4)?.parse().ok()?,
        terminal: terminal(field(7)?.parse::<i32>().ok()? as u32),
        cpu_us: ticks.saturating_mul(TICK_NS / 1000),
        nice: field(19)?.parse().ok()?,
        threads: field(20)?.parse().ok()?,
        started_at_ns: boot_ns.saturating_add(number(22)?.saturating_mul(TICK_NS)),
        virtual_kib: number(23)? / 1024,
        resident_kib: number(24)?.saturating_mul(4),
        name: name[..name.len().min(MAX_NAME)].to_vec(),
        ..Details::default()
    })
}

/// The word number `at` behind `name` in /proc/PID/status; the last one where that is none.
fn status_field(status: &str, name: &str, at: Option<usize>) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let mut words = line.split_whitespace();
    match at {
        Some(at) => words.nth(at),
        None => words.last(),
    }?
    .parse()
    .ok()
}

/// A terminal's name by its number as stat has it.
fn terminal(number: u32) -> String {
    let major = number >> 8 & 0xfff;
    let minor = number & 0xff | number >> 12 & 0xfff00;
    match major {
        0 => String::new(),
        4 => format!("tty{minor}"),
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        _ => format!("{major}:{minor}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn this_process_is_known() {
        let pid = std::process::id();
        let found = details(&[pid, u32::MAX]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pid, pid);
        assert_eq!(found[0].uid, nix::unistd::geteuid().as_raw());
        assert!(found[0].arguments.ends_with(b"\0"));
        assert!(found[0].started_at_ns > 1_000_000_000_000_000_000);
        assert!(found[0].started_at_ns <= guest::now_ns());
        assert!(found[0].resident_kib > 0 && found[0].threads > 0);
    }

    #[test]
    fn a_name_may_hold_parentheses() {
        let stat = b"7 (a) b (c) S 1 7 7 34817 7 0 0 0 0 0 100 50 0 0 20 5 2 0 300 8192000 10 0";
        let details = parse_stat(stat, 1_000_000_000).unwrap();
        assert_eq!(details.name, b"a) b (c");
        assert_eq!((details.state, details.parent_pid), ('S', 1));
        assert_eq!(details.terminal, "pts/1");
        assert_eq!(details.cpu_us, 1_500_000);
        assert_eq!((details.nice, details.threads), (5, 2));
        assert_eq!(details.started_at_ns, 4_000_000_000);
        assert_eq!((details.virtual_kib, details.resident_kib), (8000, 40));
    }

    #[test]
    fn the_innermost_namespace_has_the_containers_id() {
        let status = "Uid:\t0\t1000\t0\t0\nNSpid:\t300\t7\t1\n";
        assert_eq!(status_field(status, "NSpid:", None), Some(1));
        assert_eq!(status_field(status, "Uid:", Some(1)), Some(1000));
    }

    proptest! {
        #[test]
        fn any_stat_is_read_or_not(stat in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_stat(&stat, 1);
        }

        #[test]
        fn any_numbers_are_read_or_not(stat in "7 \\(x\\) S( [0-9-]{1,21}){18,30}") {
            let _ = parse_stat(stat.as_bytes(), u64::MAX);
        }

        #[test]
        fn any_terminal_has_a_name(number in any::<u32>()) {
            let _ = terminal(number);
        }
    }
}
