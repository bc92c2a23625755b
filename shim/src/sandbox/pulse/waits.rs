//! How long a machine waits for processors of the host: time in which its guest can do nothing. A pod
//! with a small share of a busy host, or with more processors than the host has, waits much.

use std::{collections::HashMap, fs, path::PathBuf, time::Duration};

/// The threads of a process, as the kernel's scheduler counts their waits.
#[derive(Debug)]
pub(super) struct Waits {
    tasks: PathBuf,
    /// What each had waited, in nanoseconds.
    before: HashMap<u32, u64>,
}

impl Waits {
    /// Those of the process `pid`, from now on.
    pub(super) fn of(pid: u32) -> Self {
        let mut waits = Self {
            tasks: PathBuf::from(format!("/proc/{pid}/task")),
            before: HashMap::new(),
        };
        waits.before = waits.now();
        waits
    }

    /// How long the thread that waited longest has waited since this was asked last. Nothing, where
    /// the kernel does not count it.
    pub(super) fn since_last(&mut self) -> Duration {
        let now = self.now();
        let before = std::mem::replace(&mut self.before, now);
        let grown = self.before.iter().map(|(thread, waited)| {
            let before = before.get(thread).copied().unwrap_or_default();
            waited.saturating_sub(before)
        });
        Duration::from_nanos(grown.max().unwrap_or_default())
    }

    fn now(&self) -> HashMap<u32, u64> {
        let threads = fs::read_dir(&self.tasks).into_iter().flatten().flatten();
        let counted = threads.filter_map(|thread| {
            let number = thread.file_name().to_str()?.parse().ok()?;
            let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
            Some((number, waited_ns(&text)?))
        });
        counted.collect()
    }
}

/// The second number of a `schedstat`: nanoseconds between being able to run and running.
fn waited_ns(text: &str) -> Option<u64> {
    text.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(threads: &[(&str, &str)]) -> (tempfile::TempDir, Waits) {
        let directory = tempfile::tempdir().expect("a directory");
        let waits = Waits {
            tasks: directory.path().to_owned(),
            before: HashMap::new(),
        };
        write(&waits, threads);
        (directory, waits)
    }

    fn write(waits: &Waits, threads: &[(&str, &str)]) {
        for (thread, text) in threads {
            fs::create_dir_all(waits.tasks.join(thread)).expect("made");
            fs::write(waits.tasks.join(thread).join("schedstat"), text).expect("written");
        }
    }

    #[test]
    fn the_thread_that_waited_longest_counts_and_only_for_what_is_new() {
        let (_directory, mut waits) = with(&[("7", "10 500 3\n"), ("8", "10 9000 3\n")]);
        waits.since_last();
        write(&waits, &[("7", "11 2500 4\n"), ("8", "11 9100 4\n")]);
        assert_eq!(waits.since_last(), Duration::from_nanos(2000));
        assert_eq!(waits.since_last(), Duration::ZERO);
    }

    #[test]
    fn what_is_no_statistic_counts_nothing() {
        let (_directory, mut waits) = with(&[("7", ""), ("8", "1 x 2"), ("self", "1 5 2")]);
        assert_eq!(waits.since_last(), Duration::ZERO);
        assert_eq!(Waits::of(u32::MAX).since_last(), Duration::ZERO);
    }
}
