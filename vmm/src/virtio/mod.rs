//! Virtio devices (virtio 1.2): small state machines that own no thread and
//! wait on nothing. The worker in [`worker`] calls them; the PCI transport
//! gives them to it when the driver is ready.
//!
//! ```text
//!   Idle(device) --DRIVER_OK--> Running(worker) --reset, when the worker comes to it--> Idle(device)
//! ```

use std::{ops::Range, sync::Arc};

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub mod balloon;
pub mod blk;
pub mod build;
pub mod chain;
pub mod console;
pub mod fs;
pub mod mailbox;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod slices;
pub mod sources;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod worker;

pub use chain::Chain;
pub use queue::ActiveQueue;
pub use sources::{Events, Sources};

use crate::counters::DeviceCounters;

/// The guest's memory as devices reach it. Read-only image regions are not in it.
pub type Memory = GuestMemoryMmap<()>;

/// `VIRTIO_F_INDIRECT_DESC` (virtio 1.2, section 6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX` (virtio 1.2, section 6).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1` (virtio 1.2, section 6).
pub const F_VERSION_1: u64 = 1 << 32;

/// The kinds of device, by their virtio device id (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// Network card.
    Net = 1,
    /// Block device.
    Blk = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// File system device.
    Fs = 26,
    /// Persistent memory.
    Pmem = 27,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Net,
        Self::Blk,
        Self::Console,
        Self::Rng,
        Self::Balloon,
        Self::Vsock,
        Self::Fs,
        Self::Pmem,
    ];

    /// The device's name in messages, thread names and counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Blk => "blk",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
            Self::Pmem => "pmem",
        }
    }
}

/// What stops a device. The guest's driver sees `DEVICE_NEEDS_RESET`; the VM
/// and its other devices go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver broke the rules of its ring or of a request.
    #[error("bad request on queue {queue}: {what}")]
    BadRequest {
        /// The queue's index.
        queue: usize,
        /// Which rule was broken.
        what: &'static str,
    },
    /// The ring itself cannot be used.
    #[error("queue {queue} is broken")]
    Queue {
        /// The queue's index.
        queue: usize,
        /// What the queue said.
        #[source]
        source: virtio_queue::Error,
    },
    /// The host side failed in a way that no status of a request can tell.
    #[error("cannot {what}")]
    Host {
        /// What was being tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// One virtio device.
///
/// Everything in the queues is written by the guest and hostile: parse it in
/// pure functions, bound every loop and allocation, answer rather than panic.
pub trait VirtioDevice: Send {
    /// What the device is.
    fn kind(&self) -> Kind;

    /// The largest size of each queue, a power of two each.
    fn queue_sizes(&self) -> &[u16];

    /// Device-specific feature bits on offer. The transport adds
    /// [`F_VERSION_1`], [`F_EVENT_IDX`] and [`F_INDIRECT_DESC`].
    fn features(&self) -> u64;

    /// The device's configuration space as the driver first reads it.
    fn config_space(&self) -> Vec<u8>;

    /// Whether each queue gets an interrupt vector of its own. Otherwise all
    /// share one, which spares the guest exits at boot.
    fn vector_per_queue(&self) -> bool {
        false
    }

    /// The driver is ready: remembers the features agreed on, puts the device's own descriptors into
    /// [`Active::sources`].
    ///
    /// # Errors
    /// When the host side cannot be set up; the device is then stopped.
    fn activate(&mut self, active: &mut Active) -> Result<(), Error> {
        let _ = active;
        Ok(())
    }

    /// The driver has put buffers into a queue. Takes what it can use from
    /// `active.queues[index]` and signals the driver once at the end.
    ///
    /// # Errors
    /// When the ring or a request breaks the rules; the device is then stopped.
    fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error>;

    /// Whether a driver that was answered on this queue mostly asks again at once, so that it is
    /// worth a few microseconds to wait for that; it asked for `together` things at once, which
    /// may be none.
    fn awaits_more(&self, index: usize, together: u16) -> bool {
        let _ = (index, together);
        false
    }

    /// While queue `index` is awaited: does what is due for the device's own descriptors.
    /// Whether that was anything.
    ///
    /// # Errors
    /// As [`VirtioDevice::handle_queue`].
    fn look_around(&mut self, index: usize, active: &mut Active) -> Result<bool, Error> {
        let _ = (index, active);
        Ok(false)
    }

    /// The queue, one of those that are awaited, on which the driver is likely to answer what the
    /// descriptor `token` had for it.
    fn answered_on(&self, token: u64) -> Option<usize> {
        let _ = token;
        None
    }

    /// A descriptor in [`Active::sources`] is ready.
    ///
    /// # Errors
    /// As [`VirtioDevice::handle_queue`].
    fn handle_source(
        &mut self,
        token: u64,
        events: Events,
        active: &mut Active,
    ) -> Result<(), Error> {
        let _ = (token, events, active);
        Ok(())
    }

    /// The part of the configuration space that the driver may write; most devices have none.
    fn driver_fields(&self) -> Range<usize> {
        0..0
    }

    /// The driver wrote to [`VirtioDevice::driver_fields`], which now are `fields`. Not every write
    /// is told, only the last one since the device looked.
    fn write_config(&mut self, fields: &[u8], active: &mut Active) {
        let _ = (fields, active);
    }

    /// The link of a network card goes up or down; `active` while the driver uses it.
    ///
    /// # Errors
    /// When the host refuses; the device is then stopped.
    fn set_link(&mut self, link: Link, active: Option<&mut Active>) -> Result<(), Error> {
        let _ = (link, active);
        Ok(())
    }

    /// The device was stopped: forgets everything that the driver had set up.
    fn reset(&mut self) {}
}

/// Whether a network card has a cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// It has.
    Up,
    /// It has not.
    Down,
}

/// What a running device works with.
pub struct Active {
    /// The guest's memory.
    pub memory: Memory,
    /// The queues; those that the driver did not enable are not ready and stay empty.
    pub queues: Vec<ActiveQueue>,
    /// The queues' eventfds, which the worker listens to.
    pub kicks: Vec<Arc<EventFd>>,
    /// The features that device and driver agreed on.
    pub features: u64,
    /// The device's own descriptors.
    pub sources: Sources,
    /// The device's counters.
    pub counters: Arc<DeviceCounters>,
    /// How to tell the driver of a changed configuration space.
    pub config: ConfigChange,
}

/// Tells the driver that the configuration space changed.
pub struct ConfigChange {
    notify: Notify,
}

type Notify = Box<dyn Fn(&[u8]) + Send>;

impl ConfigChange {
    /// `notify` publishes the new contents and interrupts the driver.
    pub fn new(notify: impl Fn(&[u8]) + Send + 'static) -> Self {
        Self {
            notify: Box::new(notify),
        }
    }

    /// Publishes `config`, the whole new configuration space, and interrupts the driver.
    pub fn publish(&self, config: &[u8]) {
        (self.notify)(config);
    }
}
