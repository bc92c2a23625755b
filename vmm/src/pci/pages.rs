//! Pages that the guest reads without an exit: read-only memslots to KVM,
//! plain memory to the VMM, which changes them when the guest writes.

use std::{os::fd::OwnedFd, sync::Arc};

use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

use crate::vm::memory;

/// Bytes of a page.
pub const PAGE: usize = 0x1000;

/// A run of memory shared between the VMM and a read-only memslot.
pub struct Pages {
    mapping: MmapRegion,
}

impl Pages {
    /// Zeroed memory of `bytes`; pages never touched cost nothing.
    ///
    /// # Errors
    /// When the host has no memory for it.
    pub fn new(what: &'static str, bytes: u64) -> Result<Arc<Self>, memory::Error> {
        let memfd: OwnedFd = memory::memfd(what, bytes)?;
        Ok(Arc::new(Self {
            mapping: memory::map_shared(what, memfd, bytes)?,
        }))
    }

    /// Where it lies in this process, for the memslot.
    pub fn host_address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// Never: there is no room of no size.
    pub fn is_empty(&self) -> bool {
        self.mapping.size() == 0
    }
}

/// One page of [`Pages`].
#[derive(Clone)]
pub struct Page {
    pages: Arc<Pages>,
    offset: usize,
}

impl Page {
    /// The page that starts at `offset`.
    ///
    /// # Panics
    /// When the page lies outside, which is a bug of ours: offsets come from the slot's number.
    pub fn new(pages: &Arc<Pages>, offset: usize) -> Self {
        assert!(
            offset + PAGE <= pages.mapping.size(),
            "a page lies within its pages"
        );
        Self {
            pages: Arc::clone(pages),
            offset,
        }
    }

    /// Writes as much of `bytes` as fits from `at`.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let len = bytes.len().min(PAGE.saturating_sub(at));
        self.slice()
            .write_slice(&bytes[..len], at.min(PAGE))
            .expect("the length was cut to the page");
    }

    /// Reads into as much of `bytes` as the page has from `at`; the rest stays.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        let len = bytes.len().min(PAGE.saturating_sub(at));
        self.slice()
            .read_slice(&mut bytes[..len], at.min(PAGE))
            .expect("the length was cut to the page");
    }

    /// Makes all of it zero.
    pub fn clear(&self) {
        self.write(0, &[0; PAGE]);
    }

    /// The little-endian number at `at`.
    pub fn u32_at(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn slice(&self) -> VolatileSlice<'_> {
        self.pages
            .mapping
            .get_slice(self.offset, PAGE)
            .expect("checked when the page was made")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_does_not_reach_into_the_next() {
        let pages = Pages::new("test-pages", 2 * PAGE as u64).unwrap();
        let (first, second) = (Page::new(&pages, 0), Page::new(&pages, PAGE));
        first.write(PAGE - 2, &[1, 2, 3, 4]);
        assert_eq!(second.u32_at(0), 0);
        let mut bytes = [9; 4];
        first.read(PAGE - 2, &mut bytes);
        assert_eq!(bytes, [1, 2, 9, 9]);
    }
}
