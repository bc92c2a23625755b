//! The one place where an error becomes a status of an rpc.

use ttrpc::{Code, get_status};

use super::stdio;
use crate::{
    id,
    pod::{self, Kind},
    text::chain,
};

/// Why a call of containerd's was not done, in the codes and words that its clients know.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub(super) struct Failure {
    code: Code,
    message: String,
}

impl Failure {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// No such container.
    pub(super) fn no_container() -> Self {
        Self::new(Code::NOT_FOUND, "container not created: not found")
    }

    /// No such exec.
    pub(super) fn no_exec(exec: &str) -> Self {
        Self::new(
            Code::NOT_FOUND,
            format!("process does not exist {exec}: not found"),
        )
    }

    /// A signal to what has ended.
    pub(super) fn finished() -> Self {
        Self::new(Code::NOT_FOUND, "process already finished: not found")
    }

    /// The daemon takes nothing more.
    pub(super) fn ending() -> Self {
        Self::new(Code::UNAVAILABLE, "the shim ends")
    }

    /// Something in the request makes no sense.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::INVALID_ARGUMENT, message)
    }

    /// Whether what was asked for is not there, or not any more.
    pub(super) fn is_absence(&self) -> bool {
        self.code == Code::NOT_FOUND
    }

    /// Whether it is in the wrong state.
    pub(super) fn is_state(&self) -> bool {
        self.code == Code::FAILED_PRECONDITION
    }
}

impl From<&pod::Error> for Failure {
    fn from(error: &pod::Error) -> Self {
        let code = match error.kind() {
            Kind::NotFound => Code::NOT_FOUND,
            Kind::Exists => Code::ALREADY_EXISTS,
            Kind::State => Code::FAILED_PRECONDITION,
            Kind::Invalid => Code::INVALID_ARGUMENT,
            // Clients look for the words, and take NOT_FOUND for the container's absence.
            Kind::MissingProgram | Kind::NotExecutable => Code::UNKNOWN,
            Kind::Dead | Kind::Internal => Code::INTERNAL,
        };
        Self::new(code, chain(error))
    }
}

impl From<pod::Error> for Failure {
    fn from(error: pod::Error) -> Self {
        Self::from(&error)
    }
}

impl From<stdio::Error> for Failure {
    fn from(error: stdio::Error) -> Self {
        use stdio::Error as Stdio;
        let code = match error {
            Stdio::Uri(_) | Stdio::Input | Stdio::TwoLoggers => Code::INVALID_ARGUMENT,
            Stdio::Open { .. } | Stdio::Logger(_) => Code::INTERNAL,
        };
        Self::new(code, chain(&error))
    }
}

impl From<id::Error> for Failure {
    fn from(error: id::Error) -> Self {
        Self::invalid(chain(&error))
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(failure: Failure) -> Self {
        Self::RpcStatus(get_status(failure.code, failure.message))
    }
}
