//! What the agent and a process that is being made say to each other: one
//! message a packet, the first byte its kind.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// What kind of failure a child reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// There is no such program.
    ProgramMissing = 0,
    /// There is, but it cannot be run.
    ProgramRefused = 1,
    /// Anything else.
    Other = 2,
}

/// What a child says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// A process was made in its place: its id, and its descriptor along with it.
    Born(u32),
    /// It waits for its start.
    Ready,
    /// It calls execve, at this many nanoseconds since boot.
    Executing(u64),
    /// It could not, and ends.
    Failed(FailureKind, String),
}

impl Message {
    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Born(pid) => [&[b'b'][..], &pid.to_le_bytes()].concat(),
            Self::Ready => vec![b'r'],
            Self::Executing(ns) => [&[b'x'][..], &ns.to_le_bytes()].concat(),
            Self::Failed(kind, text) => [&[b'f', *kind as u8], text.as_bytes()].concat(),
        }
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [b'b', pid @ ..] => Some(Self::Born(u32::from_le_bytes(pid.try_into().ok()?))),
            [b'r'] => Some(Self::Ready),
            [b'x', ns @ ..] => Some(Self::Executing(u64::from_le_bytes(ns.try_into().ok()?))),
            [b'f', kind, text @ ..] => {
                let kind = match kind {
                    0 => FailureKind::ProgramMissing,
                    1 => FailureKind::ProgramRefused,
                    _ => FailureKind::Other,
                };
                Some(Self::Failed(
                    kind,
                    String::from_utf8_lossy(text).into_owned(),
                ))
            }
            _ => None,
        }
    }
}

/// The longest message.
const MAX: usize = 4096;

/// A pair of sockets: the agent's, which does not wait, and the child's, which does.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (agent, child) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    nix::fcntl::fcntl(
        &agent,
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
    )?;
    Ok((agent, child))
}

/// The agent's side.
#[derive(Debug)]
pub(crate) struct Control(AsyncFd<OwnedFd>);

impl Control {
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        sys::watch(socket, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// The child's next message, with the descriptor it sends along; nothing when its side of
    /// the socket is closed, by execve or by its end.
    pub(crate) async fn receive(&self) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
        let mut buffer = [0; MAX];
        let (length, fd) = self
            .0
            .async_io(Interest::READABLE, |socket| {
                sys::receive(socket.as_fd(), &mut buffer)
            })
            .await?;
        if length == 0 {
            return Ok(None);
        }
        let message = Message::from_bytes(&buffer[..length])
            .ok_or_else(|| io::Error::other("a process being made sent an unknown message"))?;
        Ok(Some((message, fd)))
    }

    /// Waits for the process that the child makes in its place, before anything else is done: so
    /// nobody can have collected its end.
    pub(super) fn born(&self) -> io::Result<(i32, OwnedFd)> {
        let socket = self.0.get_ref().as_fd();
        let mut buffer = [0; MAX];
        let readable = PollFd::new(socket, PollFlags::POLLIN);
        while poll(&mut [readable.clone()], PollTimeout::NONE) == Err(Errno::EINTR) {}
        let (length, fd) = sys::receive(socket, &mut buffer)?;
        match (Message::from_bytes(&buffer[..length]), fd) {
            (Some(Message::Born(pid)), Some(fd)) => Ok((pid as i32, fd)),
            (Some(Message::Failed(_, text)), _) => Err(io::Error::other(text)),
            _ => Err(io::Error::other("it ended before")),
        }
    }

    /// Lets the child go on.
    pub(crate) fn go(&self) -> io::Result<()> {
        nix::unistd::write(self.0.get_ref(), b"g")?;
        Ok(())
    }
}

/// The child's side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Report<'a>(pub(super) BorrowedFd<'a>);

impl Report<'_> {
    /// Says `message`, and hands `fd` over with it.
    pub(super) fn send(self, message: &Message, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut bytes = message.to_bytes();
        bytes.truncate(MAX);
        let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }

    /// Waits for [`Control::go`]; false when the agent gave the process up.
    pub(super) fn wait(self) -> io::Result<bool> {
        let mut byte = [0];
        loop {
            match nix::unistd::read(self.0, &mut byte) {
                Err(Errno::EINTR) => {}
                answer => return Ok(answer? == 1),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_survive_the_socket() {
        for message in [
            Message::Born(7),
            Message::Ready,
            Message::Executing(u64::MAX - 1),
            Message::Failed(FailureKind::ProgramRefused, "permission denied".into()),
        ] {
            assert_eq!(Message::from_bytes(&message.to_bytes()), Some(message));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = Message::from_bytes(&bytes);
        }
    }
}
