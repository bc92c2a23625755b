//! What is said on the control socket: a request, a reply, each a length of
//! four bytes, little endian, and so much JSON. Descriptors come with a
//! request's first bytes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::pod::Kind;

/// The longest request or reply.
pub(super) const MAX: usize = 8 << 20;

/// What a pod's process is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// Makes a container, a member of the pod.
    Create(Create),
    /// Executes a container's process.
    Start {
        /// The container.
        id: String,
    },
    /// What is known of it.
    State {
        /// The container.
        id: String,
    },
    /// Sends a signal.
    Kill {
        /// The container.
        id: String,
        /// The signal.
        signal: i32,
        /// Whether all its processes get it.
        all: bool,
    },
    /// Removes it.
    Delete {
        /// The container.
        id: String,
        /// Whether it is killed first.
        force: bool,
    },
    /// Makes and executes a process in it.
    Exec(Exec),
    /// Freezes it.
    Pause {
        /// The container.
        id: String,
    },
    /// Thaws it.
    Resume {
        /// The container.
        id: String,
    },
    /// Sets limits anew.
    Update {
        /// The container.
        id: String,
        /// The specification's `linux.resources`.
        resources: Value,
    },
    /// Reads its counters.
    Stats {
        /// The container.
        id: String,
    },
    /// Lists its processes in the guest.
    Processes {
        /// The container.
        id: String,
    },
    /// Lists the host's processes that stand for it and its execs.
    Pids {
        /// The container.
        id: String,
    },
    /// Answers when it is not frozen.
    Thawed {
        /// The container.
        id: String,
    },
}

/// A container to be made. Descriptors: the relay's socket; then a terminal, or input, output and
/// errors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// Its name.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its relay.
    pub pid: u32,
    /// Whether its cgroup is laid out as systemd does.
    pub systemd_cgroup: bool,
}

/// A process to be made. Descriptors as with [`Create`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Exec {
    /// The container.
    pub id: String,
    /// Its name.
    pub exec: String,
    /// The specification's `process`.
    pub process: Map<String, Value>,
    /// Its relay.
    pub pid: u32,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It was done.
    Ok(Value),
    /// It was not.
    Error {
        /// What kind of failure it is.
        kind: Kind,
        /// Why.
        message: String,
    },
}

/// The wire form.
pub(super) fn encode<T: Serialize>(message: &T) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len() - 4;
    if length > MAX {
        let text = format!("a message of {length} bytes is longer than {MAX}");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, text));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// The length that the first four bytes of a message say, if it is bearable.
pub(super) fn length(first: [u8; 4]) -> std::io::Result<usize> {
    let length = u32::from_le_bytes(first) as usize;
    if length > MAX {
        let text = format!("a message of {length} bytes is longer than {MAX}");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_survives_the_wire() {
        let request = Request::Kill {
            id: "web".to_owned(),
            signal: 9,
            all: true,
        };
        let bytes = encode(&request).expect("encoded");
        let length = length(bytes[..4].try_into().expect("four")).expect("bearable");
        assert_eq!(length, bytes.len() - 4);
        let back: Request = serde_json::from_slice(&bytes[4..]).expect("decoded");
        assert_eq!(back, request);
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_before_it_is_read() {
        let error = length(u32::MAX.to_le_bytes()).expect_err("refused");
        assert!(error.to_string().contains("longer than"), "{error}");
    }

    proptest! {
        #[test]
        fn other_bytes_are_an_error_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = serde_json::from_slice::<Request>(&bytes);
        }
    }
}
