//! What is counted: exits by kind, kicks, interrupts and bytes. Exits per boot
//! and per I/O are the numbers that compare on any machine.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

/// One number that several threads add to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What one virtio device counts.
#[derive(Debug, Default)]
pub struct DeviceCounters {
    /// Notifications of the driver that reached the device.
    pub kicks: Counter,
    /// Interrupts sent to the driver.
    pub interrupts: Counter,
    /// Requests or packets done.
    pub requests: Counter,
    /// Bytes that the guest took in from the device.
    pub bytes_to_guest: Counter,
    /// Bytes that the guest gave out to the device.
    pub bytes_from_guest: Counter,
    /// Packets that were not passed on.
    pub dropped: Counter,
}

/// A reading of [`DeviceCounters`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReading {
    /// Notifications of the driver that reached the device.
    pub kicks: u64,
    /// Interrupts sent to the driver.
    pub interrupts: u64,
    /// Requests or packets done.
    pub requests: u64,
    /// Bytes that the guest took in from the device.
    pub bytes_to_guest: u64,
    /// Bytes that the guest gave out to the device.
    pub bytes_from_guest: u64,
    /// Packets that were not passed on.
    #[serde(default)]
    pub dropped: u64,
}

impl DeviceCounters {
    /// Bytes in both directions.
    pub(crate) fn bytes(&self) -> u64 {
        let to_guest = self.bytes_to_guest.get();
        to_guest.wrapping_add(self.bytes_from_guest.get())
    }

    /// Reads every number.
    pub fn read(&self) -> DeviceReading {
        DeviceReading {
            kicks: self.kicks.get(),
            interrupts: self.interrupts.get(),
            requests: self.requests.get(),
            bytes_to_guest: self.bytes_to_guest.get(),
            bytes_from_guest: self.bytes_from_guest.get(),
            dropped: self.dropped.get(),
        }
    }
}

/// Exits of guest code that reached this process, by kind.
#[derive(Debug, Default)]
pub struct ExitCounters {
    /// Port reads.
    pub io_in: Counter,
    /// Port writes.
    pub io_out: Counter,
    /// Reads of addresses that no memslot serves.
    pub mmio_read: Counter,
    /// Writes to addresses that no writable memslot serves.
    pub mmio_write: Counter,
    /// A signal to the processor's thread.
    pub interrupted: Counter,
    /// Anything else.
    pub other: Counter,
}
