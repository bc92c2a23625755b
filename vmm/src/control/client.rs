//! The host's side of the control socket.

use std::{
    io::{self, IoSlice, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::message::{Counters, MAX_LINE_BYTES, Reply, Request, State, Status};
use crate::{config::DeviceConfig, launch, virtio::Link};

/// How long a reply may take. The VMM may be taken over by its guest: nobody waits for it for ever.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to the control socket of a VM.
///
/// ```no_run
/// let mut vm = vmm::control::Client::connect("/run/vm/control.sock".as_ref())?;
/// vm.pause()?;
/// println!("{:?}", vm.counters()?.exits);
/// # Ok::<(), vmm::control::Error>(())
/// ```
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    input: Vec<u8>,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path).map_err(|source| Error::Connect {
            path: path.to_owned(),
            source,
        })?;
        Self::new(stream)
    }

    /// Speaks over a connected socket.
    ///
    /// # Errors
    /// When the socket takes no time-out.
    pub fn new(stream: UnixStream) -> Result<Self, Error> {
        stream
            .set_read_timeout(Some(PATIENCE))
            .map_err(Error::Send)?;
        stream
            .set_write_timeout(Some(PATIENCE))
            .map_err(Error::Send)?;
        Ok(Self {
            stream,
            input: Vec::new(),
        })
    }

    /// What the VM is and does.
    ///
    /// # Errors
    /// When the VMM does not answer, or with something else.
    pub fn status(&mut self) -> Result<Status, Error> {
        match self.call(&Request::Status {}, &[])? {
            Reply::Status(status) => Ok(status),
            other => Err(Error::unexpected(other)),
        }
    }

    /// Whether guest code runs.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn state(&mut self) -> Result<State, Error> {
        match self.call(&Request::State {}, &[])? {
            Reply::State { state } => Ok(state),
            other => Err(Error::unexpected(other)),
        }
    }

    /// Everything that is counted.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn counters(&mut self) -> Result<Counters, Error> {
        match self.call(&Request::Counters {}, &[])? {
            Reply::Counters(counters) => Ok(counters),
            other => Err(Error::unexpected(other)),
        }
    }

    /// Stops guest code until [`Client::resume`].
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn pause(&mut self) -> Result<(), Error> {
        self.done(&Request::Pause {})
    }

    /// Lets guest code run again.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn resume(&mut self) -> Result<(), Error> {
        self.done(&Request::Resume {})
    }

    /// Ends the VM at once.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn stop(&mut self) -> Result<(), Error> {
        self.done(&Request::Stop {})
    }

    /// Puts a device on the bus and returns its slot. A resource `Fd(n)` of it is the n-th of
    /// `descriptors`.
    ///
    /// # Errors
    /// As [`Client::status`], and when the VMM cannot make the device.
    pub fn add_device(
        &mut self,
        device: DeviceConfig,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<u8, Error> {
        let apart = launch::set_apart(&device, descriptors);
        let mut descriptors = descriptors.to_vec();
        for (index, descriptor) in &apart {
            descriptors[*index] = descriptor.as_fd();
        }
        match self.call(&Request::AddDevice { device }, &descriptors)? {
            Reply::Added { slot } => Ok(slot),
            other => Err(Error::unexpected(other)),
        }
    }

    /// Takes a device off the bus.
    ///
    /// # Errors
    /// As [`Client::status`], and when there is none.
    pub fn remove_device(&mut self, slot: u8) -> Result<(), Error> {
        self.done(&Request::RemoveDevice { slot })
    }

    /// Gives a network card its cable or takes it away.
    ///
    /// # Errors
    /// As [`Client::status`], and when there is no network card in the slot.
    pub fn set_link(&mut self, slot: u8, link: Link) -> Result<(), Error> {
        self.done(&Request::SetLink { slot, link })
    }

    fn done(&mut self, request: &Request) -> Result<(), Error> {
        match self.call(request, &[])? {
            Reply::Done {} => Ok(()),
            other => Err(Error::unexpected(other)),
        }
    }

    fn call(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Reply, Error> {
        let mut line = serde_json::to_vec(request).map_err(|error| Error::Send(error.into()))?;
        line.push(b'\n');
        self.send(&line, descriptors).map_err(Error::Send)?;
        let reply = self.receive().map_err(Error::Receive)?;
        serde_json::from_slice(&reply).map_err(|error| Error::Receive(error.into()))
    }

    /// Sends the descriptors with the first bytes.
    fn send(&mut self, line: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if numbers.is_empty() {
            &rights[..0]
        } else {
            &rights[..]
        };
        let parts = [IoSlice::new(line)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(self.stream.as_raw_fd(), &parts, rights, flags, None)?;
        self.stream.write_all(&line[sent..])
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let rest = self.input.split_off(end + 1);
                return Ok(std::mem::replace(&mut self.input, rest));
            }
            if self.input.len() > MAX_LINE_BYTES {
                return Err(io::Error::other("the reply has no end"));
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Why a VM did not do as it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("cannot reach the VMM's control socket {}; has the VM ended?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The request did not get there.
    #[error("cannot send a request to the VMM")]
    Send(#[source] io::Error),
    /// No answer, or none that can be understood.
    #[error("the VMM does not answer")]
    Receive(#[source] io::Error),
    /// The VMM says no.
    #[error("the VMM refuses: {0:?}")]
    Refused(String),
    /// It answers something else.
    #[error("the VMM answers something else than it was asked")]
    Unexpected,
}

impl Error {
    fn unexpected(reply: Reply) -> Self {
        match reply {
            Reply::Failed { message } => Self::Refused(message),
            _ => Self::Unexpected,
        }
    }
}
