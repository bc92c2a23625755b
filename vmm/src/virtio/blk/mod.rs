//! virtio-blk (virtio 1.2, section 5.2): a disk.
//!
//! [`request`] makes the guest's bytes into a value, [`disk`] is the file or
//! block device on the host, and here the one is done to the other.

use std::fs::File;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, VolatileSlice};

use super::{Active, Error, Kind, Memory, VirtioDevice};

pub mod disk;
pub mod request;
mod sys;

use disk::Disk;
use request::{
    Data, HEADER_BYTES, ID_BYTES, Limits, MAX_RANGE_SECTORS, MAX_RANGES, RANGE_BYTES, Request,
    SECTOR_BYTES, Status,
};

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
            write_through: false,
        })
    }

    fn perform(&self, request: &Request, data: &Chain<'_>) -> Result<(), Status> {
        match request {
            Request::Read { offset } => self.disk.read(&data.writable, *offset).map_err(io_error),
            Request::Write { offset } => {
                let written = self.disk.write(&data.readable, *offset);
                written
                    .and_then(|()| match self.write_through {
                        true => self.disk.flush(),
                        false => Ok(()),
                    })
                    .map_err(io_error)
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

    fn ranges(&self, request: &Request, data: &Chain<'_>) -> Result<Vec<request::Extent>, Status> {
        let mut bytes = [0; MAX_RANGES * RANGE_BYTES + 1];
        let len = data.gather(&mut bytes);
        request::ranges(&bytes[..len], request, self.limits)
    }

    /// Does one request.
    fn serve(&self, memory: &Memory, chain: DescriptorChain<&Memory>) -> Result<Done, Error> {
        let mut chain = Chain::of(memory, chain).ok_or(Error::BadRequest {
            queue: 0,
            what: "there is no byte for the status",
        })?;
        let done = chain.take_header().and_then(|header| {
            let data = Data {
                readable: total(&chain.readable),
                writable: total(&chain.writable),
            };
            let request = request::parse(&header, data, self.limits)?;
            self.perform(&request, &chain)?;
            Ok(match request {
                Request::Read { .. } => (0, data.writable),
                Request::GetId => (0, data.writable.min(ID_BYTES as u64)),
                _ => (data.readable, 0),
            })
        });
        let (status, (taken, given)) = match done {
            Ok(bytes) => (Status::Ok, bytes),
            Err(status) => (status, (0, 0)),
        };
        chain.status.copy_from(&[status as u8]);
        Ok(Done {
            taken,
            // A chain of more than 2^32 bytes is cut off by the queue.
            written: u32::try_from(given + 1).unwrap_or(u32::MAX),
        })
    }
}

/// What became of a chain: bytes that the device took and bytes that it wrote, status included.
struct Done {
    taken: u64,
    written: u32,
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
        Ok(())
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
            let head = chain.head_index();
            let done = self.serve(memory, chain)?;
            counters.bytes_from_guest.add(done.taken);
            counters.bytes_to_guest.add(u64::from(done.written));
            queue.push(memory, head, done.written)?;
        }
        queue.signal(memory)
    }
}

/// A chain of descriptors as the memory that it speaks of.
struct Chain<'m> {
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
    /// Taken off the end of what is writable.
    status: VolatileSlice<'m>,
    /// Whether every buffer lies within memory.
    whole: bool,
}

impl<'m> Chain<'m> {
    /// Collects a chain; `None` when it has no byte for a status.
    fn of(memory: &'m Memory, chain: DescriptorChain<&'m Memory>) -> Option<Self> {
        let mut readable = Vec::with_capacity(2);
        let mut writable = Vec::with_capacity(2);
        let mut whole = true;
        let mut last = None;
        for descriptor in chain.filter(|descriptor| descriptor.len() > 0) {
            let slice = memory
                .get_slice(descriptor.addr(), descriptor.len() as usize)
                .ok();
            whole &= slice.is_some();
            if descriptor.is_write_only() {
                writable.extend(last.take());
                last = slice;
            } else {
                readable.extend(slice);
            }
        }
        let last = last?;
        let before = last.len() - 1;
        if before > 0 {
            writable.push(last.subslice(0, before).ok()?);
        }
        Some(Self {
            readable,
            writable,
            status: last.offset(before).ok()?,
            whole,
        })
    }

    /// Takes the header off the front.
    ///
    /// # Errors
    /// [`Status::IoError`] when it is not all there, or other buffers are not.
    fn take_header(&mut self) -> Result<[u8; HEADER_BYTES], Status> {
        if !self.whole {
            return Err(Status::IoError);
        }
        let mut header = [0; HEADER_BYTES];
        let mut have = 0;
        while have < HEADER_BYTES {
            let first = *self.readable.first().ok_or(Status::IoError)?;
            let now = first.len().min(HEADER_BYTES - have);
            first.copy_to(&mut header[have..have + now]);
            have += now;
            match first.offset(now) {
                Ok(rest) if !rest.is_empty() => self.readable[0] = rest,
                _ => {
                    self.readable.remove(0);
                }
            }
        }
        Ok(header)
    }

    /// Copies what is readable into `to`, as far as it fits, and tells how much that was.
    fn gather(&self, to: &mut [u8]) -> usize {
        let mut len = 0;
        for slice in &self.readable {
            len += slice.copy_to(&mut to[len..]);
        }
        len
    }

    /// Copies `from` into what is writable, as far as there is room.
    fn fill(&self, mut from: &[u8]) {
        for slice in &self.writable {
            let now = slice.len().min(from.len());
            slice.copy_from(&from[..now]);
            from = &from[now..];
        }
    }
}

fn total(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

fn io_error(error: std::io::Error) -> Status {
    match disk::is_unsupported(&error) {
        true => Status::Unsupported,
        false => Status::IoError,
    }
}

#[cfg(test)]
mod tests;
