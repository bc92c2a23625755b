//! virtio-fs (virtio 1.2, section 5.11): a directory of the host, by FUSE
//! messages in the queues.
//!
//! Three parts, in the order in which a message passes through them:
//! [`request`] takes the guest's bytes apart as far as must be known before
//! anything is done; the FUSE server of `fuse-backend-rs` decodes the rest;
//! [`share`] does it to the directory.

use std::{
    io::{self, Read, Write},
    os::fd::OwnedFd,
    sync::Arc,
};

use fuse_backend_rs::{
    api::server::Server,
    transport::{Reader, VirtioFsWriter, Writer},
};
use virtio_queue::DescriptorChain;
use vm_memory::Bytes;

use super::{Active, Error, Kind, Memory, VirtioDevice};

pub mod request;
mod share;

use request::{HEADER_BYTES, Lengths, Message, REPLY_BYTES};
use share::Share;

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

/// The virtio-fs device.
pub struct Fs {
    tag: [u8; MAX_TAG_BYTES],
    share: Arc<Share>,
    server: Server<Arc<Share>>,
}

impl Fs {
    /// Opens what the device needs beside the directory itself. Must be called while `/proc`
    /// is mounted; the device then works without any mount of its own and by descriptors alone.
    ///
    /// Raises the process's soft limit of open files to its hard limit: every file that the
    /// guest's kernel remembers is an open descriptor here.
    ///
    /// # Errors
    /// When the tag does not fit, `directory` is not a directory, or `/proc` is missing.
    pub fn prepare(directory: OwnedFd, settings: Settings) -> Result<Self, PrepareError> {
        let Settings { tag, read_only } = settings;
        if tag.is_empty() || tag.len() > MAX_TAG_BYTES || tag.contains('\0') {
            return Err(PrepareError::Tag(tag));
        }
        let mut padded = [0; MAX_TAG_BYTES];
        padded[..tag.len()].copy_from_slice(tag.as_bytes());
        let share =
            Share::open(directory, read_only).map_err(|share::OpenError { step, source }| {
                PrepareError::Directory { tag, step, source }
            })?;
        let share = Arc::new(share);
        Ok(Self {
            tag: padded,
            server: Server::new(Arc::clone(&share)),
            share,
        })
    }

    /// Answers one message.
    fn answer(&self, chain: &DescriptorChain<&Memory>) -> Done {
        let memory = chain.memory();
        let (Ok(reader), Ok(writer)) = (
            Reader::from_descriptor_chain(memory, chain.clone()),
            VirtioFsWriter::new(memory, chain.clone()),
        ) else {
            return Done::refused(chain, peek_unique(chain), libc::EFAULT);
        };
        let lengths = Lengths {
            readable: reader.available_bytes(),
            writable: writer.available_bytes(),
        };
        let mut header = [0; HEADER_BYTES];
        let header = match reader.clone().read_exact(&mut header) {
            Ok(()) => &header[..],
            Err(_) => &[],
        };
        let message = match request::parse(header, lengths) {
            Ok(message) => message,
            Err(refusal) => return Done::refused(chain, refusal.unique, refusal.errno),
        };
        let served = self
            .server
            .handle_message(reader, Writer::VirtioFs(writer), None, None);
        match (served, message) {
            // The server answers DESTROY and says that it did not.
            (Ok(0), Message::Answered { .. }) => Done {
                read: lengths.readable as u64,
                written: REPLY_BYTES as u32,
            },
            (Ok(written), _) => Done {
                read: lengths.readable as u64,
                written: u32::try_from(written).unwrap_or(0),
            },
            (Err(_), Message::Silent) => Done::default(),
            (Err(_), Message::Answered { unique }) => {
                Done::refused(chain, Some(unique), libc::EINVAL)
            }
        }
    }
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
    fn refused(chain: &DescriptorChain<&Memory>, unique: Option<u64>, errno: i32) -> Self {
        let reply = |unique| {
            let mut writer = VirtioFsWriter::new(chain.memory(), chain.clone()).ok()?;
            writer.write_all(&request::error_reply(unique, errno)).ok()
        };
        match unique.and_then(reply) {
            Some(()) => Self {
                read: 0,
                written: REPLY_BYTES as u32,
            },
            None => Self::default(),
        }
    }
}

/// The message's number, of a chain whose other descriptors cannot be read.
fn peek_unique(chain: &DescriptorChain<&Memory>) -> Option<u64> {
    let first = chain.clone().readable().next()?;
    let mut header = [0; HEADER_BYTES];
    if (first.len() as usize) < header.len() {
        return None;
    }
    chain.memory().read_slice(&mut header, first.addr()).ok()?;
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

    fn activate(&mut self, _active: &mut Active) -> Result<(), Error> {
        self.share.enter_thread().map_err(|source| Error::Host {
            what: "give the thread of the shared directory a working directory of its own",
            source,
        })
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
            let done = self.answer(&chain);
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
