//! What the guest says of its memory (virtio 1.2, section 5.5.6.3). The driver
//! leaves one buffer with the device; giving it back asks for new numbers.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// `struct virtio_balloon_stat`, packed: a tag of 2 bytes and a value of 8.
const STATISTIC_BYTES: usize = 10;

/// The most of a driver's buffer that is read; the standard has 10 statistics.
pub const MAX_BYTES: usize = 64 * STATISTIC_BYTES;

/// The guest's memory as the guest says it is: believe nothing that matters. What it did not say
/// is `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    pub minor_faults: Option<u64>,
    /// Bytes that are used for nothing.
    pub free: Option<u64>,
    /// Bytes in all.
    pub total: Option<u64>,
    /// Bytes that programs could have without swapping.
    pub available: Option<u64>,
    /// Bytes that cache files.
    pub disk_caches: Option<u64>,
    /// Huge pages allocated.
    pub huge_page_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    pub huge_page_failures: Option<u64>,
}

impl Statistics {
    /// Reads the driver's buffer. Unknown tags are ignored, the last of a kind counts.
    ///
    /// ```
    /// use vmm::virtio::balloon::statistics::Statistics;
    /// let free = [4, 0, 0, 0x10, 0, 0, 0, 0, 0, 0];
    /// assert_eq!(Statistics::parse(&free).free, Some(4096));
    /// ```
    pub fn parse(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        for entry in bytes.chunks_exact(STATISTIC_BYTES) {
            let mut value = [0; 8];
            value.copy_from_slice(&entry[2..]);
            let value = Some(u64::from_le_bytes(value));
            match u16::from_le_bytes([entry[0], entry[1]]) {
                0 => statistics.swap_in = value,
                1 => statistics.swap_out = value,
                2 => statistics.major_faults = value,
                3 => statistics.minor_faults = value,
                4 => statistics.free = value,
                5 => statistics.total = value,
                6 => statistics.available = value,
                7 => statistics.disk_caches = value,
                8 => statistics.huge_page_allocations = value,
                9 => statistics.huge_page_failures = value,
                _ => {}
            }
        }
        statistics
    }
}

/// Reads the guest's statistics from outside of the device's thread.
#[derive(Clone)]
pub struct Monitor {
    latest: Arc<Mutex<Option<Statistics>>>,
    wanted: Arc<EventFd>,
}

impl Monitor {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            latest: Arc::default(),
            wanted: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    /// Asks the guest for new statistics, which it may or may not send.
    pub fn refresh(&self) {
        // It fails only when many have asked already.
        let _ = self.wanted.write(1);
    }

    /// What the guest said last.
    pub fn latest(&self) -> Option<Statistics> {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, statistics: Option<Statistics>) {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = statistics;
    }

    pub(super) fn wanted(&self) -> &EventFd {
        &self.wanted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn unknown_tags_and_half_entries_are_ignored() {
        let mut bytes = vec![77, 0, 1, 1, 1, 1, 1, 1, 1, 1];
        bytes.extend([5, 0, 9]);
        assert_eq!(Statistics::parse(&bytes), Statistics::default());
    }

    proptest! {
        #[test]
        fn any_bytes_are_statistics(bytes in proptest::collection::vec(any::<u8>(), 0..1000)) {
            Statistics::parse(&bytes);
        }
    }
}
