//! A virtqueue of a running device: the ring, its kick and its interrupt.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{Error, Memory};
use crate::counters::DeviceCounters;

/// A split virtqueue (virtio 1.2, section 2.7) in use.
pub struct ActiveQueue {
    index: usize,
    ring: Queue,
    /// Written to interrupt the driver: an irqfd of KVM.
    interrupt: Arc<EventFd>,
    counters: Arc<DeviceCounters>,
}

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
            counters,
        }
    }

    /// Takes the next chain of descriptors that the driver offers.
    ///
    /// # Errors
    /// When the available index runs ahead of the ring or lies outside of memory.
    pub fn pop<'m>(
        &mut self,
        memory: &'m Memory,
    ) -> Result<Option<DescriptorChain<&'m Memory>>, Error> {
        if !self.ring.ready() {
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
        Ok(chain)
    }

    /// Puts the chain that [`ActiveQueue::pop`] gave last back, to be given again.
    pub fn unpop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives a chain back to the driver, with `len` bytes written into it.
    ///
    /// # Errors
    /// When the used ring lies outside of memory or `head` outside of the ring.
    pub fn push(&mut self, memory: &Memory, head: u16, len: u32) -> Result<(), Error> {
        self.counters.requests.add(1);
        let index = self.index;
        self.ring
            .add_used(memory, head, len)
            .map_err(|source| Error::Queue {
                queue: index,
                source,
            })
    }

    /// Interrupts the driver if it wants to hear of what was pushed since the last call.
    ///
    /// # Errors
    /// When the ring lies outside of memory.
    pub fn signal(&mut self, memory: &Memory) -> Result<(), Error> {
        let index = self.index;
        let wanted = self
            .ring
            .needs_notification(memory)
            .map_err(|source| Error::Queue {
                queue: index,
                source,
            })?;
        if wanted {
            self.interrupt();
        }
        Ok(())
    }

    /// Whether the driver set this queue up.
    pub fn ready(&self) -> bool {
        self.ring.ready()
    }

    /// Asks the driver for no kicks while the queue is worked on.
    pub(crate) fn pause_kicks(&mut self, memory: &Memory) -> Result<(), Error> {
        let index = self.index;
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
