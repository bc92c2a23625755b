//! The guest's buffers as slices of memory: what a chain of descriptors points
//! at, checked to lie in guest memory, ready for vectored I/O without a copy.

use virtio_queue::{DescriptorChain, desc::split::Descriptor};
use vm_memory::{GuestMemory, VolatileSlice};

use super::{Error, Memory};

/// No chain may have more descriptors than this, indirect ones counted. A driver that keeps to
/// the standard stays at or below the size of its queue (virtio 1.2, section 2.7.5).
pub const MAX_DESCRIPTORS: usize = 1024;

/// The bytes of a buffer in the guest, in one or more pieces, none of them empty.
#[derive(Debug, Clone, Default)]
pub struct Slices<'m> {
    parts: Vec<VolatileSlice<'m>>,
    len: usize,
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
    pub fn readable(
        queue: usize,
        memory: &'m Memory,
        chain: DescriptorChain<&'m Memory>,
    ) -> Result<Self, Error> {
        Self::collect(queue, memory, chain, |descriptor| {
            !descriptor.is_write_only()
        })
    }

    /// What the device writes of a chain of the queue `queue`.
    ///
    /// # Errors
    /// When a descriptor points outside of memory or there are too many.
    pub fn writable(
        queue: usize,
        memory: &'m Memory,
        chain: DescriptorChain<&'m Memory>,
    ) -> Result<Self, Error> {
        Self::collect(queue, memory, chain, Descriptor::is_write_only)
    }

    fn collect(
        queue: usize,
        memory: &'m Memory,
        chain: DescriptorChain<&'m Memory>,
        wanted: impl Fn(&Descriptor) -> bool,
    ) -> Result<Self, Error> {
        let bad = |what| Error::BadRequest { queue, what };
        let mut slices = Self::new();
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(bad("a chain has too many descriptors"));
            }
            if !wanted(&descriptor) {
                continue;
            }
            for part in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let part = part.map_err(|_| bad("a descriptor points outside of memory"))?;
                slices.add(part);
            }
        }
        Ok(slices)
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

    proptest! {
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
