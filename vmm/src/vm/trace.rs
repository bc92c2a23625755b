//! When the steps of a VM's start were done, by the host's monotonic clock.

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// One step that was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// What was done.
    pub what: String,
    /// When, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    pub at_ns: u64,
}

/// The steps in their order.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    marks: Vec<Mark>,
}

impl Trace {
    /// Starts with the first mark, "started".
    pub fn start() -> Self {
        let mut trace = Self::default();
        trace.mark("started");
        trace
    }

    /// A step is done.
    pub fn mark(&mut self, what: &str) {
        self.marks.push(Mark {
            what: what.to_owned(),
            at_ns: monotonic_ns(),
        });
    }

    /// All steps so far.
    pub fn marks(&self) -> &[Mark] {
        &self.marks
    }
}

/// The host's `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    // The clock exists on every Linux.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
        .unwrap_or(0)
}
