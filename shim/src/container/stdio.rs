//! The standard streams of a container: which descriptor of ours goes to which
//! stream of the guest.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Mutex,
};

use nix::sys::stat::{SFlag, fstat, major, minor};
use protocol::{StreamId, agent};
use tokio::net::UnixStream;

use super::pump::Pump;
use crate::{
    sandbox::{self, Sandbox, Signs},
    sys,
};

/// What is to be connected, before it is.
#[derive(Debug)]
pub struct Wiring {
    stdin: Option<Inlet>,
    stdout: Option<Wire>,
    stderr: Option<Wire>,
}

/// One descriptor of ours and the name of its stream.
#[derive(Debug)]
struct Wire {
    fd: OwnedFd,
    id: StreamId,
}

/// The stream of an input. Where it comes from may be known only when it begins to flow.
#[derive(Debug)]
struct Inlet {
    fd: Option<OwnedFd>,
    id: StreamId,
}

/// Connected streams that carry nothing yet.
#[derive(Debug, Default)]
pub struct Streams {
    /// Where it is noted that the guest wrote.
    signs: Signs,
    input: Option<(Option<OwnedFd>, UnixStream)>,
    outputs: Vec<(UnixStream, OwnedFd)>,
}

/// Streams under way. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Pumps {
    input: Mutex<Option<Pump>>,
    outputs: Vec<Pump>,
}

impl Wiring {
    /// This process's own streams, those of a terminal if `terminal`: its output has no second
    /// stream for errors.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn inherited(terminal: bool) -> io::Result<Self> {
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let stderr = (!terminal).then_some(stderr.as_fd());
        Self::of(Some(stdin.as_fd()), Some(stdout.as_fd()), stderr)
    }

    /// Duplicates of these.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn of(
        stdin: Option<BorrowedFd<'_>>,
        stdout: Option<BorrowedFd<'_>>,
        stderr: Option<BorrowedFd<'_>>,
    ) -> io::Result<Self> {
        let wire = |fd: Option<BorrowedFd<'_>>| fd.map_or(Ok(None), wire);
        let stdin = wire(stdin)?.map(|Wire { fd, id }| Inlet { fd: Some(fd), id });
        Ok(Self {
            stdin,
            stdout: wire(stdout)?,
            stderr: wire(stderr)?,
        })
    }

    /// These, with an input that comes from where [`Streams::relay`] is told.
    pub(crate) fn with_later_input(self) -> Self {
        let stdin = Some(Inlet {
            fd: None,
            id: name(),
        });
        Self { stdin, ..self }
    }

    /// No streams at all.
    pub fn none() -> Self {
        Self {
            stdin: None,
            stdout: None,
            stderr: None,
        }
    }

    /// The streams' names for the agent.
    pub(crate) fn names(&self) -> agent::Streams {
        let name = |wire: &Option<Wire>| wire.as_ref().map_or(0, |wire| wire.id.0);
        agent::Streams {
            stdin: self.stdin.as_ref().map_or(0, |inlet| inlet.id.0),
            stdout: name(&self.stdout),
            stderr: name(&self.stderr),
            ..Default::default()
        }
    }

    /// Connects all of them at once.
    pub(crate) async fn open(self, sandbox: &Sandbox) -> Result<Streams, sandbox::Error> {
        let (stdin, stdout, stderr) = tokio::try_join!(
            async {
                match self.stdin {
                    Some(Inlet { fd, id }) => Ok(Some((fd, sandbox.stream(id).await?))),
                    None => Ok(None),
                }
            },
            connect(self.stdout, sandbox),
            connect(self.stderr, sandbox),
        )?;
        let outputs = [stdout, stderr].into_iter().flatten();
        Ok(Streams {
            signs: sandbox.signs().clone(),
            input: stdin,
            outputs: outputs.map(|(fd, stream)| (stream, fd)).collect(),
        })
    }
}

impl Streams {
    /// Begins to relay, from `input` where it was left open. An input from nowhere ends at once.
    pub(crate) fn relay(self, input: Option<OwnedFd>) -> io::Result<Pumps> {
        let pumps = self.outputs.into_iter().map(|(guest, fd)| {
            let guest = OwnedFd::from(guest.into_std()?);
            Pump::start_heard("stdout", guest, fd, self.signs.clone())
        });
        let outputs = pumps.collect::<io::Result<_>>()?;
        let input = self
            .input
            .and_then(|(fd, guest)| Some((fd.or(input)?, guest)));
        let input = input.map(|(fd, guest)| {
            let guest = OwnedFd::from(guest.into_std()?);
            Pump::start("stdin", fd, guest)
        });
        Ok(Pumps {
            input: Mutex::new(input.transpose()?),
            outputs,
        })
    }
}

impl Pumps {
    /// Ends the input.
    pub(crate) fn close_input(&self) {
        let input = self.input.lock().map(|mut input| input.take());
        drop(input);
    }

    /// Waits until all output was written.
    pub(crate) async fn drained(&self) {
        for output in &self.outputs {
            output.ended().await;
        }
    }
}

async fn connect(
    wire: Option<Wire>,
    sandbox: &Sandbox,
) -> Result<Option<(OwnedFd, UnixStream)>, sandbox::Error> {
    match wire {
        Some(wire) => Ok(Some((wire.fd, sandbox.stream(wire.id).await?))),
        None => Ok(None),
    }
}

/// A stream for `fd`, unless that is /dev/null, which the guest has itself.
fn wire(fd: BorrowedFd<'_>) -> io::Result<Option<Wire>> {
    let status = fstat(fd)?;
    let character =
        SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFCHR;
    if character && (major(status.st_rdev), minor(status.st_rdev)) == (1, 3) {
        return Ok(None);
    }
    Ok(Some(Wire {
        fd: fd.try_clone_to_owned()?,
        id: name(),
    }))
}

/// The name of a new stream.
fn name() -> StreamId {
    // 0 names none.
    StreamId(u64::from_le_bytes(sys::random()).max(1))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn nothing_is_relayed_to_or_from_dev_null() {
        let null = File::open("/dev/null").expect("open");
        assert!(wire(null.as_fd()).expect("wired").is_none());
    }

    #[test]
    fn each_stream_has_a_name_of_its_own() {
        let file = File::open("/dev/zero").expect("open");
        let first = wire(file.as_fd()).expect("wired").expect("a wire");
        let second = wire(file.as_fd()).expect("wired").expect("a wire");
        assert_ne!(first.id, second.id);
    }

    #[test]
    fn a_container_without_streams_names_none() {
        let names = Wiring::none().names();
        assert_eq!((names.stdin, names.stdout, names.stderr), (0, 0, 0));
    }
}
