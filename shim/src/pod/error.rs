//! Why a pod did not do what it was asked for. The words are those that callers of container
//! runtimes look for.

use std::io;

use serde::{Deserialize, Serialize};

use crate::{bundle, hooks, sandbox};

/// Why not.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such container or exec.
    #[error("{what} does not exist")]
    NotFound {
        /// `container` or `exec`, with its name where that helps.
        what: String,
    },
    /// There is one of that name already.
    #[error("{what} with given ID already exists")]
    Exists {
        /// `container` or `exec`.
        what: &'static str,
    },
    /// It cannot be done to what is in this state.
    #[error("{message}")]
    State {
        /// Which, in the words of other runtimes.
        message: String,
    },
    /// The program is not there.
    #[error("unable to start container process: {message}")]
    MissingProgram {
        /// The agent's words.
        message: String,
    },
    /// The program cannot be executed.
    #[error("unable to start container process: {message}")]
    NotExecutable {
        /// The agent's words.
        message: String,
    },
    /// The bundle cannot be run.
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// The machine is too small for it.
    #[error(transparent)]
    Size(#[from] bundle::SizeError),
    /// The sandbox could not do it.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// A hook of the configuration.
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// The root file system cannot be mounted.
    #[error("cannot mount the root file system: {what}")]
    Root {
        /// Which mount.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A disk that the container is to have.
    #[error("cannot give the disk {what} to the container")]
    Disk {
        /// Its path or number.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host ran out of something.
    #[error("cannot relay the standard streams")]
    Streams(#[source] io::Error),
    /// Something in what was asked for makes no sense.
    #[error("{message}")]
    Invalid {
        /// What.
        message: String,
    },
}

/// What kind of failure it is, for those who answer differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// No such container or exec.
    NotFound,
    /// The name is taken.
    Exists,
    /// Not in this state.
    State,
    /// The program is missing.
    MissingProgram,
    /// The program cannot be executed.
    NotExecutable,
    /// What was asked for is wrong or not possible.
    Invalid,
    /// The machine has ended.
    Dead,
    /// A failure of our own.
    Internal,
}

impl Error {
    /// What kind of failure it is.
    pub fn kind(&self) -> Kind {
        use sandbox::Error as Sandbox;
        match self {
            Self::NotFound { .. } => Kind::NotFound,
            Self::Exists { .. }
            | Self::Sandbox(Sandbox::State(sandbox::StateError::Exists { .. })) => Kind::Exists,
            Self::State { .. } => Kind::State,
            Self::MissingProgram { .. } => Kind::MissingProgram,
            Self::NotExecutable { .. } => Kind::NotExecutable,
            Self::Bundle(_) | Self::Size(_) | Self::Invalid { .. } => Kind::Invalid,
            Self::Sandbox(Sandbox::Death { .. } | Sandbox::BootDeath { .. }) => Kind::Dead,
            Self::Sandbox(Sandbox::Refused {
                code: ttrpc::Code::INVALID_ARGUMENT | ttrpc::Code::UNIMPLEMENTED,
                ..
            }) => Kind::Invalid,
            Self::Sandbox(_)
            | Self::Root { .. }
            | Self::Disk { .. }
            | Self::Streams(_)
            | Self::Hook(_) => Kind::Internal,
        }
    }

    /// Whether the guest did not answer in time.
    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Sandbox(sandbox::Error::CallDeadline { .. }))
    }

    /// No container of that name.
    pub(super) fn no_container() -> Self {
        Self::NotFound {
            what: "container".to_owned(),
        }
    }

    /// Not in this state.
    pub(super) fn state(message: impl Into<String>) -> Self {
        Self::State {
            message: message.into(),
        }
    }

    /// A refusal to make or start a process, told apart as container tools have it.
    pub(super) fn unexecutable(error: sandbox::Error) -> Self {
        match error {
            sandbox::Error::Refused {
                code: ttrpc::Code::NOT_FOUND,
                message,
                ..
            } => Self::MissingProgram { message },
            sandbox::Error::Refused {
                code: ttrpc::Code::PERMISSION_DENIED,
                message,
                ..
            } => Self::NotExecutable { message },
            other => other.into(),
        }
    }
}

impl Kind {
    /// The exit status that tells of it: 127 for a missing program, 126 for one that cannot be
    /// executed, [`FAILED`](crate::container::FAILED) for what is our own failure.
    pub fn exit_status(self) -> u8 {
        match self {
            Self::MissingProgram => 127,
            Self::NotExecutable => 126,
            _ => crate::container::FAILED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: ttrpc::Code) -> Kind {
        Error::unexecutable(sandbox::Error::Refused {
            doing: "starting the container",
            code,
            message: "exec: \"sh\": no such file".to_owned(),
        })
        .kind()
    }

    #[test]
    fn a_missing_program_is_127_and_one_that_cannot_be_executed_126() {
        assert_eq!(refused(ttrpc::Code::NOT_FOUND).exit_status(), 127);
        assert_eq!(refused(ttrpc::Code::PERMISSION_DENIED).exit_status(), 126);
    }

    #[test]
    fn every_other_refusal_is_a_failure_of_ours() {
        assert_eq!(refused(ttrpc::Code::INTERNAL), Kind::Internal);
        assert_eq!(refused(ttrpc::Code::INVALID_ARGUMENT).exit_status(), 125);
    }
}
