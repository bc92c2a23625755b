//! A guest that writes what the fuzzer says: rings and buffers in memory, and a
//! device that has to cope with them.

use std::sync::Arc;

use arbitrary::Arbitrary;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::{
    counters::DeviceCounters,
    virtio::{Active, ActiveQueue, ConfigChange, Error, Sources, VirtioDevice},
};
use vmm_sys_util::{
    epoll::{Epoll, EpollEvent},
    eventfd::{EFD_NONBLOCK, EventFd},
};

const QUEUE_SIZE: u16 = 16;
const QUEUE_SPAN: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const BUFFERS: u64 = 0x1_0000;
const MEMORY_BYTES: usize = 1 << 20;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;

/// What the guest does.
#[derive(Debug, Arbitrary)]
pub enum Step {
    /// Offers a chain and kicks.
    Offer {
        /// On this queue, modulo the number of queues.
        queue: u8,
        /// Of these buffers, of which a few are used.
        buffers: Vec<Buffer>,
    },
    /// Writes somewhere, its rings not excepted.
    Write {
        /// Where, modulo the size of memory.
        at: u32,
        /// What.
        bytes: Vec<u8>,
    },
    /// Kicks a queue.
    Kick(u8),
    /// Writes to its fields of the configuration space.
    Config(Vec<u8>),
    /// The host's descriptors are looked at.
    Poll,
}

/// A buffer of a chain.
#[derive(Debug, Arbitrary)]
pub enum Buffer {
    /// Bytes for the device.
    Out(Vec<u8>),
    /// Room for the device.
    In(u16),
    /// Any descriptor.
    Raw {
        /// Where the buffer is.
        address: u64,
        /// How long it is.
        len: u32,
        /// Its flags.
        flags: u16,
        /// The next descriptor.
        next: u16,
    },
}

/// A device with a guest.
pub struct Machine<D> {
    /// The device.
    pub device: D,
    active: Active,
    epoll: Arc<Epoll>,
    available: Vec<u16>,
    next_buffer: u64,
}

impl<D: VirtioDevice> Machine<D> {
    /// Activates the device with all of its features.
    pub fn new(mut device: D) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
            .expect("a mapping of 1 MiB");
        let counters = Arc::new(DeviceCounters::default());
        let count = device.queue_sizes().len();
        let queues = (0..count).map(|index| queue(index, &counters)).collect();
        let epoll = Arc::new(Epoll::new().expect("an epoll set"));
        let kick = |_| Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let kicks = (0..count).map(kick).collect();
        let mut active = Active {
            memory,
            queues,
            kicks,
            features: device.features(),
            sources: Sources::new(Arc::clone(&epoll)),
            counters,
            config: ConfigChange::new(|_| {}),
        };
        device.activate(&mut active).expect("the device starts");
        Self {
            device,
            active,
            epoll,
            available: vec![0; count],
            next_buffer: BUFFERS,
        }
    }

    /// Does a step.
    ///
    /// # Errors
    /// When the device stops for what the guest did, as it may.
    pub fn step(&mut self, step: &Step) -> Result<(), Error> {
        match step {
            Step::Offer { queue, buffers } => {
                let queue = usize::from(*queue) % self.available.len();
                self.offer(queue, buffers);
                self.device.handle_queue(queue, &mut self.active)
            }
            Step::Write { at, bytes } => {
                let at = u64::from(*at) % MEMORY_BYTES as u64;
                let _ = self.active.memory.write(bytes, GuestAddress(at));
                Ok(())
            }
            Step::Kick(queue) => {
                let queue = usize::from(*queue) % self.available.len();
                self.device.handle_queue(queue, &mut self.active)
            }
            Step::Config(fields) => {
                self.device.write_config(fields, &mut self.active);
                Ok(())
            }
            Step::Poll => self.poll(),
        }
    }

    fn poll(&mut self) -> Result<(), Error> {
        let mut events = [EpollEvent::default(); 8];
        let ready = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..ready] {
            let (token, set) = (event.data(), event.event_set());
            self.device.handle_source(token, set, &mut self.active)?;
        }
        Ok(())
    }

    fn offer(&mut self, queue: usize, buffers: &[Buffer]) {
        let base = queue as u64 * QUEUE_SPAN;
        let count = buffers.len().min(usize::from(QUEUE_SIZE));
        for (slot, buffer) in buffers[..count].iter().enumerate() {
            let last = slot + 1 == count;
            let link = if last { 0 } else { F_NEXT };
            let following = slot as u16 + 1;
            let (address, len, flags, next) = match buffer {
                Buffer::Out(bytes) => {
                    let at = self.place(bytes.len() as u64);
                    let _ = self.active.memory.write(bytes, GuestAddress(at));
                    (at, bytes.len() as u32, link, following)
                }
                Buffer::In(len) => {
                    let at = self.place(u64::from(*len));
                    (at, u32::from(*len), link | F_WRITE, following)
                }
                Buffer::Raw {
                    address,
                    len,
                    flags,
                    next,
                } => (*address, *len, *flags, *next),
            };
            let at = base + 16 * slot as u64;
            self.write(at, &address.to_le_bytes());
            self.write(at + 8, &len.to_le_bytes());
            self.write(at + 12, &flags.to_le_bytes());
            self.write(at + 14, &next.to_le_bytes());
        }
        let available = self.available[queue];
        let entry = base + AVAILABLE + 4 + 2 * u64::from(available % QUEUE_SIZE);
        self.write(entry, &0_u16.to_le_bytes());
        self.available[queue] = available.wrapping_add(1);
        self.write(
            base + AVAILABLE + 2,
            &available.wrapping_add(1).to_le_bytes(),
        );
    }

    /// Room for a buffer; when there is none left, the first ones are used again.
    fn place(&mut self, len: u64) -> u64 {
        if self.next_buffer + len > MEMORY_BYTES as u64 {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer += len;
        at
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.active
            .memory
            .write_slice(bytes, GuestAddress(at))
            .expect("the rings lie in memory");
    }
}

fn queue(index: usize, counters: &Arc<DeviceCounters>) -> ActiveQueue {
    let base = index as u64 * QUEUE_SPAN;
    let mut ring = Queue::new(QUEUE_SIZE).expect("a power of two");
    ring.set_size(QUEUE_SIZE);
    ring.set_event_idx(true);
    ring.try_set_desc_table_address(GuestAddress(base))
        .expect("aligned");
    ring.try_set_avail_ring_address(GuestAddress(base + AVAILABLE))
        .expect("aligned");
    ring.try_set_used_ring_address(GuestAddress(base + USED))
        .expect("aligned");
    ring.set_ready(true);
    let interrupt = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    ActiveQueue::new(index, ring, interrupt, Arc::clone(counters))
}

/// Drives a fresh device through `steps`, until it stops.
pub fn drive(device: impl VirtioDevice, steps: &[Step]) {
    let mut machine = Machine::new(device);
    for step in steps {
        if machine.step(step).is_err() {
            return;
        }
    }
}
