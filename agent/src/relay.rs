//! Copying between a process's pipe or terminal and the host's stream of it.
//!
//! Nothing is buffered here beyond one chunk: a reader that is slow fills the
//! pipe, and a full pipe stops the writer.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
    task::coop::consume_budget,
};

use crate::{port::Connection, sys};

/// How much one splice moves at most: a pipe's size.
const CHUNK: usize = 64 << 10;

/// Sends what is read from `pipe` to the host until the last writer is gone.
pub(crate) async fn output(pipe: AsyncFd<OwnedFd>, host: Connection) {
    // However it ended, there is nobody left to tell but the host.
    let _ = splice(&pipe, host.socket(), WhenEmpty::Wait).await;
    host.finish();
}

/// Writes what the host sends to `pipe` until the host has finished or no reader is left; from
/// `closed` on, only what has arrived.
pub(crate) async fn input(host: Connection, pipe: AsyncFd<OwnedFd>, closed: &Notify) {
    tokio::select! {
        _ = splice(host.socket(), &pipe, WhenEmpty::Wait) => {}
        // The last reader is gone: the host learns it when the connection is dropped.
        _ = pipe.ready(Interest::ERROR) => {}
        () = closed.notified() => {
            tokio::select! {
                _ = splice(host.socket(), &pipe, WhenEmpty::Stop) => {}
                _ = pipe.ready(Interest::ERROR) => {}
            }
        }
    }
}

/// Sends what a terminal prints to the host, if it listens, until the last user of the terminal
/// is gone.
pub(crate) async fn terminal_output(terminal: Arc<AsyncFd<OwnedFd>>, host: Option<Connection>) {
    // A terminal that nobody has open any more answers EIO.
    match host {
        Some(host) => {
            let _ = copy(&terminal, host.socket()).await;
            host.finish();
        }
        None => {
            let mut unread = [0; 4096];
            let read = |fd: &OwnedFd| Ok(nix::unistd::read(fd, &mut unread)?);
            let mut read = read;
            while terminal
                .async_io(Interest::READABLE, &mut read)
                .await
                .is_ok_and(|length| length > 0)
            {}
        }
    }
}

/// Types what the host sends into a terminal until the host has finished.
pub(crate) async fn terminal_input(host: &Connection, terminal: &AsyncFd<OwnedFd>) {
    let _ = copy(host.socket(), terminal).await;
}

/// What to do where nothing is there to read, though more may come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WhenEmpty {
    Wait,
    Stop,
}

/// Moves bytes by splice(2), one side being a pipe, until the end of `from`.
async fn splice(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    when_empty: WhenEmpty,
) -> io::Result<()> {
    loop {
        consume_budget().await;
        let mut readable = match when_empty {
            WhenEmpty::Stop if !is_ready(from, PollFlags::POLLIN)? => return Ok(()),
            _ => from.readable().await?,
        };
        let mut writable = to.writable().await?;
        match sys::splice(from.get_ref().as_fd(), to.get_ref().as_fd(), CHUNK) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // The call does not tell which side it would wait for.
                if !is_ready(from, PollFlags::POLLIN)? {
                    readable.clear_ready();
                }
                if !is_ready(to, PollFlags::POLLOUT)? {
                    writable.clear_ready();
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn is_ready(fd: &AsyncFd<OwnedFd>, event: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.get_ref().as_fd(), event)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

/// Copies bytes through a buffer, where neither side is a pipe, until the end of `from`.
async fn copy(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        consume_budget().await;
        let length = from
            .async_io(Interest::READABLE, |fd| {
                Ok(nix::unistd::read(fd, &mut buffer)?)
            })
            .await?;
        if length == 0 {
            return Ok(());
        }
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let written = to
                .async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, rest)?))
                .await?;
            rest = &rest[written..];
        }
    }
}
