//! A request's chain of descriptors as the memory that it speaks of.

use smallvec::SmallVec;
use vm_memory::{Address, GuestAddress, GuestMemory, VolatileSlice};

use super::{
    MAX_SEGMENTS,
    request::{Data, HEADER_BYTES, Status},
};
use crate::virtio::{self, Memory};

/// The data, a header and a status.
const MAX_DESCRIPTORS: usize = MAX_SEGMENTS as usize + 2;

/// A chain of descriptors as the memory that it speaks of.
pub(super) struct Chain<'m> {
    pub(super) readable: SmallVec<[VolatileSlice<'m>; 2]>,
    pub(super) writable: SmallVec<[VolatileSlice<'m>; 2]>,
    /// The last byte that is writable, which is none of `writable`.
    pub(super) status: GuestAddress,
    /// Whether every buffer lies within memory.
    whole: bool,
}

impl<'m> Chain<'m> {
    /// Collects a chain; `None` when it has more descriptors than a driver may use, or no byte for
    /// a status.
    pub(super) fn of(memory: &'m Memory, chain: virtio::Chain<'m>) -> Option<Self> {
        let mut readable = SmallVec::new();
        let mut writable = SmallVec::new();
        let mut whole = true;
        let mut last = None;
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return None;
            }
            if descriptor.len() == 0 {
                continue;
            }
            let slice = memory
                .get_slice(descriptor.addr(), descriptor.len() as usize)
                .ok();
            whole &= slice.is_some();
            if descriptor.is_write_only() {
                writable.extend(last.take().map(|(slice, _)| slice));
                last = slice.map(|slice| (slice, descriptor.addr()));
            } else {
                readable.extend(slice);
            }
        }
        let (last, start): (VolatileSlice<'m>, GuestAddress) = last?;
        let before = last.len() - 1;
        if before > 0 {
            writable.push(last.subslice(0, before).ok()?);
        }
        Some(Self {
            readable,
            writable,
            status: start.checked_add(before as u64)?,
            whole,
        })
    }

    /// Takes the header off the front.
    ///
    /// # Errors
    /// [`Status::IoError`] when it is not all there, or other buffers are not.
    pub(super) fn take_header(&mut self) -> Result<[u8; HEADER_BYTES], Status> {
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

    /// How much there is beside what was taken off.
    pub(super) fn data(&self) -> Data {
        Data {
            readable: total(&self.readable),
            writable: total(&self.writable),
        }
    }

    /// Copies what is readable into `to`, as far as it fits, and tells how much that was.
    pub(super) fn gather(&self, to: &mut [u8]) -> usize {
        let mut len = 0;
        for slice in &self.readable {
            len += slice.copy_to(&mut to[len..]);
        }
        len
    }

    /// Copies `from` into what is writable, as far as there is room.
    pub(super) fn fill(&self, mut from: &[u8]) {
        for slice in &self.writable {
            let now = slice.len().min(from.len());
            slice.copy_from(&from[..now]);
            from = &from[now..];
        }
    }
}

/// How long buffers are together.
fn total(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}
