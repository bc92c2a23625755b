//! Announcements of the kernel: that something changed, not what. Who hears one reads anew what it
//! needs, so none is missed when some are lost, and none is kept.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv,
        setsockopt, socket, sockopt,
    },
};

use crate::message::HEADER;

/// `RTMGRP_*` of linux/rtnetlink.h: links, and addresses and routes of both protocols.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;

/// What the kernel keeps of those that are not read yet, in bytes. Whatever is beyond is told as
/// one announcement more.
const KEPT: usize = 16 << 10;

/// The most that are read at a time.
const MOST: usize = 256;

/// A socket for announcements of changes of interfaces, addresses and routes of the calling thread's
/// network namespace, which it holds.
///
/// # Errors
/// When the kernel refuses.
pub fn listen() -> io::Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkRoute,
    )?;
    setsockopt(&fd, sockopt::RcvBuf, &KEPT)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    Ok(fd)
}

/// What was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Nothing.
    Nothing,
    /// Something, and nothing more is there.
    All,
    /// Something, and there may be more.
    Some,
}

impl Heard {
    /// Takes what was announced to a socket of [`listen`]. Does not wait.
    ///
    /// # Errors
    /// The kernel's.
    pub fn take(socket: BorrowedFd<'_>) -> io::Result<Self> {
        for count in 0..MOST {
            // The rest of a message is cut off.
            match recv(socket.as_raw_fd(), &mut [0; HEADER], MsgFlags::empty()) {
                // Some were lost, which is as good as one of them.
                Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
                Err(Errno::EAGAIN) if count == 0 => return Ok(Self::Nothing),
                Err(Errno::EAGAIN) => return Ok(Self::All),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self::Some)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn where_nothing_changes_nothing_is_heard() {
        let socket = listen().unwrap();
        // Whatever happens in the namespace of the tests meanwhile comes to an end.
        let quiet = (0..100).any(|_| Heard::take(socket.as_fd()).unwrap() == Heard::Nothing);
        assert!(quiet);
    }
}
