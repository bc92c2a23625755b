//! The commands' end of the control socket. It waits: a command does nothing else.

use std::{
    fs::File,
    io::{self, IoSlice, Read, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::Value;

use super::message::{self, Reply, Request};
use crate::pod::Kind;

/// The socket's name in the state directory.
pub(super) const SOCKET: &str = "control.sock";

/// How long a pod's process may take to say what it knows without asking anybody.
const KNOWN: Duration = Duration::from_secs(30);

/// Why a request was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pod's process says why.
    #[error("{message}")]
    Refused {
        /// What kind of failure it is.
        kind: Kind,
        /// Why.
        message: String,
    },
    /// The pod's process ended before it answered.
    #[error("the pod's process ended before it answered")]
    Gone,
    /// It does not answer what it knows.
    #[error("the pod's process has not answered for {seconds} s: it is stopped, or hangs")]
    Silent {
        /// How long it was waited for.
        seconds: u64,
    },
    /// The socket failed.
    #[error("cannot speak to the pod's process")]
    Io(#[source] io::Error),
}

/// A connection for one request.
#[derive(Debug)]
pub struct Client(UnixStream);

impl Client {
    /// Connects to the pod whose state lies in `directory`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(directory: &Path) -> io::Result<Self> {
        // A socket's path may have 107 bytes only.
        let directory = File::open(directory)?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
        UnixStream::connect(path).map(Self)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// When the pod's process refuses or ends, or does not say what it knows.
    pub fn ask(self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Value, Error> {
        let patience = match request {
            Request::State { .. } | Request::Pids { .. } => Some(KNOWN),
            // The guest may be asked, or somebody has to do something.
            _ => None,
        };
        self.ask_within(patience, request, descriptors)
    }

    fn ask_within(
        mut self,
        patience: Option<Duration>,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Value, Error> {
        let failed = |error: io::Error| match (error.kind(), patience) {
            (io::ErrorKind::WouldBlock, Some(patience)) => Error::Silent {
                seconds: patience.as_secs(),
            },
            _ => gone(error),
        };
        let bytes = message::encode(request).map_err(Error::Io)?;
        self.0.set_read_timeout(patience).map_err(Error::Io)?;
        self.send(&bytes, descriptors).map_err(failed)?;
        let mut first = [0; 4];
        self.0.read_exact(&mut first).map_err(failed)?;
        let mut text = vec![0; message::length(first).map_err(Error::Io)?];
        self.0.read_exact(&mut text).map_err(failed)?;
        match serde_json::from_slice(&text) {
            Ok(Reply::Ok(value)) => Ok(value),
            Ok(Reply::Error { kind, message }) => Err(Error::Refused { kind, message }),
            Err(error) => Err(Error::Io(error.into())),
        }
    }

    fn send(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control: &[ControlMessage<'_>] = if numbers.is_empty() { &[] } else { &rights };
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            flags,
            None,
        )?;
        self.0.write_all(&bytes[sent..])
    }
}

fn gone(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => Error::Gone,
        _ => Error::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_process_that_is_stopped_is_not_waited_for_to_say_what_it_knows() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let request = Request::State {
            id: "web".to_owned(),
        };
        let patience = Some(Duration::from_millis(50));
        let error = Client(ours).ask_within(patience, &request, &[]);
        let error = error.expect_err("given up");
        assert!(matches!(error, Error::Silent { .. }), "{error}");
    }
}
