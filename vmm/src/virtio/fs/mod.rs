//! virtio-fs (virtio 1.2, section 5.11): a directory of the host, by FUSE
//! messages in the queues.
//!
//! A message passes through four parts: [`request`] checks its head and the
//! limits, [`operation`] makes the rest a value, [`share`] does that to the
//! directory, [`reply`] is how the outcome is said.

use std::{io, os::fd::OwnedFd};

use nix::{
    sched::{CpuSet, sched_getaffinity},
    unistd::Pid,
};
use vm_memory::{Bytes, GuestMemory, GuestMemoryRegion};

use super::{
    Active, Chain, Error, Events, Kind, Memory, VirtioDevice,
    slices::{Sides, Slices},
};

pub mod operation;
pub mod reply;
pub mod request;
mod share;

use operation::{WRITE_BYTES, decode};
use reply::Reply;
use request::{HEADER_BYTES, Lengths, REPLY_BYTES, opcode};
use share::{Answer, Data, Share};

/// The longest tag, in bytes (virtio 1.2, section 5.11.4).
pub const MAX_TAG_BYTES: usize = 36;

/// The queue for messages that may overtake others, and the queue for the rest.
/// 512 leaves room for the 256 pages of the largest read or write.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// How a directory is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The name by which the guest mounts it, 1 to 36 bytes.
    pub tag: String,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// Where the process finds what of itself it serves a directory with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnFiles {
    /// A directory of its open files by their numbers.
    pub descriptors: &'static str,
    /// The list of mounts that it sees.
    pub mounts: &'static str,
}

impl OwnFiles {
    /// Outside of the jail.
    pub const IN_PROC: Self = Self {
        descriptors: "/proc/self/fd",
        mounts: "/proc/thread-self/mountinfo",
    };
}

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The tag does not fit.
    #[error("tag {0:?} of the shared directory must have 1 to 36 bytes and none of them zero")]
    Tag(String),
    /// The descriptor is not a directory, or the process may not use it.
    #[error("cannot share the directory under tag {tag:?}: {step}")]
    Directory {
        /// The share's tag.
        tag: String,
        /// What was being tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The most that a message other than a write may have behind its head: the longest value of an
/// extended attribute with its name.
const MAX_BODY_BYTES: usize = (64 << 10) + 4096;

/// The list of mounts among the device's own descriptors.
const MOUNTS_TOKEN: u64 = 0;

/// The virtio-fs device.
pub struct Fs {
    tag: [u8; MAX_TAG_BYTES],
    share: Share,
    /// How many messages must have come together for it to be worth to wait for more.
    worth_waiting: u16,
    /// Of the message that is being answered.
    body: Vec<u8>,
    reply: Reply,
}

impl Fs {
    /// Opens what the device needs beside the directory itself; it then works by descriptors
    /// alone.
    ///
    /// Raises the process's soft limit of open files to its hard limit: every file that the
    /// guest has open is an open descriptor here.
    ///
    /// # Errors
    /// When the tag does not fit, `directory` is not a directory, or the process does not find its
    /// own files.
    pub fn prepare(
        directory: OwnedFd,
        settings: Settings,
        own: OwnFiles,
    ) -> Result<Self, PrepareError> {
        let Settings { tag, read_only } = settings;
        if tag.is_empty() || tag.len() > MAX_TAG_BYTES || tag.contains('\0') {
            return Err(PrepareError::Tag(tag));
        }
        let mut padded = [0; MAX_TAG_BYTES];
        padded[..tag.len()].copy_from_slice(tag.as_bytes());
        let share = Share::open(directory, read_only, own).map_err(|error| {
            let share::OpenError { step, source } = error;
            PrepareError::Directory { tag, step, source }
        })?;
        Ok(Self {
            tag: padded,
            share,
            // Where the guest must stop before its next message is seen, it kicks for less, if it
            // asks for one thing after the other.
            worth_waiting: if has_one_processor() { 2 } else { 1 },
            body: Vec::new(),
            reply: Reply::default(),
        })
    }

    /// Answers one message.
    fn answer<'m>(&mut self, queue: usize, memory: &'m Memory, chain: &Chain<'m>) -> Done {
        let sides = Sides::of(queue, memory, chain.clone());
        let Ok(writable) = sides.writable else {
            return Done::default();
        };
        let Ok(mut readable) = sides.readable else {
            return Done::refused(&writable, peek_unique(memory, chain), libc::EFAULT);
        };
        let lengths = Lengths {
            readable: readable.len(),
            writable: writable.len(),
        };
        let mut header = [0; HEADER_BYTES];
        let count = readable.read(&mut header);
        let message = match request::parse(&header[..count], lengths) {
            Ok(message) => message,
            Err(refusal) => return Done::refused(&writable, refusal.unique, refusal.errno),
        };
        let refuse = |errno| Done::refused(&writable, message.unique, errno);

        readable.skip(HEADER_BYTES);
        let body = match message.opcode {
            opcode::WRITE => message.body.min(WRITE_BYTES),
            _ => message.body,
        };
        if body > MAX_BODY_BYTES {
            return refuse(libc::E2BIG);
        }
        self.body.resize(body, 0);
        readable.read(&mut self.body);
        readable.skip(body);
        let operation = match decode(message.opcode, &self.body) {
            Ok(operation) => operation,
            Err(errno) => return refuse(errno),
        };

        let mut data = Data {
            from_guest: readable,
            to_guest: writable.clone(),
        };
        self.reply.begin();
        let served = self
            .share
            .serve(&message, &operation, &mut data, &mut self.reply);
        let Some(unique) = message.unique else {
            return Done::default();
        };
        let written = match served {
            Err(error) => return refuse(error.raw_os_error().unwrap_or(libc::EIO)),
            Ok(Answer::Placed(len)) => {
                writable.write(&request::reply_header(unique, 0, REPLY_BYTES + len));
                REPLY_BYTES + len
            }
            Ok(Answer::Said) => {
                let reply = self.reply.finish(unique);
                if reply.len() > writable.len() {
                    return refuse(libc::EINVAL);
                }
                writable.write(reply)
            }
        };
        Done {
            read: lengths.readable as u64,
            written: written as u32,
        }
    }
}

/// Whether the process may use but one processor.
fn has_one_processor() -> bool {
    sched_getaffinity(Pid::from_raw(0)).is_ok_and(|mine| {
        let may = |processor: &usize| mine.is_set(*processor).unwrap_or(false);
        (0..CpuSet::count()).filter(may).count() == 1
    })
}

/// What became of a chain: bytes that the device took and bytes that it gave.
#[derive(Default)]
struct Done {
    read: u64,
    written: u32,
}

impl Done {
    /// Writes a reply that has nothing but an error; none when there is no room for it or the
    /// message has no number to be answered under.
    fn refused(writable: &Slices<'_>, unique: Option<u64>, errno: i32) -> Self {
        match unique {
            Some(unique) if writable.len() >= REPLY_BYTES => Self {
                read: 0,
                written: writable.write(&request::error_reply(unique, errno)) as u32,
            },
            _ => Self::default(),
        }
    }
}

/// The message's number, of a chain whose other descriptors cannot be read.
fn peek_unique(memory: &Memory, chain: &Chain<'_>) -> Option<u64> {
    let first = chain.clone().find(|it| !it.is_write_only())?;
    let mut header = [0; HEADER_BYTES];
    if (first.len() as usize) < header.len() {
        return None;
    }
    memory.read_slice(&mut header, first.addr()).ok()?;
    request::unique(&header)
}

impl VirtioDevice for Fs {
    fn kind(&self) -> Kind {
        Kind::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn config_space(&self) -> Vec<u8> {
        let mut config = self.tag.to_vec();
        let request_queues = QUEUE_SIZES.len() as u32 - 1;
        config.extend_from_slice(&request_queues.to_le_bytes());
        config
    }

    fn activate(&mut self, active: &mut Active) -> Result<(), Error> {
        self.share.enter_thread().map_err(|source| Error::Host {
            what: "give the thread of the shared directory a working directory of its own",
            source,
        })?;
        self.share
            .fit(active.memory.iter().map(GuestMemoryRegion::len).sum());
        let watched = active
            .sources
            .add(&self.share, Events::PRIORITY, MOUNTS_TOKEN);
        watched.map_err(|source| Error::Host {
            what: "watch for mounts below the shared directory",
            source,
        })
    }

    fn handle_source(
        &mut self,
        _token: u64,
        _events: Events,
        _active: &mut Active,
    ) -> Result<(), Error> {
        self.share.mounts_changed().map_err(|source| Error::Host {
            what: "look at the mounts below the shared directory",
            source,
        })
    }

    fn awaits_more(&self, _index: usize, together: u16) -> bool {
        together >= self.worth_waiting
    }

    fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        let Active {
            memory,
            queues,
            counters,
            ..
        } = active;
        let queue = &mut queues[index];
        while let Some(chain) = queue.pop(memory)? {
            let done = self.answer(index, memory, &chain);
            counters.bytes_from_guest.add(done.read);
            counters.bytes_to_guest.add(u64::from(done.written));
            queue.push(memory, chain.head_index(), done.written)?;
        }
        queue.signal(memory)
    }

    fn reset(&mut self) {
        self.share.forget_all();
    }
}

#[cfg(test)]
mod tests;
