//! What the kernel computes from its memory at boot as for a host with many users: in a small guest
//! it would be less than the containers of any host are used to.

use std::{fs, io};

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use crate::log;

/// What all connections may use at most, as a multiple of where the kernel begins to be sparing.
/// It begins so at a sixteenth of the memory.
const TCP_MOST: u64 = 4;

/// How many times more threads than the kernel computes, whose stacks are then an eighth of the
/// memory: what is left of it is enough for the agent to end them.
const THREADS: u64 = 4;

/// Parameters and their values, which are those that hosts have by their first process. Memory, and
/// a container's limits, are what there is less of.
const COUNTS: [(&str, &str); 3] = [
    ("/proc/sys/fs/nr_open", "1073741816"),
    ("/proc/sys/fs/file-max", "9223372036854775807"),
    ("/proc/sys/kernel/pid_max", "4194304"),
];

/// All threads.
const THREADS_MAX: &str = "/proc/sys/kernel/threads-max";

/// All connections' memory in pages: where it is plenty, where it is scarce, and the most.
const TCP: &str = "/proc/sys/net/ipv4/tcp_mem";

/// Sets them. One that cannot be set stays as it is, and the log tells of it.
pub(crate) fn set() {
    for (path, value) in COUNTS {
        told(path, fs::write(path, value));
    }
    told(THREADS_MAX, change(THREADS_MAX, threads));
    told(TCP, change(TCP, tcp));
    // Half of the first threads-max, which who starts containers on a host has lifted.
    let processes = setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY);
    told("RLIMIT_NPROC", processes.map_err(io::Error::from));
}

fn change(path: &str, to: impl FnOnce(&str) -> Option<String>) -> io::Result<()> {
    let given = fs::read_to_string(path)?;
    let wanted = to(&given).ok_or(io::ErrorKind::InvalidData)?;
    fs::write(path, wanted)
}

fn threads(given: &str) -> Option<String> {
    let computed: u64 = given.trim().parse().ok()?;
    Some(computed.checked_mul(THREADS)?.to_string())
}

/// The three numbers with another last one, which is not less than it was.
fn tcp(given: &str) -> Option<String> {
    let numbers = given.split_whitespace().map(str::parse);
    let numbers: Vec<u64> = numbers.collect::<Result<_, _>>().ok()?;
    let [plenty, scarce, most] = numbers[..] else {
        return None;
    };
    let most = scarce.checked_mul(TCP_MOST)?.max(most);
    Some(format!("{plenty} {scarce} {most}"))
}

fn told(what: &str, set: io::Result<()>) {
    if let Err(error) = set {
        log!("cannot set {what}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_has_a_quarter_of_the_memory_and_is_sparing_from_a_sixteenth_on() {
        // 256 MiB.
        assert_eq!(tcp("3072\t4096\t6144\n").unwrap(), "3072 4096 16384");
    }

    #[test]
    fn threads_are_more_than_the_kernel_computes() {
        assert_eq!(threads("1862\n").unwrap(), "7448");
        assert_eq!(threads(""), None);
        assert_eq!(threads("18446744073709551615"), None);
    }

    #[test]
    fn more_than_that_stays_and_other_text_is_none() {
        assert_eq!(tcp("1 2 90").unwrap(), "1 2 90");
        for text in ["", "1 2", "1 2 3 4", "1 x 3", "1 18446744073709551615 3"] {
            assert_eq!(tcp(text), None, "{text:?}");
        }
    }
}
