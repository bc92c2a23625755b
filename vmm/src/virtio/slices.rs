//! The guest's buffers as slices of memory: what a chain of descriptors points
//! at, checked to lie in guest memory, ready for vectored I/O without a copy.

use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestAddress, GuestMemory, VolatileSlice};

use super::{Chain, Error, Memory};

/// No chain may have more descriptors than this, indirect ones counted. A driver that keeps to
/// the standard stays at or below the size of its queue (virtio 1.2, section 2.7.5).
pub const MAX_DESCRIPTORS: usize = 1024;

/// The bytes of a buffer in the guest, in one or more pieces, none of them empty.
#[derive(Debug, Clone, Default)]
pub struct Slices<'m> {
    parts: Parts<'m>,
    len: usize,
}

/// As many as most requests have need no memory of their own.
type Parts<'m> = SmallVec<[VolatileSlice<'m>; 8]>;

/// Both sides of a chain, each by itself: one that is bad leaves the other to answer with.
pub struct Sides<'m> {
    /// What the device reads.
    pub readable: Result<Slices<'m>, Error>,
    /// What the device writes.
    pub writable: Result<Slices<'m>, Error>,
}

impl<'m> Sides<'m> {
    /// The sides of a chain of the queue `queue`.
    pub fn of(queue: usize, memory: &'m Memory, chain: Chain<'m>) -> Self {
        let side = || Ok(Gathering::new(queue, memory));
        let (mut readable, mut writable) = (side(), side());
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Self {
                    readable: Err(Error::too_long(queue)),
                    writable: Err(Error::too_long(queue)),
                };
            }
            let side = match descriptor.is_write_only() {
                true => &mut writable,
                false => &mut readable,
            };
            if let Ok(gathering) = side
                && let Err(error) = gathering.add(descriptor)
            {
                *side = Err(error);
            }
        }
        Self {
            readable: readable.and_then(Gathering::finish),
            writable: writable.and_then(Gathering::finish),
        }
    }
}

/// Slices on their way. Drivers give each page a descriptor of its own, also those that lie side
/// by side: these become one slice, which costs the host less.
struct Gathering<'m> {
    queue: usize,
    memory: &'m Memory,
    slices: Slices<'m>,
    start: GuestAddress,
    len: usize,
}

impl<'m> Gathering<'m> {
    fn new(queue: usize, memory: &'m Memory) -> Self {
        Self {
            queue,
            memory,
            slices: Slices::new(),
            start: GuestAddress(0),
            len: 0,
        }
    }

    fn add(&mut self, descriptor: Descriptor) -> Result<(), Error> {
        if self.start.checked_add(self.len as u64) != Some(descriptor.addr()) {
            self.take()?;
            self.start = descriptor.addr();
        }
        // A chain has less than 4 GiB.
        self.len += descriptor.len() as usize;
        Ok(())
    }

    fn take(&mut self) -> Result<(), Error> {
        for part in self.memory.get_slices(self.start, self.len) {
            self.slices.add(part.map_err(|_| Error::BadRequest {
                queue: self.queue,
                what: "a descriptor points outside of memory",
            })?);
        }
        self.len = 0;
        Ok(())
    }

    fn finish(mut self) -> Result<Slices<'m>, Error> {
        self.take()?;
        Ok(self.slices)
    }
}

impl Error {
    fn too_long(queue: usize) -> Self {
        Self::BadRequest {
            queue,
            what: "a chain has too many descriptors",
        }
    }
}

impl<'m> Slices<'m> {
    /// No bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the device reads of a chain of the queue `queue`.
    ///
    /// # Errors
    /// When a descriptor points outside of memory or there are too many.
    pub fn readable(queue: usize, memory: &'m Memory, chain: Chain<'m>) -> Result<Self, Error> {
        Self::collect(queue, memory, chain, |descriptor| {
            !descriptor.is_write_only()
        })
    }

    /// What the device writes of a chain of the queue `queue`.
    ///
    /// # Errors
    /// When a descriptor points outside of memory or there are too many.
    pub fn writable(queue: usize, memory: &'m Memory, chain: Chain<'m>) -> Result<Self, Error> {
        Self::collect(queue, memory, chain, Descriptor::is_write_only)
    }

    fn collect(
        queue: usize,
        memory: &'m Memory,
        chain: Chain<'m>,
        wanted: impl Fn(&Descriptor) -> bool,
    ) -> Result<Self, Error> {
        let mut gathering = Gathering::new(queue, memory);
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(Error::too_long(queue));
            }
            if wanted(&descriptor) {
                gathering.add(descriptor)?;
            }
        }
        gathering.finish()
    }

    fn add(&mut self, part: VolatileSlice<'m>) {
        if !part.is_empty() {
            self.len += part.len();
            self.parts.push(part);
        }
    }

    /// How many bytes there are. A chain has less than 4 GiB.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, in order.
    pub fn parts(&self) -> &[VolatileSlice<'m>] {
        &self.parts
    }

    /// Copies the first bytes into `bytes`; as many as there are, and says how many.
    pub fn read(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for part in &self.parts {
            done += part.copy_to(&mut bytes[done..]);
            if done == bytes.len() {
                break;
            }
        }
        done
    }

    /// Writes `bytes` over the first bytes; as many as fit, and says how many.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for part in &self.parts {
            let count = part.len().min(bytes.len() - done);
            part.copy_from(&bytes[done..done + count]);
            done += count;
            if done == bytes.len() {
                break;
            }
        }
        done
    }

    /// Drops the first `count` bytes, or all when there are not as many.
    pub fn skip(&mut self, count: usize) {
        let mut left = count;
        let mut whole = 0;
        for part in &mut self.parts {
            if left < part.len() {
                if let Ok(rest) = part.offset(left) {
                    *part = rest;
                }
                break;
            }
            left -= part.len();
            whole += 1;
        }
        self.parts.drain(..whole);
        self.len = self.len.saturating_sub(count);
    }

    /// Drops all but the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        let mut left = count;
        let mut keep = 0;
        for part in &mut self.parts {
            if left == 0 {
                break;
            }
            if left < part.len()
                && let Ok(start) = part.subslice(0, left)
            {
                *part = start;
            }
            left -= part.len();
            keep += 1;
        }
        self.parts.truncate(keep);
        self.len = self.len.min(count);
    }

    /// Appends the bytes of `other`.
    pub fn append(&mut self, mut other: Self) {
        self.len += other.len;
        self.parts.append(&mut other.parts);
    }
}

impl<'m> From<VolatileSlice<'m>> for Slices<'m> {
    fn from(part: VolatileSlice<'m>) -> Self {
        let mut slices = Self::new();
        slices.add(part);
        slices
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    fn slices<'m>(parts: &'m mut [Vec<u8>]) -> Slices<'m> {
        let mut slices = Slices::new();
        for part in parts {
            slices.add(VolatileSlice::from(part.as_mut_slice()));
        }
        slices
    }

    #[test]
    fn bytes_are_read_and_written_across_the_pieces() {
        let mut parts = [vec![1, 2], vec![], vec![3, 4, 5]];
        let slices = slices(&mut parts);

        let mut read = [0; 4];
        assert_eq!(slices.read(&mut read), 4);
        assert_eq!(read, [1, 2, 3, 4]);
        assert_eq!(slices.write(&[9, 8, 7]), 3);
        assert_eq!(slices.read(&mut [0; 9]), 5);
        assert_eq!(slices.write(&[0; 9]), 5);
    }

    #[test]
    fn skip_and_truncate_cut_inside_of_pieces() {
        let mut parts = [vec![1, 2], vec![3, 4, 5], vec![6]];
        let mut slices = slices(&mut parts);

        slices.skip(1);
        slices.truncate(3);

        let mut read = [0; 9];
        assert_eq!((slices.len(), slices.read(&mut read)), (3, 3));
        assert_eq!(read[..3], [2, 3, 4]);
        slices.skip(3);
        assert!(slices.is_empty());
        assert!(slices.parts().is_empty());
    }

    const TABLE_BYTES: usize = 0x1000;

    /// Two pieces of memory with a table of descriptors in the first, given by address and length.
    fn memory(descriptors: &[(u64, u32)]) -> Memory {
        let pieces = [
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x1_0000), 0x1_0000),
        ];
        let memory = Memory::from_ranges(&pieces).unwrap();
        for (i, (address, len)) in descriptors.iter().enumerate() {
            let is_last = i + 1 == descriptors.len();
            let flags = 2 | u16::from(!is_last);
            let descriptor = Descriptor::new(*address, *len, flags, i as u16 + 1);
            let at = GuestAddress(16 * i as u64);
            memory.write_obj(descriptor, at).unwrap();
        }
        memory
    }

    fn writable<'m>(memory: &'m Memory, count: usize) -> Result<Slices<'m>, Error> {
        let chain = Chain::new(memory, GuestAddress(0), count as u16, 0);
        Slices::writable(0, memory, chain)
    }

    #[test]
    fn buffers_that_lie_side_by_side_are_one_slice() {
        let pages = [0x2000, 0x3000, 0x4000, 0x6000, 0x5000, 0xf000, 0x1_0000];
        let memory = memory(&pages.map(|address| (address, 0x1000)));
        let slices = writable(&memory, pages.len()).unwrap();
        let lens: Vec<_> = slices.parts().iter().map(|part| part.len()).collect();
        // The last two are in two pieces of memory.
        assert_eq!(lens, [0x3000, 0x1000, 0x1000, 0x1000, 0x1000]);
    }

    #[test]
    fn a_buffer_that_begins_where_memory_ends_is_refused() {
        let memory = memory(&[(0x1_f000, 0x1000), (0x2_0000, 1)]);
        assert!(writable(&memory, 2).is_err());
    }

    proptest! {
        #[test]
        fn slices_are_the_bytes_of_the_buffers_in_order(
            pages in proptest::collection::vec(1..30_u64, 1..20),
            len in 1..0x1001_u32,
        ) {
            let descriptors: Vec<_> = pages.iter().map(|page| (page * 0x1000, len)).collect();
            let memory = memory(&descriptors);
            for at in (TABLE_BYTES as u64..0x2_0000).step_by(8) {
                memory.write_obj(at, GuestAddress(at)).unwrap();
            }
            let mut expected = Vec::new();
            for (address, len) in descriptors {
                let mut bytes = vec![0; len as usize];
                memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
                expected.extend(bytes);
            }
            let slices = writable(&memory, pages.len()).unwrap();
            let mut read = vec![0; expected.len()];
            prop_assert_eq!(slices.len(), expected.len());
            prop_assert_eq!(slices.read(&mut read), expected.len());
            prop_assert!(read == expected);
        }

        #[test]
        fn a_cut_is_the_cut_of_the_bytes(
            mut parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..9), 0..6),
            skip in 0..60_usize,
            keep in 0..60_usize,
        ) {
            let bytes = parts.concat();
            let expected: Vec<u8> = bytes.into_iter().skip(skip).take(keep).collect();
            let mut slices = slices(&mut parts);

            slices.skip(skip);
            slices.truncate(keep);

            let mut read = [0; 60];
            let count = slices.read(&mut read);
            prop_assert_eq!(&read[..count], &expected);
            prop_assert_eq!(slices.len(), expected.len());
        }
    }
}
