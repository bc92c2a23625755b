//! A virtqueue of a running device: the ring, its kick and its interrupt.

use std::sync::Arc;

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Chain, Error, Memory};
use crate::counters::DeviceCounters;

/// A split virtqueue (virtio 1.2, section 2.7) in use.
pub struct ActiveQueue {
    index: usize,
    ring: Queue,
    /// Written to interrupt the driver: an irqfd of KVM.
    interrupt: Arc<EventFd>,
    counters: Arc<DeviceCounters>,
    /// Chains taken in this turn, see [`ActiveQueue::begin_turn`].
    taken: u32,
    /// The device's bytes when the turn began.
    bytes_before: u64,
    /// How far the used ring was when the driver was last told of it, or need not be.
    told: u16,
    /// How worthwhile it was to wait for more: [`HOPE`] after a success, sinks with each time in
    /// vain, counts down from [`RETRY`] while it is not tried.
    hope: u32,
}

/// As often may it be in vain to wait for more before it is not tried for a while.
const HOPE: u32 = 4;
const RETRY: u32 = 32;

/// A virtqueue for someone else to work on, as the driver set it up.
pub struct Ring {
    /// Its size.
    pub size: u16,
    /// The next chain to take, modulo 2^16.
    pub next: u16,
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The available ring.
    pub available: GuestAddress,
    /// The used ring.
    pub used: GuestAddress,
    /// Written to interrupt the driver: an irqfd of KVM.
    pub interrupt: Arc<EventFd>,
}

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// A turn is over after so many times the queue's size.
const TURN_ROUNDS: u32 = 4;

/// It is over after so many bytes of the device, too: a chain may have some GiB.
const TURN_BYTES: u64 = 64 << 20;

impl ActiveQueue {
    /// A queue as the driver set it up; `interrupt` is an irqfd.
    pub fn new(
        index: usize,
        ring: Queue,
        interrupt: Arc<EventFd>,
        counters: Arc<DeviceCounters>,
    ) -> Self {
        Self {
            index,
            ring,
            interrupt,
            bytes_before: counters.bytes(),
            counters,
            taken: 0,
            told: 0,
            hope: HOPE,
        }
    }

    /// Its number among the device's queues.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Gives the ring to someone else. From here on it is not ready, so nobody here touches it.
    pub fn hand_over(&mut self) -> Ring {
        self.ring.set_ready(false);
        Ring {
            size: self.ring.size(),
            next: self.ring.next_avail(),
            descriptors: GuestAddress(self.ring.desc_table()),
            available: GuestAddress(self.ring.avail_ring()),
            used: GuestAddress(self.ring.used_ring()),
            interrupt: Arc::clone(&self.interrupt),
        }
    }

    /// Starts a turn. A driver that offers chains as fast as the device takes them must not keep
    /// its thread for ever: at the end of a turn [`ActiveQueue::pop`] has nothing more.
    pub(crate) fn begin_turn(&mut self) {
        self.taken = 0;
        self.bytes_before = self.counters.bytes();
    }

    /// Whether the turn is over, most likely with chains left.
    pub(crate) fn is_cut_short(&self) -> bool {
        self.taken >= TURN_ROUNDS * u32::from(self.ring.size())
            || self.counters.bytes().wrapping_sub(self.bytes_before) >= TURN_BYTES
    }

    /// Takes the next chain of descriptors that the driver offers, if the turn is not over.
    ///
    /// # Errors
    /// When the available index runs ahead of the ring or lies outside of memory.
    pub fn pop<'m>(&mut self, memory: &'m Memory) -> Result<Option<Chain<'m>>, Error> {
        if !self.ring.ready() || self.is_cut_short() {
            return Ok(None);
        }
        let index = self.index;
        let chain = self
            .ring
            .iter(memory)
            .map_err(|source| Error::Queue {
                queue: index,
                source,
            })?
            .next();
        self.taken += u32::from(chain.is_some());
        let (table, size) = (GuestAddress(self.ring.desc_table()), self.ring.size());
        Ok(chain.map(|chain| Chain::new(memory, table, size, chain.head_index())))
    }

    /// Puts the chain that [`ActiveQueue::pop`] gave last back, to be given again.
    pub fn unpop(&mut self) {
        self.taken = self.taken.saturating_sub(1);
        self.ring.go_to_previous_position();
    }

    /// Gives a chain back to the driver, with `len` bytes written into it.
    ///
    /// # Errors
    /// When the used ring lies outside of memory or `head` outside of the ring.
    pub fn push(&mut self, memory: &Memory, head: u16, len: u32) -> Result<(), Error> {
        self.push_all(memory, &[(head, len)])
    }

    /// Gives chains back to the driver, each with the bytes written into it. It sees all of them
    /// at once, as a packet in several buffers needs.
    ///
    /// # Errors
    /// As [`ActiveQueue::push`].
    pub fn push_all(&mut self, memory: &Memory, chains: &[(u16, u32)]) -> Result<(), Error> {
        self.counters.requests.add(1);
        let bad = |source| Error::Queue {
            queue: self.index,
            source,
        };
        let used = GuestAddress(self.ring.used_ring());
        let at = |offset: u64| {
            let address = used.checked_add(offset);
            address.ok_or(bad(virtio_queue::Error::AddressOverflow))
        };
        let size = self.ring.size();
        let mut next = self.ring.next_used();
        for &(head, len) in chains {
            if head >= size {
                return Err(bad(virtio_queue::Error::InvalidDescriptorIndex));
            }
            let element = u64::from(len) << 32 | u64::from(head);
            memory
                .write_obj(element.to_le(), at(4 + 8 * u64::from(next % size))?)
                .map_err(|error| bad(virtio_queue::Error::GuestMemory(error)))?;
            next = next.wrapping_add(1);
        }
        memory
            .store(next.to_le(), at(2)?, Ordering::Release)
            .map_err(|error| bad(virtio_queue::Error::GuestMemory(error)))?;
        self.ring.set_next_used(next);
        Ok(())
    }

    /// Interrupts the driver if it wants to hear of what was pushed since the last call.
    ///
    /// # Errors
    /// When the ring lies outside of memory.
    pub fn signal(&mut self, memory: &Memory) -> Result<(), Error> {
        let next = self.ring.next_used();
        if next == self.told {
            return Ok(());
        }
        // What was pushed is there before the driver's wish is read.
        fence(Ordering::SeqCst);
        let wanted = match self.ring.event_idx_enabled() {
            // `vring_need_event` of virtio 1.2, section 2.7.10.
            true => {
                let event = self.driver_word(memory, 4 + 2 * u64::from(self.ring.size()))?;
                next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(self.told)
            }
            false => self.driver_word(memory, 0)? & NO_INTERRUPT == 0,
        };
        self.told = next;
        if wanted {
            self.interrupt();
        }
        Ok(())
    }

    /// A number that the driver keeps in its ring.
    fn driver_word(&self, memory: &Memory, offset: u64) -> Result<u16, Error> {
        let address = GuestAddress(self.ring.avail_ring()).checked_add(offset);
        address
            .ok_or(virtio_queue::Error::AddressOverflow)
            .and_then(|address| {
                let word = memory.load(address, Ordering::Relaxed);
                word.map_err(virtio_queue::Error::GuestMemory)
            })
            .map(u16::from_le)
            .map_err(|source| Error::Queue {
                queue: self.index,
                source,
            })
    }

    /// Whether the driver set this queue up.
    pub fn ready(&self) -> bool {
        self.ring.ready()
    }

    /// Asks the driver for no kicks while the queue is worked on.
    pub(crate) fn pause_kicks(&mut self, memory: &Memory) -> Result<(), Error> {
        let index = self.index;
        if self.ring.event_idx_enabled() {
            // It kicks when it passes this place: half the numbers away, it does not. Without
            // this it would kick once more, if it has not since it was last asked for kicks.
            let never = self.ring.next_avail().wrapping_add(1 << 15);
            let after = 4 + 8 * u64::from(self.ring.size());
            return GuestAddress(self.ring.used_ring())
                .checked_add(after)
                .ok_or(virtio_queue::Error::AddressOverflow)
                .and_then(|address| {
                    let stored = memory.store(never.to_le(), address, Ordering::Relaxed);
                    stored.map_err(virtio_queue::Error::GuestMemory)
                })
                .map_err(|source| Error::Queue {
                    queue: index,
                    source,
                });
        }
        self.ring
            .disable_notification(memory)
            .map_err(|source| Error::Queue {
                queue: index,
                source,
            })
    }

    /// Asks the driver for kicks again; true when buffers came in meanwhile.
    pub(crate) fn resume_kicks(&mut self, memory: &Memory) -> Result<bool, Error> {
        let index = self.index;
        self.ring
            .enable_notification(memory)
            .map_err(|source| Error::Queue {
                queue: index,
                source,
            })
    }

    /// Whether the driver offers more than was taken.
    pub(crate) fn has_more(&self, memory: &Memory) -> Result<bool, Error> {
        Ok(self.offered(memory)? != self.position())
    }

    /// How many chains the driver has offered so far, modulo 2^16.
    pub(crate) fn offered(&self, memory: &Memory) -> Result<u16, Error> {
        let offered = self.ring.avail_idx(memory, Ordering::Acquire);
        let offered = offered.map_err(|source| Error::Queue {
            queue: self.index,
            source,
        })?;
        Ok(offered.0)
    }

    /// Whether it is likely enough that more comes at once.
    pub(crate) fn is_worth_awaiting(&mut self) -> bool {
        if self.hope == 0 {
            self.hope = RETRY;
        }
        if self.hope > HOPE {
            self.hope -= 1;
            return self.hope == HOPE;
        }
        true
    }

    /// Remembers whether more came.
    pub(crate) fn remember(&mut self, more: bool) {
        self.hope = match more {
            true => HOPE,
            false => self.hope.saturating_sub(1),
        };
    }

    /// How many chains were taken so far, modulo 2^16.
    pub(crate) fn position(&self) -> u16 {
        self.ring.next_avail()
    }

    fn interrupt(&self) {
        self.counters.interrupts.add(1);
        // An eventfd refuses only when it is at its maximum: then it is signalled already.
        let _ = self.interrupt.write(1);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::{
        Active, Kind, VirtioDevice,
        testing::{Buffer, Rig},
    };

    /// A device whose driver offers the next chain as soon as one is taken.
    struct Flooded {
        taken: u32,
    }

    impl VirtioDevice for Flooded {
        fn kind(&self) -> Kind {
            Kind::Rng
        }

        fn queue_sizes(&self) -> &[u16] {
            &[64]
        }

        fn features(&self) -> u64 {
            0
        }

        fn config_space(&self) -> Vec<u8> {
            Vec::new()
        }

        fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
            let available = GuestAddress(0x1002);
            while active.queues[index].pop(&active.memory)?.is_some() {
                self.taken += 1;
                let index: u16 = active.memory.read_obj(available).unwrap();
                let next = index.wrapping_add(1);
                active.memory.write_obj(next, available).unwrap();
            }
            Ok(())
        }
    }

    /// A device whose every chain has 16 MiB.
    struct Large {
        taken: u32,
    }

    impl VirtioDevice for Large {
        fn kind(&self) -> Kind {
            Kind::Rng
        }

        fn queue_sizes(&self) -> &[u16] {
            &[64]
        }

        fn features(&self) -> u64 {
            0
        }

        fn config_space(&self) -> Vec<u8> {
            Vec::new()
        }

        fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
            while active.queues[index].pop(&active.memory)?.is_some() {
                self.taken += 1;
                active.counters.bytes_from_guest.add(8 << 20);
                active.counters.bytes_to_guest.add(8 << 20);
            }
            Ok(())
        }
    }

    #[test]
    fn a_turn_is_over_after_many_bytes_too() {
        let mut rig = Rig::new(Large { taken: 0 });
        for _ in 0..10 {
            rig.offer(0, &[Buffer::In(1)]);
        }
        rig.kick(0).unwrap();
        assert_eq!(rig.device.taken, 4);
        rig.kick(0).unwrap();
        assert_eq!(rig.device.taken, 8);
    }

    /// A device that has no room for what is offered.
    struct Full {
        asked: u32,
    }

    impl VirtioDevice for Full {
        fn kind(&self) -> Kind {
            Kind::Rng
        }

        fn queue_sizes(&self) -> &[u16] {
            &[64]
        }

        fn features(&self) -> u64 {
            0
        }

        fn config_space(&self) -> Vec<u8> {
            Vec::new()
        }

        fn handle_queue(&mut self, _: usize, _: &mut Active) -> Result<(), Error> {
            self.asked += 1;
            Ok(())
        }
    }

    #[test]
    fn a_device_without_room_is_asked_once() {
        let mut rig = Rig::new(Full { asked: 0 });
        rig.offer(0, &[Buffer::In(8)]);
        rig.kick(0).unwrap();
        assert_eq!(rig.device.asked, 1);
    }

    /// A device whose driver offers a chain just after the queue was found empty.
    struct Late {
        taken: u32,
        looked: bool,
    }

    impl VirtioDevice for Late {
        fn kind(&self) -> Kind {
            Kind::Rng
        }

        fn queue_sizes(&self) -> &[u16] {
            &[64]
        }

        fn features(&self) -> u64 {
            0
        }

        fn config_space(&self) -> Vec<u8> {
            Vec::new()
        }

        fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
            while active.queues[index].pop(&active.memory)?.is_some() {
                self.taken += 1;
            }
            if !self.looked {
                let available = GuestAddress(0x1002);
                let index: u16 = active.memory.read_obj(available).unwrap();
                active.memory.write_obj(index + 1, available).unwrap();
                self.looked = true;
            }
            Ok(())
        }
    }

    #[test]
    fn what_comes_after_the_queue_was_found_empty_is_served() {
        let mut rig = Rig::new(Late {
            taken: 0,
            looked: false,
        });
        rig.kick(0).unwrap();
        assert_eq!(rig.device.taken, 1);
    }

    #[test]
    fn a_driver_kicks_only_while_it_is_asked_to() {
        let mut rig = Rig::with_event_index(Flooded { taken: 0 });
        let queue = &mut rig.active.queues[0];
        queue.resume_kicks(&rig.active.memory).unwrap();
        queue.pause_kicks(&rig.active.memory).unwrap();
        rig.offer(0, &[Buffer::In(1)]);
        assert!(!rig.kick_if_wanted(0).unwrap());

        let queue = &mut rig.active.queues[0];
        assert!(queue.resume_kicks(&rig.active.memory).unwrap());
        queue.pop(&rig.active.memory).unwrap();
        assert!(!queue.resume_kicks(&rig.active.memory).unwrap());
        rig.offer(0, &[Buffer::In(1)]);
        assert!(rig.kick_if_wanted(0).unwrap());
    }

    #[test]
    fn a_driver_that_never_stops_is_served_in_turns() {
        let mut rig = Rig::new(Flooded { taken: 0 });
        rig.offer(0, &[Buffer::In(1)]);

        rig.kick(0).unwrap();
        assert_eq!(rig.device.taken, 64 * TURN_ROUNDS);
        assert!(rig.active.queues[0].is_cut_short());

        rig.kick(0).unwrap();
        assert_eq!(rig.device.taken, 2 * 64 * TURN_ROUNDS);
    }
}
