//! What happens to the processes of a pod, as its faces tell others.

use crate::id::ContainerId;

use super::{Exit, ProcessId};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A container was made.
    Create {
        /// Which.
        container: ContainerId,
    },
    /// Its process was executed.
    Start {
        /// Which.
        container: ContainerId,
    },
    /// An exec was made.
    ExecAdded {
        /// Which.
        process: ProcessId,
    },
    /// Its process was executed.
    ExecStarted {
        /// Which.
        process: ProcessId,
    },
    /// A process has ended. It comes after its start.
    Exit {
        /// Which.
        process: ProcessId,
        /// How.
        exit: Exit,
    },
    /// A container or exec was removed.
    Delete {
        /// Which.
        process: ProcessId,
        /// How its process had ended.
        exit: Exit,
    },
    /// A container was frozen.
    Paused {
        /// Which.
        container: ContainerId,
    },
    /// A container was thawed.
    Resumed {
        /// Which.
        container: ContainerId,
    },
    /// The guest's kernel killed a process of the container for want of memory.
    Oom {
        /// Which.
        container: ContainerId,
    },
}
