//! One direction of one stream: bytes from a descriptor to another.
//!
//! Each has a thread of its own, since the descriptors that a command inherits
//! are shared with others and must not be made non-blocking, and files are
//! always ready. The thread waits in `poll` alone, where it can be stopped: of a
//! terminal, which may be read and written by others and takes less than it
//! seems to, it opens a description of its own that does not block. It holds at
//! most one buffer: a reader that is slow slows the writer, through the kernel's
//! pipes, sockets and vsock credit. Where one side is a pipe the bytes are
//! spliced and never seen.
//!
//! ```text
//!   source ends         → the sink's writing half is shut, the thread ends
//!   sink's reader gone  → the source is shut, so that its writer learns it
//!   Pump dropped        → the thread ends
//! ```

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    thread::JoinHandle,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, SpliceFFlags, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        socket::{MsgFlags, Shutdown, send, shutdown},
        stat::{SFlag, fstat, major, minor},
    },
    unistd::{isatty, read, write},
};
use tokio::sync::watch;

use crate::sandbox::Signs;

const BUFFER: usize = 32 * 1024;
const SPLICE: usize = 1 << 20;
const STACK: usize = 64 * 1024 + BUFFER;

/// How long a sink is left alone that takes nothing though it has room: a terminal with less than
/// one character needs, or one that another is writing to. In milliseconds.
const PAUSE: u16 = 10;

/// The numbers of /dev/ptmx (Documentation/admin-guide/devices.txt).
const PTMX: (u64, u64) = (5, 2);

/// A stream under way. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Pump {
    thread: Option<JoinHandle<()>>,
    stop: EventFd,
    ended: watch::Receiver<()>,
}

impl Pump {
    /// Carries the bytes of `source` to `sink`, beginning now.
    pub(super) fn start(name: &str, source: OwnedFd, sink: OwnedFd) -> io::Result<Self> {
        // Heard by nobody.
        Self::start_heard(name, source, sink, Signs::default())
    }

    /// As [`Pump::start`], of what the guest says, which is noted.
    pub(super) fn start_heard(
        name: &str,
        source: OwnedFd,
        sink: OwnedFd,
        heard: Signs,
    ) -> io::Result<Self> {
        let source = unblocked(source, OpenOptions::new().read(true));
        let sink = unblocked(sink, OpenOptions::new().write(true));
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let stopped = stop.as_fd().try_clone_to_owned()?;
        let (ending, ended) = watch::channel(());
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let _ending = ending;
                Ends {
                    source: source.as_fd(),
                    sink: sink.as_fd(),
                    stop: stopped.as_fd(),
                    heard,
                }
                .run();
            })?;
        Ok(Self {
            thread: Some(thread),
            stop,
            ended,
        })
    }

    /// Waits for the end of the stream.
    pub(super) async fn ended(&self) {
        // Nothing is ever sent: the error is the sender's end, with the thread.
        let _ = self.ended.clone().changed().await;
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Ends<'a> {
    source: BorrowedFd<'a>,
    sink: BorrowedFd<'a>,
    stop: BorrowedFd<'a>,
    heard: Signs,
}

/// Why no more bytes are carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Sink,
    Stopped,
}

impl Ends<'_> {
    fn run(&self) {
        let end = match is_pipe(self.source) || is_pipe(self.sink) {
            true => self.splice(),
            false => self.copy(),
        };
        match end {
            // Those that are no sockets end when they are closed.
            End::Source => {
                let _ = shutdown(self.sink.as_raw_fd(), Shutdown::Write);
            }
            End::Sink => {
                let _ = shutdown(self.source.as_raw_fd(), Shutdown::Both);
            }
            End::Stopped => {}
        }
    }

    fn splice(&self) -> End {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        loop {
            if let Err(end) = self.readable().and_then(|()| self.writable()) {
                return end;
            }
            match splice(self.source, None, self.sink, None, SPLICE, flags) {
                Ok(0) => return End::Source,
                Ok(_) => self.heard.heard(),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                // Files opened for appending, and some devices, cannot be spliced.
                Err(Errno::EINVAL) => return self.copy(),
                Err(Errno::EPIPE) => return End::Sink,
                Err(errno) => return self.broken(errno),
            }
        }
    }

    fn copy(&self) -> End {
        let mut buffer = [0; BUFFER];
        let is_socket = is_a(self.sink, SFlag::S_IFSOCK);
        loop {
            if let Err(end) = self.readable() {
                return end;
            }
            match read(self.source, &mut buffer) {
                // A terminal whose other side is closed.
                Ok(0) | Err(Errno::EIO) => return End::Source,
                Ok(count) => {
                    self.heard.heard();
                    if let Err(end) = self.write_all(&buffer[..count], is_socket) {
                        return end;
                    }
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return self.broken(errno),
            }
        }
    }

    fn write_all(&self, mut bytes: &[u8], is_socket: bool) -> Result<(), End> {
        while !bytes.is_empty() {
            self.writable()?;
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let written = match is_socket {
                true => send(self.sink.as_raw_fd(), bytes, flags),
                false => write(self.sink, bytes),
            };
            match written {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::EAGAIN) => self.pause()?,
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::EIO) => return Err(End::Sink),
                Err(errno) => return Err(self.broken(errno)),
            }
        }
        Ok(())
    }

    /// Waits for bytes, or the end, of the source.
    fn readable(&self) -> Result<(), End> {
        let [source, sink] = self.poll(PollFlags::POLLIN, PollFlags::empty())?;
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        if sink.intersects(gone) && !source.intersects(PollFlags::POLLIN) {
            return Err(End::Sink);
        }
        Ok(())
    }

    /// Waits for room in the sink.
    fn writable(&self) -> Result<(), End> {
        self.poll(PollFlags::empty(), PollFlags::POLLOUT)
            .map(|_| ())
    }

    /// Waits for a moment.
    fn pause(&self) -> Result<(), End> {
        let mut stop = [PollFd::new(self.stop, PollFlags::POLLIN)];
        match poll(&mut stop, PAUSE) {
            Ok(0) | Err(_) => Ok(()),
            Ok(_) => Err(End::Stopped),
        }
    }

    /// Waits until what is asked of either holds, or something is over.
    fn poll(&self, source: PollFlags, sink: PollFlags) -> Result<[PollFlags; 2], End> {
        loop {
            let mut fds = [
                PollFd::new(self.stop, PollFlags::POLLIN),
                PollFd::new(self.source, source),
                PollFd::new(self.sink, sink),
            ];
            // A source that has hung up may still have bytes: it must not wake the wait for room.
            let watched = if source.is_empty() {
                fds.swap(1, 2);
                &mut fds[..2]
            } else {
                &mut fds[..]
            };
            match poll(watched, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(self.broken(errno)),
            }
            let seen = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            if !seen[0].is_empty() {
                return Err(End::Stopped);
            }
            return Ok([seen[1], seen[2]]);
        }
    }

    fn broken(&self, errno: Errno) -> End {
        match errno {
            Errno::ECONNRESET => End::Source,
            _ => {
                tracing::warn!(%errno, "a standard stream broke");
                End::Sink
            }
        }
    }
}

fn is_pipe(fd: BorrowedFd<'_>) -> bool {
    is_a(fd, SFlag::S_IFIFO)
}

fn is_a(fd: BorrowedFd<'_>, kind: SFlag) -> bool {
    fstat(fd).is_ok_and(|status| status.st_mode & SFlag::S_IFMT.bits() == kind.bits())
}

/// A terminal by a description of our own that does not block; whatever else there is as it is.
fn unblocked(fd: OwnedFd, options: &mut OpenOptions) -> OwnedFd {
    // The master's side would be opened as another one.
    let numbers = |device| (major(device), minor(device));
    let is_master = fstat(&fd).is_ok_and(|status| numbers(status.st_rdev) == PTMX);
    if !isatty(&fd).unwrap_or(false) || is_master {
        return fd;
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    match options.custom_flags(flags).open(path) {
        Ok(own) => own.into(),
        Err(error) => {
            tracing::debug!(%error, "a terminal is shared with others");
            fd
        }
    }
}

#[cfg(test)]
mod tests;
