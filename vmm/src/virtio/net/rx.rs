//! Packets for the guest.
//!
//! A packet may be as long as 64 KiB and its length is known only when it has
//! been read. So the guest's buffers are laid out behind one another until the
//! longest packet fits, the packet is read into them, and those that it needed
//! are given back; the others wait for the next one. Only when the driver
//! offers less than that is a packet read into memory of ours and copied.

use std::{collections::VecDeque, io, time::Instant};

use vm_memory::GuestMemory;

use super::{
    header::{HEADER_BYTES, MAX_PACKET, NUM_BUFFERS},
    limiter::Limiter,
    sys::Pieces,
    tap::{self, Tap},
};
use crate::{
    counters::DeviceCounters,
    virtio::{ActiveQueue, Error, Memory, slices::MAX_DESCRIPTORS},
};

/// After so many packets the other queues have their turn.
const BATCH: usize = 64;

/// The receive queue of a pair at work.
pub(super) struct Rx {
    pieces: Pieces,
    /// The buffers that the pieces belong to, in their order.
    buffers: VecDeque<Buffer>,
    /// How long they are together.
    room: usize,
    /// Whether the next buffer has too many pieces to be laid out behind these.
    crowded: bool,
    /// Whether a packet may take more than one buffer.
    mergeable: bool,
    /// Room for a packet that the guest has no room for.
    spare: Box<[u8]>,
    /// The length of the packet that waits there.
    kept: Option<usize>,
    /// What is given back for one packet.
    used: Vec<(u16, u32)>,
}

/// A buffer of the guest.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    head: u16,
    pieces: usize,
    len: usize,
}

/// Why there are no more packets for now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// The tap has none, or others should have their turn.
    All,
    /// The guest has no buffer; it will kick when it has.
    NoBuffer,
    /// The limit is reached for so long.
    Limited(std::time::Duration),
    /// The interface is gone.
    Gone,
}

/// What packets pass through on their way to the guest.
pub(super) struct Way<'a> {
    pub(super) tap: &'a Tap,
    pub(super) queue: &'a mut ActiveQueue,
    pub(super) memory: &'a Memory,
    pub(super) counters: &'a DeviceCounters,
    pub(super) limiter: &'a mut Option<Limiter>,
}

impl Rx {
    pub(super) fn new(memory: Memory, mergeable: bool) -> Self {
        Self {
            pieces: Pieces::new(memory),
            buffers: VecDeque::new(),
            room: 0,
            crowded: false,
            mergeable,
            spare: vec![0; MAX_PACKET].into_boxed_slice(),
            kept: None,
            used: Vec::new(),
        }
    }

    /// Gives the guest what the tap has, and tells how many packets that was.
    pub(super) fn receive(&mut self, mut way: Way<'_>) -> Result<(usize, Received), Error> {
        if !way.queue.ready() {
            return Ok((0, Received::NoBuffer));
        }
        let mut given = 0;
        let end = loop {
            if given == BATCH {
                break Received::All;
            }
            if let Some(limiter) = way.limiter
                && let Err(wait) = limiter.admit(Instant::now())
            {
                break Received::Limited(wait);
            }
            match self.one(&mut way)? {
                One::Given(len) => {
                    if let Some(limiter) = way.limiter {
                        limiter.spend(len);
                    }
                    given += 1;
                    // The guest can begin while we look for more.
                    if given == 1 {
                        way.queue.signal(way.memory)?;
                    }
                }
                One::Dropped => way.counters.dropped.add(1),
                One::End(end) => break end,
            }
        };
        if given > 1 {
            way.queue.signal(way.memory)?;
        }
        Ok((given, end))
    }

    /// Gives the guest one packet.
    fn one(&mut self, way: &mut Way<'_>) -> Result<One, Error> {
        self.prepare(way)?;
        if self.kept.is_none() {
            if self.buffers.is_empty() {
                return Ok(One::End(Received::NoBuffer));
            }
            let direct = self.mergeable && self.room >= MAX_PACKET;
            let read = match direct {
                true => self.pieces.read_from(way.tap.file()),
                false => way.tap.read(&mut self.spare),
            };
            match read {
                // A packet without a header is none, and at its end a socket has none.
                Ok(0..HEADER_BYTES) => return Ok(One::End(Received::Gone)),
                Ok(len) if direct => return self.give(way, len),
                Ok(len) => self.kept = Some(len),
                Err(error) if tap::is_gone(&error) => return Ok(One::End(Received::Gone)),
                Err(error) => {
                    return match error.kind() {
                        io::ErrorKind::Interrupted => Ok(One::Dropped),
                        _ => Ok(One::End(Received::All)),
                    };
                }
            }
        }
        self.deliver(way)
    }

    /// Copies the packet that was kept to the guest, if there is room.
    fn deliver(&mut self, way: &mut Way<'_>) -> Result<One, Error> {
        let Some(len) = self.kept else {
            return Ok(One::End(Received::All));
        };
        let first = self.buffers.front().map_or(0, |buffer| buffer.len);
        let room = if self.mergeable { self.room } else { first };
        if room >= len {
            self.kept = None;
            self.pieces.copy_in(0, &self.spare[..len]);
            return self.give(way, len);
        }
        // A driver that has no more to offer than this will never have room.
        let all = self.buffers.len() >= usize::from(way.queue.size()) || self.crowded;
        if all || !self.mergeable && first > 0 {
            self.kept = None;
            return Ok(One::Dropped);
        }
        Ok(One::End(Received::NoBuffer))
    }

    /// Gives back the buffers that hold a packet of `len` bytes.
    fn give(&mut self, way: &mut Way<'_>, len: usize) -> Result<One, Error> {
        self.used.clear();
        self.crowded = false;
        let mut left = len;
        let mut pieces = 0;
        while left > 0 {
            let Some(buffer) = self.buffers.pop_front() else {
                break;
            };
            let here = left.min(buffer.len);
            // A packet has less than 4 GiB.
            self.used.push((buffer.head, here as u32));
            left -= here;
            pieces += buffer.pieces;
            self.room -= buffer.len;
        }
        let count = if self.mergeable { self.used.len() } else { 1 };
        self.pieces
            .copy_in(NUM_BUFFERS, &(count as u16).to_le_bytes());
        self.pieces.drop_front(pieces);
        way.counters.bytes_to_guest.add((len - HEADER_BYTES) as u64);
        way.queue.push_all(way.memory, &self.used)?;
        Ok(One::Given(len))
    }

    /// Takes buffers until the longest packet fits, or there are no more.
    fn prepare(&mut self, way: &mut Way<'_>) -> Result<(), Error> {
        while self.room < MAX_PACKET && !self.crowded {
            if !self.mergeable && !self.buffers.is_empty() {
                return Ok(());
            }
            if !self.take(way)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes a buffer. When there is none, the driver is asked to say when there is.
    fn take(&mut self, way: &mut Way<'_>) -> Result<bool, Error> {
        let queue = way.queue.index();
        let bad = |what| Error::BadRequest { queue, what };
        let chain = match way.queue.pop(way.memory)? {
            None if way.queue.resume_kicks(way.memory)? => way.queue.pop(way.memory)?,
            chain => chain,
        };
        let Some(chain) = chain else {
            return Ok(false);
        };
        let mut buffer = Buffer {
            head: chain.head_index(),
            pieces: 0,
            len: 0,
        };
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(bad("a receive buffer has too many descriptors"));
            }
            if !descriptor.is_write_only() {
                return Err(bad("a receive buffer cannot be written"));
            }
            let len = descriptor.len() as usize;
            if !way.memory.check_range(descriptor.addr(), len) {
                return Err(bad("a receive buffer lies outside of memory"));
            }
            match self.pieces.add(descriptor.addr(), len) {
                Ok(pieces) => {
                    buffer.pieces += pieces;
                    buffer.len += len;
                }
                // There are too many pieces in front of it: it waits for its turn.
                Err(_) if !self.buffers.is_empty() => {
                    self.pieces
                        .drop_back(self.pieces.count() - self.pieces_of_buffers());
                    way.queue.unpop();
                    self.crowded = true;
                    return Ok(false);
                }
                Err(_) => return Err(bad("a receive buffer has too many pieces")),
            }
        }
        if buffer.len < HEADER_BYTES {
            return Err(bad("a receive buffer has no room for a header"));
        }
        self.room += buffer.len;
        self.buffers.push_back(buffer);
        Ok(true)
    }

    fn pieces_of_buffers(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.pieces).sum()
    }
}

/// What became of one packet.
enum One {
    Given(usize),
    Dropped,
    End(Received),
}
