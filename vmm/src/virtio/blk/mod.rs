//! virtio-blk (virtio 1.2, section 5.2): a disk.
//!
//! [`request`] makes the guest's bytes into a value, [`disk`] is the file or
//! block device on the host, and here the one is done to the other.

use std::{fs::File, io, thread};

use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::{Active, ActiveQueue, Error, Events, Kind, Memory, VirtioDevice, worker::serve_queue};
use crate::counters::DeviceCounters;

mod chain;
pub mod disk;
pub mod request;
mod sys;

use chain::Chain;
use disk::Disk;
use request::{
    ID_BYTES, Limits, MAX_RANGE_SECTORS, MAX_RANGES, RANGE_BYTES, Request, SECTOR_BYTES, Status,
};
use sys::ring::{Operation, Ring};

/// The ring's among the device's own descriptors.
const RING_TOKEN: u64 = 0;

/// `VIRTIO_BLK_F_SEG_MAX`
const F_SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_RO`
const F_RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_BLK_SIZE`
const F_BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`
const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_TOPOLOGY`
const F_TOPOLOGY: u64 = 1 << 10;
/// `VIRTIO_BLK_F_DISCARD`
const F_DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`
const F_WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZE: u16 = 256;
/// Buffers in one request: all descriptors of a queue but header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The host's page, which is 8 sectors.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// The driver is told after so many bytes, also when there is more to do at once.
const UNTOLD_BYTES: u64 = 1 << 20;

/// How a disk appears to the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// What the guest reads as the disk's serial number; what is over 20 bytes is cut off.
    pub serial: String,
}

/// The virtio-blk device.
pub struct Blk {
    disk: Disk,
    limits: Limits,
    serial: [u8; ID_BYTES],
    /// For requests that come together; without it they are done one after the other.
    ring: Option<Ring<Ticket>>,
    /// The driver does not know how to flush, so every write is.
    write_through: bool,
}

impl Blk {
    /// A disk on an open file or block device.
    ///
    /// # Errors
    /// When the file cannot be a disk.
    pub fn new(file: File, settings: &Settings) -> Result<Self, disk::Error> {
        let disk = Disk::new(file, settings.read_only)?;
        let mut serial = [0; ID_BYTES];
        for (to, from) in serial.iter_mut().zip(settings.serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            limits: Limits {
                sectors: disk.bytes() / SECTOR_BYTES,
                read_only: settings.read_only,
            },
            disk,
            serial,
            ring: None,
            write_through: false,
        })
    }

    /// Lets requests that come together be done together, by io_uring. Makes system calls that
    /// the jail forbids later.
    ///
    /// Where the kernel has no io_uring, or it is switched off, requests are done one after the
    /// other; so are those of a disk that is in memory, which io_uring would give to threads.
    pub fn with_ring(mut self) -> Self {
        if self.disk.is_in_memory() {
            return self;
        }
        let ring = |file| Ring::new(file, QUEUE_SIZE);
        self.ring = self.disk.file().try_clone().and_then(ring).ok();
        self
    }

    /// Does a request here and now.
    fn perform(&self, request: &Request, data: &Chain<'_>) -> Result<(), Status> {
        match request {
            Request::Read { offset } => self.disk.read(&data.writable, *offset).map_err(io_error),
            Request::Write { offset } => {
                let written = self.disk.write(&data.readable, *offset);
                self.written(written)
            }
            Request::Flush if self.limits.read_only => Ok(()),
            Request::Flush => self.disk.flush().map_err(io_error),
            Request::GetId => {
                data.fill(&self.serial);
                Ok(())
            }
            Request::Discard => {
                for extent in self.ranges(request, data)? {
                    self.disk.discard(&extent).map_err(io_error)?;
                }
                Ok(())
            }
            Request::WriteZeroes => {
                for extent in self.ranges(request, data)? {
                    self.disk.write_zeroes(&extent).map_err(io_error)?;
                }
                Ok(())
            }
        }
    }

    fn written(&self, written: io::Result<()>) -> Result<(), Status> {
        written
            .and_then(|()| match self.write_through {
                true => self.disk.flush(),
                false => Ok(()),
            })
            .map_err(io_error)
    }

    fn ranges(&self, request: &Request, data: &Chain<'_>) -> Result<Vec<request::Extent>, Status> {
        let mut bytes = [0; MAX_RANGES * RANGE_BYTES + 1];
        let len = data.gather(&mut bytes);
        request::ranges(&bytes[..len], request, self.limits)
    }

    /// Takes everything from the queue that can be begun.
    ///
    /// A request that comes alone is done here and now, which takes the fewest steps. Of several,
    /// none waits for another: they go into the ring.
    fn pump(&mut self, active: &mut Active) -> Result<(), Error> {
        let mut queue = Queue::of(active);
        let mut next = self.pop(&mut queue)?;
        let mut alone = self.ring.as_ref().is_none_or(Ring::is_idle);
        let mut untold = 0;
        while let Some(job) = next {
            next = self.pop(&mut queue)?;
            alone &= next.is_none();
            let operation = job.operation().filter(|_| !alone);
            if let (Some(operation), Some(ring)) = (operation, &mut self.ring) {
                let prepared = ring.prepare(queue.memory, operation, job.buffers(), job.ticket);
                if let Err(ticket) = prepared {
                    queue.give_back(&ticket, Err(Status::IoError))?;
                }
            } else {
                let done = self.perform(&job.request, &job.chain);
                queue.give_back(&job.ticket, done)?;
                untold += job.ticket.taken + job.ticket.given;
                if untold >= UNTOLD_BYTES {
                    queue.ring.signal(queue.memory)?;
                    untold = 0;
                }
            }
        }
        if let Some(ring) = &mut self.ring {
            ring.submit().map_err(|source| Error::Host {
                what: "hand requests to io_uring",
                source,
            })?;
        }
        self.reap(&mut queue)?;
        queue.ring.signal(queue.memory)
    }

    /// The next request that can be begun; those that cannot be at all are answered.
    fn pop<'m>(&self, queue: &mut Queue<'m>) -> Result<Option<Job<'m>>, Error> {
        // One more than the ring holds would be taken and have nowhere to go.
        while self.ring.as_ref().is_none_or(|ring| ring.room() > 1) {
            let Some(chain) = queue.ring.pop(queue.memory)? else {
                break;
            };
            let head = chain.head_index();
            let mut chain = Chain::of(queue.memory, chain).ok_or(Error::BadRequest {
                queue: 0,
                what: "there is no byte for the status, or too many buffers",
            })?;
            let header = chain.take_header();
            let data = chain.data();
            let mut ticket = Ticket {
                head,
                status: chain.status,
                taken: data.readable,
                given: 0,
                writes: false,
            };
            match header.and_then(|header| request::parse(&header, data, self.limits)) {
                Ok(request) => {
                    ticket.given = match request {
                        Request::Read { .. } => data.writable,
                        Request::GetId => data.writable.min(ID_BYTES as u64),
                        _ => 0,
                    };
                    ticket.writes = matches!(request, Request::Write { .. });
                    return Ok(Some(Job {
                        chain,
                        request,
                        ticket,
                    }));
                }
                Err(status) => queue.give_back(&ticket, Err(status))?,
            }
        }
        Ok(None)
    }

    /// Gives back what the ring has done, and what it does meanwhile. The host often has several
    /// things done one right after the other, and each could be an interrupt of its own: as long as
    /// there is another one after the processor was offered to others, the driver is not told.
    fn reap_together(&mut self, queue: &mut Queue<'_>) -> Result<(), Error> {
        // Nothing is begun here, so that this ends after as many rounds as are under way.
        loop {
            let under_way = self.under_way();
            self.reap(queue)?;
            if self.under_way() == 0 || self.under_way() == under_way {
                return Ok(());
            }
            thread::yield_now();
        }
    }

    fn under_way(&self) -> usize {
        self.ring.as_ref().map_or(0, Ring::under_way)
    }

    /// Gives back what the ring has done.
    fn reap(&mut self, queue: &mut Queue<'_>) -> Result<(), Error> {
        while let Some((ticket, result)) = self.ring.as_mut().and_then(Ring::next) {
            let done = match ticket.writes {
                true => self.written(result),
                false => result.map_err(io_error),
            };
            queue.give_back(&ticket, done)?;
        }
        Ok(())
    }
}

/// A request and the chain that it came in.
struct Job<'m> {
    chain: Chain<'m>,
    request: Request,
    ticket: Ticket,
}

impl<'m> Job<'m> {
    /// What the ring is to do of it, if it is something for the ring.
    fn operation(&self) -> Option<Operation> {
        match self.request {
            Request::Read { offset } if !self.chain.writable.is_empty() => {
                Some(Operation::Read(offset))
            }
            Request::Write { offset } if !self.chain.readable.is_empty() => {
                Some(Operation::Write(offset))
            }
            _ => None,
        }
    }

    fn buffers(&self) -> &[VolatileSlice<'m>] {
        match self.request {
            Request::Read { .. } => &self.chain.writable,
            _ => &self.chain.readable,
        }
    }
}

/// What is needed to give a chain back.
#[derive(Debug, Clone, Copy)]
struct Ticket {
    head: u16,
    status: GuestAddress,
    /// Bytes that the device takes and gives, if all goes well.
    taken: u64,
    given: u64,
    writes: bool,
}

/// The device's one queue at work.
struct Queue<'a> {
    ring: &'a mut ActiveQueue,
    memory: &'a Memory,
    counters: &'a DeviceCounters,
}

impl<'a> Queue<'a> {
    fn of(active: &'a mut Active) -> Self {
        Self {
            ring: &mut active.queues[0],
            memory: &active.memory,
            counters: &active.counters,
        }
    }

    fn give_back(&mut self, ticket: &Ticket, done: Result<(), Status>) -> Result<(), Error> {
        let (status, taken, given) = match done {
            Ok(()) => (Status::Ok, ticket.taken, ticket.given),
            Err(status) => (status, 0, 0),
        };
        // It lay within memory when the chain was taken, and memory does not shrink.
        let _ = self.memory.write_slice(&[status as u8], ticket.status);
        // A chain of more than 2^32 bytes is cut off by the queue.
        let written = u32::try_from(given + 1).unwrap_or(u32::MAX);
        self.counters.bytes_from_guest.add(taken);
        self.counters.bytes_to_guest.add(u64::from(written));
        self.ring.push(self.memory, ticket.head, written)
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> Kind {
        Kind::Blk
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH;
        match self.limits.read_only {
            true => common | F_RO,
            false => common | F_DISCARD | F_WRITE_ZEROES,
        }
    }

    /// `struct virtio_blk_config` (virtio 1.2, section 5.2.4).
    fn config_space(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(60);
        config.extend(self.limits.sectors.to_le_bytes()); // capacity
        config.extend(0u32.to_le_bytes()); // size_max
        config.extend(MAX_SEGMENTS.to_le_bytes()); // seg_max
        config.extend([0; 4]); // geometry
        config.extend((SECTOR_BYTES as u32).to_le_bytes()); // blk_size
        config.extend([PHYSICAL_BLOCK_EXP, 0]); // physical_block_exp, alignment_offset
        config.extend((1u16 << PHYSICAL_BLOCK_EXP).to_le_bytes()); // min_io_size
        config.extend(0u32.to_le_bytes()); // opt_io_size
        config.extend([1, 0]); // writeback, unused
        config.extend(1u16.to_le_bytes()); // num_queues
        for alignment in [Some(1u32 << PHYSICAL_BLOCK_EXP), None] {
            // first for discard, then for write zeroes, which has no alignment
            config.extend(MAX_RANGE_SECTORS.to_le_bytes());
            config.extend((MAX_RANGES as u32).to_le_bytes());
            config.extend(alignment.iter().flat_map(|sectors| sectors.to_le_bytes()));
        }
        config.extend([1, 0, 0, 0]); // write_zeroes_may_unmap, unused
        config
    }

    fn activate(&mut self, active: &mut Active) -> Result<(), Error> {
        self.write_through = active.features & F_FLUSH == 0;
        let Some(ring) = &self.ring else {
            return Ok(());
        };
        active
            .sources
            .add(ring, Events::IN, RING_TOKEN)
            .map_err(|source| Error::Host {
                what: "listen to io_uring",
                source,
            })
    }

    fn awaits_more(&self, _index: usize, together: u16) -> bool {
        together > 0
    }

    fn handle_queue(&mut self, _index: usize, active: &mut Active) -> Result<(), Error> {
        self.pump(active)
    }

    /// The ring has done something, so there is room for what had to wait for it too. The queue is
    /// served as after a kick: what is taken from it moves where the driver is to kick next.
    fn handle_source(
        &mut self,
        _token: u64,
        _events: Events,
        active: &mut Active,
    ) -> Result<(), Error> {
        self.reap_together(&mut Queue::of(active))?;
        serve_queue(self, active, 0)
    }

    fn reset(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.drain();
        }
    }
}

fn io_error(error: io::Error) -> Status {
    match disk::is_unsupported(&error) {
        true => Status::Unsupported,
        false => Status::IoError,
    }
}

#[cfg(test)]
mod tests;
