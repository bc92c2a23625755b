//! A guest's driver for tests: rings in memory, without a guest, a thread or KVM.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::{
    epoll::{Epoll, EpollEvent},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    Active, ActiveQueue, ConfigChange, Error, Memory, Sources, VirtioDevice, worker::serve_queue,
};
use crate::counters::DeviceCounters;

const QUEUE_SIZE: u16 = 64;
const QUEUE_SPAN: u64 = 0x4000;
const DATA: u64 = 0x10_0000;
const MEMORY_BYTES: usize = 64 << 20;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;

/// One buffer of a chain.
pub(crate) enum Buffer<'a> {
    /// Bytes for the device to read.
    Out(&'a [u8]),
    /// Room for the device to write, in bytes.
    In(usize),
}

/// A chain that was offered: its head and where its bytes lie.
pub(crate) struct Chain {
    pub(crate) head: u16,
    outs: Vec<(GuestAddress, usize)>,
    rooms: Vec<(GuestAddress, usize)>,
}

/// A device with a driver on the other side of its rings.
pub(crate) struct Rig<D> {
    pub(crate) device: D,
    pub(crate) active: Active,
    epoll: Arc<Epoll>,
    drivers: Vec<Driver>,
    next_data: u64,
}

struct Driver {
    next_descriptor: u16,
    avail_index: u16,
    /// `avail_index` when the driver last thought about a kick.
    kicked_index: u16,
    used_seen: u16,
    interrupt: Arc<EventFd>,
}

impl<D: VirtioDevice> Rig<D> {
    /// Activates `device` with all its features and queues of 64 descriptors.
    pub(crate) fn new(device: D) -> Self {
        Self::build(device, false)
    }

    /// As [`Rig::new`], and both sides say when they want to be notified (`VIRTIO_F_EVENT_IDX`).
    pub(crate) fn with_event_index(device: D) -> Self {
        Self::build(device, true)
    }

    fn build(mut device: D, event_index: bool) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let counters = Arc::new(DeviceCounters::default());
        let epoll = Arc::new(Epoll::new().unwrap());
        let mut drivers = Vec::new();
        let mut queues = Vec::new();
        for index in 0..device.queue_sizes().len() {
            let interrupt = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
            let base = index as u64 * QUEUE_SPAN;
            let mut ring = Queue::new(QUEUE_SIZE).unwrap();
            ring.set_size(QUEUE_SIZE);
            ring.set_event_idx(event_index);
            ring.try_set_desc_table_address(GuestAddress(base)).unwrap();
            ring.try_set_avail_ring_address(GuestAddress(base + 0x1000))
                .unwrap();
            ring.try_set_used_ring_address(GuestAddress(base + 0x2000))
                .unwrap();
            ring.set_ready(true);
            queues.push(ActiveQueue::new(
                index,
                ring,
                Arc::clone(&interrupt),
                Arc::clone(&counters),
            ));
            drivers.push(Driver {
                next_descriptor: 0,
                avail_index: 0,
                kicked_index: 0,
                used_seen: 0,
                interrupt,
            });
        }
        let kick = |_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let kicks = (0..queues.len()).map(kick).collect();
        let mut active = Active {
            memory,
            queues,
            kicks,
            features: device.features(),
            sources: Sources::new(Arc::clone(&epoll)),
            counters,
            config: ConfigChange::new(|_| {}),
        };
        device.activate(&mut active).unwrap();
        Self {
            device,
            active,
            epoll,
            drivers,
            next_data: DATA,
        }
    }

    /// Offers a chain on `queue` without kicking. Descriptors are used in turn
    /// and never freed: up to 64 may be on offer at once.
    pub(crate) fn offer(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> Chain {
        let (mut outs, mut rooms) = (Vec::new(), Vec::new());
        let head = self.drivers[queue].next_descriptor % QUEUE_SIZE;
        for (i, buffer) in buffers.iter().enumerate() {
            let address = GuestAddress(self.next_data);
            let (len, mut flags) = match buffer {
                Buffer::Out(bytes) => {
                    self.active.memory.write_slice(bytes, address).unwrap();
                    outs.push((address, bytes.len()));
                    (bytes.len(), 0)
                }
                Buffer::In(len) => {
                    rooms.push((address, *len));
                    (*len, F_WRITE)
                }
            };
            self.next_data = (self.next_data + len as u64 + 0xfff) & !0xfff;
            assert!(
                self.next_data < MEMORY_BYTES as u64,
                "the rig's memory is used up"
            );
            let slot = (head + i as u16) % QUEUE_SIZE;
            if i + 1 < buffers.len() {
                flags |= F_NEXT;
            }
            self.write_descriptor(
                queue,
                slot,
                address.0,
                len as u32,
                flags,
                (slot + 1) % QUEUE_SIZE,
            );
        }
        let driver = &mut self.drivers[queue];
        driver.next_descriptor = driver.next_descriptor.wrapping_add(buffers.len() as u16);
        let chain = Chain { head, outs, rooms };
        self.offer_again(queue, &chain);
        chain
    }

    /// Offers a chain that the device gave back once more. Its descriptors must not have been
    /// used for another one since.
    pub(crate) fn offer_again(&mut self, queue: usize, chain: &Chain) {
        let base = queue as u64 * QUEUE_SPAN;
        let driver = &mut self.drivers[queue];
        let ring = base + 0x1000 + 4 + 2 * u64::from(driver.avail_index % QUEUE_SIZE);
        driver.avail_index = driver.avail_index.wrapping_add(1);
        let index = driver.avail_index;
        self.active
            .memory
            .write_obj(chain.head.to_le(), GuestAddress(ring))
            .unwrap();
        self.active
            .memory
            .write_obj(index.to_le(), GuestAddress(base + 0x1002))
            .unwrap();
    }

    /// Replaces what the device reads of a chain, from its first byte on.
    pub(crate) fn rewrite(&mut self, chain: &Chain, mut bytes: &[u8]) {
        for (address, len) in &chain.outs {
            let (part, rest) = bytes.split_at(bytes.len().min(*len));
            self.active.memory.write_slice(part, *address).unwrap();
            bytes = rest;
        }
        assert!(bytes.is_empty(), "the chain has no room for {bytes:?}");
    }

    /// Gives the memory for data back, for tests that offer more than there is.
    pub(crate) fn rewind(&mut self) {
        self.next_data = DATA;
    }

    /// Writes one raw descriptor, for chains that break the rules.
    pub(crate) fn write_descriptor(
        &mut self,
        queue: usize,
        slot: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = queue as u64 * QUEUE_SPAN + 16 * u64::from(slot);
        let memory = &self.active.memory;
        memory.write_obj(address.to_le(), GuestAddress(at)).unwrap();
        memory.write_obj(len.to_le(), GuestAddress(at + 8)).unwrap();
        memory
            .write_obj(flags.to_le(), GuestAddress(at + 12))
            .unwrap();
        memory
            .write_obj(next.to_le(), GuestAddress(at + 14))
            .unwrap();
    }

    /// Kicks `queue` and lets the device work until it is done.
    pub(crate) fn kick(&mut self, queue: usize) -> Result<(), Error> {
        self.active.queues[queue].begin_turn();
        serve_queue(&mut self.device, &mut self.active, queue)
    }

    /// As [`Rig::kick`], but only when the device asked to be kicked for what was offered since
    /// the last time. Needs [`Rig::with_event_index`].
    pub(crate) fn kick_if_wanted(&mut self, queue: usize) -> Result<bool, Error> {
        let at = queue as u64 * QUEUE_SPAN + 0x2000 + 4 + 8 * u64::from(QUEUE_SIZE);
        let event: u16 = self.active.memory.read_obj(GuestAddress(at)).unwrap();
        let driver = &mut self.drivers[queue];
        let (new, old) = (driver.avail_index, driver.kicked_index);
        driver.kicked_index = new;
        // `vring_need_event` of virtio 1.2, section 2.7.10.
        let wanted = new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        if wanted {
            self.kick(queue)?;
        }
        Ok(wanted)
    }

    /// Waits up to `timeout_ms` for the device's own descriptors and lets it handle those
    /// that are ready; false when none was.
    pub(crate) fn poll(&mut self, timeout_ms: i32) -> bool {
        let mut events = [EpollEvent::default(); 16];
        // Work of io_uring interrupts waits.
        let ready = loop {
            match self.epoll.wait(timeout_ms, &mut events) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                ready => break ready.unwrap(),
            }
        };
        for queue in &mut self.active.queues {
            queue.begin_turn();
        }
        for event in &events[..ready] {
            self.device
                .handle_source(event.data(), event.event_set(), &mut self.active)
                .unwrap();
        }
        ready > 0
    }

    /// The chains that the device gave back since the last call, as (head, bytes written).
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let base = queue as u64 * QUEUE_SPAN + 0x2000;
        let memory = &self.active.memory;
        let index: u16 = memory.read_obj(GuestAddress(base + 2)).unwrap();
        let driver = &mut self.drivers[queue];
        let mut used = Vec::new();
        while driver.used_seen != index {
            let at = base + 4 + 8 * u64::from(driver.used_seen % QUEUE_SIZE);
            let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
            used.push((head as u16, len));
            driver.used_seen = driver.used_seen.wrapping_add(1);
        }
        // Wants to hear of the next one.
        let event = base - 0x1000 + 4 + 2 * u64::from(QUEUE_SIZE);
        memory.write_obj(index, GuestAddress(event)).unwrap();
        used
    }

    /// What the device wrote into a chain's rooms, all of their bytes.
    pub(crate) fn written(&self, chain: &Chain) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (address, len) in &chain.rooms {
            let start = bytes.len();
            bytes.resize(start + len, 0);
            self.active
                .memory
                .read_slice(&mut bytes[start..], *address)
                .unwrap();
        }
        bytes
    }

    /// Whether the driver was interrupted for `queue` since the last call.
    pub(crate) fn interrupted(&self, queue: usize) -> bool {
        self.drivers[queue].interrupt.read().is_ok()
    }
}
