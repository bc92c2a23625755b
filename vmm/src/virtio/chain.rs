//! A chain of descriptors (virtio 1.2, section 2.7.5): the buffers of one request, as the driver
//! wrote them down.
//!
//! The table that they are in is looked for once, not once for each of them. Whatever breaks the
//! rules ends the chain.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemory, VolatileMemory, VolatileSlice};

use super::Memory;

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: usize = 16;

/// The descriptors of a request, in order.
#[derive(Debug, Clone)]
pub struct Chain<'m> {
    memory: &'m Memory,
    head: u16,
    /// `None` once the chain is over.
    table: Option<VolatileSlice<'m>>,
    next: u16,
    /// How many descriptors may follow: a chain that is longer than its table goes in circles.
    left: u16,
    bytes: u32,
    is_indirect: bool,
}

impl<'m> Chain<'m> {
    /// The chain that begins with `head` in the queue's own table of `size` descriptors.
    pub(crate) fn new(memory: &'m Memory, table: GuestAddress, size: u16, head: u16) -> Self {
        Self {
            memory,
            head,
            table: find(memory, table, usize::from(size) * DESCRIPTOR_BYTES),
            next: head,
            left: size,
            bytes: 0,
            is_indirect: false,
        }
    }

    /// The first descriptor's number, by which the driver knows the chain.
    pub fn head_index(&self) -> u16 {
        self.head
    }

    fn take(&mut self) -> Option<Descriptor> {
        self.left = self.left.checked_sub(1)?;
        let at = usize::from(self.next) * DESCRIPTOR_BYTES;
        let descriptor: Descriptor = self.table.as_ref()?.get_ref(at).ok()?.load();
        if descriptor.refers_to_indirect_table() {
            self.enter(&descriptor)?;
            return self.take();
        }
        // Less than 4 GiB in all (section 2.7.5.2).
        self.bytes = self.bytes.checked_add(descriptor.len())?;
        if descriptor.has_next() {
            self.next = descriptor.next();
        } else {
            self.table = None;
        }
        Some(descriptor)
    }

    /// Goes on in another table. There is no table in such a table (section 2.7.5.3.1).
    fn enter(&mut self, descriptor: &Descriptor) -> Option<()> {
        let len = descriptor.len() as usize;
        if self.is_indirect || !len.is_multiple_of(DESCRIPTOR_BYTES) {
            return None;
        }
        self.left = u16::try_from(len / DESCRIPTOR_BYTES).ok()?;
        self.table = find(self.memory, descriptor.addr(), len);
        self.next = 0;
        self.is_indirect = true;
        Some(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let descriptor = self.take();
        if descriptor.is_none() {
            self.table = None;
        }
        descriptor
    }
}

/// A table lies in one piece of memory. Drivers align theirs, and pieces begin at many MiB.
fn find(memory: &Memory, table: GuestAddress, bytes: usize) -> Option<VolatileSlice<'_>> {
    memory.get_slice(table, bytes).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::Bytes;

    use super::*;

    const SIZE: u16 = 8;
    const TABLE: GuestAddress = GuestAddress(0);
    const AVAILABLE: GuestAddress = GuestAddress(0x1000);
    const OTHER_TABLE: u64 = 0x2000;
    const MEMORY_BYTES: usize = 0x3000;

    /// What another implementation reads of the chain that begins with `head`.
    fn expected(memory: &Memory, head: u16) -> Vec<Descriptor> {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(TABLE).unwrap();
        queue.try_set_avail_ring_address(AVAILABLE).unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(0x1800))
            .unwrap();
        queue.set_ready(true);
        memory.write_obj(1_u16, GuestAddress(0x1002)).unwrap();
        memory.write_obj(head, GuestAddress(0x1004)).unwrap();
        queue.iter(memory).unwrap().next().unwrap().collect()
    }

    fn seen(descriptors: &[Descriptor]) -> Vec<(u64, u32, u16, u16)> {
        let fields = |it: &Descriptor| (it.addr().0, it.len(), it.flags(), it.next());
        descriptors.iter().map(fields).collect()
    }

    fn chain(memory: &Memory, head: u16) -> Vec<Descriptor> {
        Chain::new(memory, TABLE, SIZE, head).collect()
    }

    /// Mostly such as drivers write.
    fn descriptor() -> impl Strategy<Value = Descriptor> {
        let address = prop_oneof![4 => Just(OTHER_TABLE), 1 => any::<u64>(), 1 => 0..0x4000_u64];
        let len = prop_oneof![4 => (0..9_u32).prop_map(|n| n * 16), 1 => any::<u32>()];
        let flags = prop_oneof![4 => 0..4_u16, 2 => 0..8_u16, 1 => any::<u16>()];
        let next = prop_oneof![6 => 0..SIZE, 1 => any::<u16>()];
        (address, len, flags, next)
            .prop_map(|(address, len, flags, next)| Descriptor::new(address, len, flags, next))
    }

    #[test]
    fn a_chain_that_goes_in_circles_ends() {
        let memory = Memory::from_ranges(&[(TABLE, MEMORY_BYTES)]).unwrap();
        memory
            .write_obj(Descriptor::new(0, 1, 1, 0), TABLE)
            .unwrap();
        assert_eq!(chain(&memory, 0).len(), usize::from(SIZE));
    }

    #[test]
    fn a_table_outside_of_memory_has_no_descriptors() {
        let memory = Memory::from_ranges(&[(TABLE, MEMORY_BYTES)]).unwrap();
        let beyond = GuestAddress(MEMORY_BYTES as u64 - 16);
        assert_eq!(Chain::new(&memory, beyond, SIZE, 0).count(), 0);
    }

    proptest! {
        #[test]
        fn a_chain_is_what_another_implementation_reads(
            own in proptest::collection::vec(descriptor(), usize::from(SIZE)),
            other in proptest::collection::vec(descriptor(), usize::from(SIZE)),
            head in 0..SIZE,
        ) {
            let memory = Memory::from_ranges(&[(TABLE, MEMORY_BYTES)]).unwrap();
            for (table, descriptors) in [(TABLE.0, own), (OTHER_TABLE, other)] {
                for (at, descriptor) in (table..).step_by(16).zip(descriptors) {
                    memory.write_obj(descriptor, GuestAddress(at)).unwrap();
                }
            }
            let is_whole = |it: &Descriptor| {
                // Tables that are cut off differ: ours is none, theirs ends where memory does.
                !it.refers_to_indirect_table()
                    || it.addr().0.checked_add(it.len().into()).is_some_and(|end| end <= MEMORY_BYTES as u64)
            };
            let mut at = head;
            let mut whole = true;
            for _ in 0..SIZE {
                let descriptor: Descriptor = memory
                    .read_obj(GuestAddress(16 * u64::from(at % SIZE)))
                    .unwrap();
                whole &= is_whole(&descriptor);
                at = descriptor.next();
            }
            let ours = seen(&chain(&memory, head));
            let theirs = seen(&expected(&memory, head));
            if whole {
                prop_assert_eq!(ours, theirs);
            } else {
                prop_assert!(theirs.starts_with(&ours));
            }
        }
    }
}
