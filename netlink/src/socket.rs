//! The socket: one question, one answer.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

use crate::message::{HEADER, Message, Received, messages, u32_at};

/// `NLM_F_*` of linux/netlink.h.
pub(crate) const REQUEST: u16 = 0x01;
const ACK: u16 = 0x04;
const DUMP_INTERRUPTED: u16 = 0x10;
const DUMP: u16 = 0x300;
pub(crate) const REPLACE: u16 = 0x100;
pub(crate) const EXCLUSIVE: u16 = 0x200;
pub(crate) const CREATE: u16 = 0x400;

/// `NLMSG_ERROR`, `NLMSG_DONE`
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// The kernel fills no more in one go.
const BUFFER: usize = 64 << 10;

/// A list that changes while it is read is read again so often.
const TRIES: usize = 8;

/// A connection to the kernel's network settings.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    /// The number of the last question; locked while one is asked.
    sequence: Mutex<u32>,
}

impl Socket {
    /// Opens one for the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self {
            fd,
            sequence: Mutex::new(0),
        })
    }

    /// Asks for a change.
    pub(crate) fn change(
        &self,
        kind: u16,
        flags: u16,
        body: impl FnOnce(Message) -> Message,
    ) -> io::Result<()> {
        let message = body(Message::new(kind, REQUEST | ACK | flags));
        self.ask(message, |_| {}).map(drop)
    }

    /// Asks for a list.
    pub(crate) fn list<T>(
        &self,
        kind: u16,
        fixed: &[u8],
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..TRIES {
            let message = Message::new(kind, REQUEST | DUMP).fixed(fixed);
            let mut all = Vec::new();
            let whole = self.ask(message, |message| all.extend(read(message.body)))?;
            if whole {
                return Ok(all);
            }
        }
        Err(io::Error::other("the list changes all the time"))
    }

    /// Sends a question and reads up to the end of the answer; false when it changed meanwhile.
    fn ask(&self, message: Message, mut each: impl FnMut(Received<'_>)) -> io::Result<bool> {
        let mut sequence = self.sequence.lock().unwrap_or_else(PoisonError::into_inner);
        *sequence = sequence.wrapping_add(1);
        let bytes = message.finish(*sequence);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut whole = true;
        let mut buffer = vec![0; BUFFER];
        loop {
            let count = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => continue,
                count => count?,
            };
            if count < HEADER {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for message in messages(&buffer[..count]) {
                // the rest of an answer that nobody waited for
                if message.sequence != *sequence {
                    continue;
                }
                whole &= message.flags & DUMP_INTERRUPTED == 0;
                match message.kind {
                    DONE => return Ok(whole),
                    ERROR => {
                        let code = u32_at(message.body, 0).unwrap_or(0) as i32;
                        return match code {
                            0 => Ok(whole),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    _ => each(message),
                }
            }
        }
    }
}
