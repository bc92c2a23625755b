//! What can be wrong with a sandbox, in words.

use std::{io, path::PathBuf};

use protocol::HelloError;

use super::{Death, ResourceError, SharedError, StateError};
use crate::{cni, hooks, network};

/// Why a sandbox did not start, or what it could not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No directory for it.
    #[error(transparent)]
    State(#[from] StateError),
    /// Something it is made from is missing.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// A hook of the configuration.
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// The pod's network.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// Networks that it is attached to.
    #[error(transparent)]
    Attach(#[from] cni::Error),
    /// A card for an interface that came later.
    #[error("cannot plug a card for the pod's interface {name:?} into the virtual machine")]
    Plug {
        /// The interface.
        name: String,
        /// What the VMM said.
        #[source]
        source: ::vmm::control::Error,
    },
    /// A card of an interface that is gone.
    #[error("cannot take the network card in slot {slot} out of the virtual machine")]
    Unplug {
        /// The slot.
        slot: u8,
        /// What the VMM said.
        #[source]
        source: ::vmm::control::Error,
    },
    /// The cgroup is another container's.
    #[error(
        "the cgroup {} has processes of another container; name another by linux.cgroupsPath, or choose another id",
        path.display()
    )]
    CgroupTaken {
        /// Its directory.
        path: PathBuf,
    },
    /// A disk that is plugged in or taken out.
    #[error("cannot change the disks of the virtual machine")]
    Disk(#[source] ::vmm::control::Error),
    /// The tree of files that it shares with the host.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// The host ran out of something.
    #[error("cannot make {what} for the virtual machine")]
    Make {
        /// Of what.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The VMM could not be started.
    #[error("cannot start the virtual machine")]
    Launch(#[source] ::vmm::launch::Error),
    /// The VMM ended before the agent came up.
    #[error("the virtual machine ended while it booted: {death}{console}")]
    BootDeath {
        /// How.
        death: Death,
        /// The guest's last lines.
        console: ConsoleTail,
    },
    /// The agent did not come up in time.
    #[error(
        "the guest did not boot within {seconds} s; try --start-timeout with more seconds, or `bulkhead check`{console}"
    )]
    BootDeadline {
        /// The deadline.
        seconds: u64,
        /// The guest's last lines.
        console: ConsoleTail,
    },
    /// The guest went away before, and its VMM did not.
    #[error(
        "the guest broke its connection to the host off before its agent was ready, and its virtual machine has not ended after {seconds} s; try `bulkhead check`{console}"
    )]
    BootHangUp {
        /// How long its end was waited for, with the boot.
        seconds: u64,
        /// The guest's last lines.
        console: ConsoleTail,
    },
    /// What came up is no agent of ours.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The VMM ended later.
    #[error("the virtual machine ended while {doing}: {death}{console}")]
    Death {
        /// What was being done.
        doing: &'static str,
        /// How.
        death: Death,
        /// The guest's last lines.
        console: ConsoleTail,
    },
    /// The guest's side is there and does not talk.
    #[error("the connection to the guest failed while {doing}")]
    Connection {
        /// What was being done.
        doing: &'static str,
        /// How it failed.
        #[source]
        source: io::Error,
    },
    /// The agent did not answer in time.
    #[error("the guest's agent did not answer within {seconds} s while {doing}")]
    CallDeadline {
        /// What was being done.
        doing: &'static str,
        /// The deadline.
        seconds: u64,
    },
    /// The agent refused.
    #[error("{message}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// The agent's reason.
        code: ttrpc::Code,
        /// Its words, made printable.
        message: String,
    },
}

/// The guest's last lines, as they are appended to an error; none where they tell nothing.
#[derive(Debug)]
pub struct ConsoleTail(pub(super) Option<Vec<String>>);

impl std::fmt::Display for ConsoleTail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.as_deref() {
            None => Ok(()),
            Some([]) => f.write_str("; the guest's console is empty"),
            Some(lines) => {
                f.write_str("; the guest's console ends with:")?;
                lines.iter().try_for_each(|line| write!(f, "\n  | {line}"))
            }
        }
    }
}
