//! The standard streams of one process: which vsock stream goes to which pipe.

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::{Uid, fchown, pipe2},
};
use protocol::StreamId;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

use super::{Error, doing};
use crate::{port::Connection, relay, stream::Streams, sys};

/// The streams that a request names; absent ones are /dev/null.
#[derive(Debug, Default, Clone, Copy)]
pub struct StreamIds {
    /// Standard input.
    pub stdin: Option<StreamId>,
    /// Standard output, or the terminal.
    pub stdout: Option<StreamId>,
    /// Standard error.
    pub stderr: Option<StreamId>,
}

/// The streams of a process that is about to be made.
pub(super) struct Stdio {
    childs: [OwnedFd; 3],
    ours: Ours,
}

/// The agent's ends.
enum Ours {
    Pipes {
        stdin: Option<(Connection, AsyncFd<OwnedFd>)>,
        outputs: Vec<(AsyncFd<OwnedFd>, Connection)>,
    },
    Terminal {
        stdin: Option<Connection>,
        stdout: Option<Connection>,
    },
}

/// Waits for the streams that `ids` names and makes what the process gets, whose user `owner`,
/// an id of the guest, may open it again by /proc/self/fd.
pub(super) async fn open(
    streams: &Streams,
    ids: &StreamIds,
    terminal: bool,
    owner: u32,
) -> Result<Stdio, Error> {
    let take = async |id: Option<StreamId>| match id {
        Some(id) => streams.take(id).await.map(Some),
        None => Ok(None),
    };
    let stdin = take(ids.stdin).await?;
    let stdout = take(ids.stdout).await?;
    if terminal {
        return Ok(Stdio {
            childs: [null()?, null()?, null()?],
            ours: Ours::Terminal { stdin, stdout },
        });
    }
    let stderr = take(ids.stderr).await?;
    let mut outputs = Vec::new();
    let mut output = |connection: Option<Connection>| match connection {
        Some(connection) => {
            let (ours, childs) = pipe()?;
            outputs.push((watch(ours, Interest::READABLE)?, connection));
            give(&childs, owner)?;
            Ok(childs)
        }
        None => null(),
    };
    let (child_out, child_err) = (output(stdout)?, output(stderr)?);
    let (child_in, stdin) = match stdin {
        Some(connection) => {
            let (childs, ours) = pipe()?;
            let ours = watch(ours, Interest::WRITABLE | Interest::ERROR)?;
            give(&childs, owner)?;
            (childs, Some((connection, ours)))
        }
        None => (null()?, None),
    };
    Ok(Stdio {
        childs: [child_in, child_out, child_err],
        ours: Ours::Pipes { stdin, outputs },
    })
}

impl Stdio {
    /// What the process gets as 0, 1 and 2.
    pub(super) fn childs(&self) -> [BorrowedFd<'_>; 3] {
        self.childs.each_ref().map(AsFd::as_fd)
    }

    /// Starts to relay; `closed` then closes the standard input. The tasks end by themselves
    /// when the last process that has the streams open ends or the host closes its side.
    pub(super) fn relay(self, terminal: Option<Arc<AsyncFd<OwnedFd>>>, closed: Arc<Notify>) {
        match (self.ours, terminal) {
            (Ours::Pipes { stdin, outputs }, _) => {
                for (pipe, host) in outputs {
                    tokio::spawn(relay::output(pipe, host));
                }
                if let Some((host, pipe)) = stdin {
                    tokio::spawn(async move { relay::input(host, pipe, &closed).await });
                }
            }
            (Ours::Terminal { stdin, stdout }, Some(terminal)) => {
                let output = relay::terminal_output(terminal.clone(), stdout);
                let input = stdin.map(|host| {
                    tokio::spawn(async move { relay::terminal_input(&host, &terminal).await })
                });
                tokio::spawn(async move {
                    output.await;
                    if let Some(input) = input {
                        input.abort();
                    }
                });
            }
            (Ours::Terminal { .. }, None) => {}
        }
    }
}

/// Both ends of a pipe, to read from and to write to.
fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    pipe2(OFlag::O_CLOEXEC)
        .map_err(io::Error::from)
        .map_err(doing("make a pipe"))
}

fn give(pipe: &OwnedFd, owner: u32) -> Result<(), Error> {
    if owner == 0 {
        return Ok(());
    }
    fchown(pipe, Some(Uid::from_raw(owner)), None)
        .map_err(io::Error::from)
        .map_err(doing("give a pipe to the process's user"))
}

/// The agent's end of a pipe does not wait; the process's own end still does.
fn watch(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, Error> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .map_err(io::Error::from)
        .and_then(|_| sys::watch(fd, interest))
        .map_err(doing("watch a pipe"))
}

fn null() -> Result<OwnedFd, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map(OwnedFd::from)
        .map_err(doing("open /dev/null"))
}
