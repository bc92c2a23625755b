//! The memory balloon (virtio 1.2, section 5.5): memory that the guest does not
//! use goes back to the host.
//!
//! Pages come in two ways. The balloon is inflated to the size that the device
//! asks for ([`pages`]); and, with free page reporting, the guest names ranges
//! that are free right now, which costs it nothing and needs no size. Either
//! way the pages are freed and read as zeros when the guest takes them again,
//! which it does without asking.
//!
//! System calls of its thread: `madvise`, `epoll_ctl`, `futex`, and `read` and
//! `write` on eventfds.

pub mod pages;
pub mod statistics;
mod sys;
#[cfg(test)]
mod tests;

use std::{io, ops::Range};

use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryRegion};

use self::{
    pages::{MAX_PAGES, PAGE_BYTES},
    statistics::{Monitor, Statistics},
};
use super::{Active, Error, Events, Kind, Memory, VirtioDevice, slices::Slices};

/// `VIRTIO_BALLOON_F_STATS_VQ`
const F_STATS_VQ: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the guest may take pages back when it runs out.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Inflate, deflate, statistics, reporting. Queues of features that were not agreed on are
/// left out of the count, so that the last two may stand one place earlier.
const QUEUE_SIZES: [u16; 4] = [16, 16, 8, 32];

const WANTED: u64 = 0;

/// Where `actual` stands in the configuration space; `num_pages` is at 0.
const ACTUAL: usize = 4;

/// Why a balloon cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// It would be larger than its unit can say.
    #[error("inflate_mib is {mib}: a balloon has at most {max} MiB", max = MAX_MIB)]
    Size {
        /// What was asked for.
        mib: u64,
    },
    /// The kernel refused a descriptor.
    #[error("cannot prepare the balloon")]
    Io(#[from] io::Error),
}

/// The largest balloon: its size is told in pages, in 32 bits.
const MAX_MIB: u64 = (u32::MAX as u64 * PAGE_BYTES) >> 20;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The memory balloon.
pub struct Balloon {
    /// The pages that the guest shall give.
    num_pages: u32,
    /// The pages that the guest says it has given.
    actual: u32,
    /// The driver's buffer for statistics, to be given back when new ones are wanted.
    buffer: Option<u16>,
    monitor: Monitor,
}

impl Balloon {
    /// A balloon that takes `inflate_mib` MiB from the guest.
    ///
    /// # Errors
    /// When the size cannot be told to a driver or the kernel refuses a descriptor.
    pub fn new(inflate_mib: u64) -> Result<Self, NewError> {
        if inflate_mib > MAX_MIB {
            return Err(NewError::Size { mib: inflate_mib });
        }
        Ok(Self {
            num_pages: ((inflate_mib << 20) / PAGE_BYTES) as u32,
            actual: 0,
            buffer: None,
            monitor: Monitor::new()?,
        })
    }

    /// Reads the guest's statistics while the device runs.
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    /// Frees the pages that the driver numbers.
    fn inflate(&self, index: usize, active: &mut Active) -> Result<(), Error> {
        let memory = &active.memory;
        let queue = &mut active.queues[index];
        while let Some(chain) = queue.pop(memory)? {
            let head = chain.head_index();
            let numbers = Slices::readable(index, memory, chain)?;
            if numbers.len() > MAX_PAGES * 4 {
                return Err(Error::BadRequest {
                    queue: index,
                    what: "too many pages for the balloon at a time",
                });
            }
            let mut bytes = vec![0; numbers.len()];
            numbers.read(&mut bytes);
            for range in pages::ranges(&bytes) {
                let freed = free(memory, index, GuestAddress(range.start), range.len)?;
                active.counters.bytes_from_guest.add(freed);
            }
            queue.push(memory, head, 0)?;
        }
        queue.signal(memory)
    }

    /// The driver takes pages back; they are there as soon as it touches them.
    fn deflate(index: usize, active: &mut Active) -> Result<(), Error> {
        let memory = &active.memory;
        let queue = &mut active.queues[index];
        while let Some(chain) = queue.pop(memory)? {
            queue.push(memory, chain.head_index(), 0)?;
        }
        queue.signal(memory)
    }

    /// Frees the ranges that the driver's descriptors span: their contents are of no use.
    fn report(index: usize, active: &mut Active) -> Result<(), Error> {
        let memory = &active.memory;
        let queue = &mut active.queues[index];
        while let Some(chain) = queue.pop(memory)? {
            let head = chain.head_index();
            for (count, range) in chain.enumerate() {
                if count >= super::slices::MAX_DESCRIPTORS {
                    return Err(Error::BadRequest {
                        queue: index,
                        what: "a report has too many ranges",
                    });
                }
                if range.is_write_only() {
                    let freed = free(memory, index, range.addr(), u64::from(range.len()))?;
                    active.counters.bytes_from_guest.add(freed);
                }
            }
            queue.push(memory, head, 0)?;
        }
        queue.signal(memory)
    }

    /// The driver left statistics; its buffer stays with us until we want more.
    fn take_statistics(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        let memory = &active.memory;
        let queue = &mut active.queues[index];
        while let Some(chain) = queue.pop(memory)? {
            let head = chain.head_index();
            let entries = Slices::readable(index, memory, chain)?;
            let mut bytes = vec![0; entries.len().min(statistics::MAX_BYTES)];
            entries.read(&mut bytes);
            // A driver has one buffer; should there be more, the older goes back.
            if let Some(older) = self.buffer.replace(head) {
                queue.push(memory, older, 0)?;
                queue.signal(memory)?;
            }
            self.monitor.set(Some(Statistics::parse(&bytes)));
        }
        Ok(())
    }

    fn ask_for_statistics(&mut self, active: &mut Active) -> Result<(), Error> {
        let index = 2;
        if role(index, active.features) == Some(Role::Statistics)
            && let Some(head) = self.buffer.take()
        {
            active.queues[index].push(&active.memory, head, 0)?;
            active.queues[index].signal(&active.memory)?;
        }
        Ok(())
    }
}

/// What the queue `index` is for, given the features agreed on.
fn role(index: usize, features: u64) -> Option<Role> {
    let mut roles = vec![Role::Inflate, Role::Deflate];
    if features & F_STATS_VQ != 0 {
        roles.push(Role::Statistics);
    }
    if features & F_PAGE_REPORTING != 0 {
        roles.push(Role::Reporting);
    }
    roles.get(index).copied()
}

/// Frees a range of guest memory and says how many bytes it had.
fn free(memory: &Memory, queue: usize, start: GuestAddress, len: u64) -> Result<u64, Error> {
    let (mut at, mut left) = (start, len);
    while left > 0 {
        let (region, offset) = memory.to_region_addr(at).ok_or(Error::BadRequest {
            queue,
            what: "a page outside of memory",
        })?;
        let count = left.min(region.len() - offset.0);
        sys::free(region, offset.0, count).map_err(|source| Error::Host {
            what: "give memory back to the host",
            source,
        })?;
        left -= count;
        if left > 0 {
            at = at.checked_add(count).ok_or(Error::BadRequest {
                queue,
                what: "a range that does not end",
            })?;
        }
    }
    Ok(len)
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }

    fn config_space(&self) -> Vec<u8> {
        [self.num_pages.to_le_bytes(), self.actual.to_le_bytes()].concat()
    }

    fn activate(&mut self, active: &mut Active) -> Result<(), Error> {
        active
            .sources
            .add(self.monitor.wanted(), Events::IN, WANTED)
            .map_err(|source| Error::Host {
                what: "listen for requests of statistics",
                source,
            })
    }

    fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        match role(index, active.features) {
            Some(Role::Inflate) => self.inflate(index, active),
            Some(Role::Deflate) => Self::deflate(index, active),
            Some(Role::Statistics) => self.take_statistics(index, active),
            Some(Role::Reporting) => Self::report(index, active),
            None => Ok(()),
        }
    }

    fn handle_source(
        &mut self,
        _token: u64,
        _events: Events,
        active: &mut Active,
    ) -> Result<(), Error> {
        // It fails only when another wake-up was read with it.
        let _ = self.monitor.wanted().read();
        self.ask_for_statistics(active)
    }

    fn driver_fields(&self) -> Range<usize> {
        ACTUAL..ACTUAL + 4
    }

    fn write_config(&mut self, fields: &[u8], _active: &mut Active) {
        if let Ok(actual) = fields.try_into() {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn reset(&mut self) {
        self.actual = 0;
        self.buffer = None;
        self.monitor.set(None);
    }
}
