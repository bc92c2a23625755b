//! Gives pages of the guest's memory back to the host.
#![expect(unsafe_code, reason = "madvise on guest memory")]

use std::io;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// Frees the `len` bytes at `offset` in `region`; what the guest reads there afterwards is zero.
/// Only whole pages are freed.
///
/// # Errors
/// When the range is not inside of the region or the kernel refuses.
pub(super) fn free(region: &GuestRegionMmap<()>, offset: u64, len: u64) -> io::Result<()> {
    let mapped = u64::try_from(region.size()).unwrap_or(u64::MAX);
    let page = page_bytes();
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let end = offset.checked_add(len).ok_or_else(outside)?;
    if end > mapped {
        return Err(outside());
    }
    let start = offset.next_multiple_of(page);
    let end = end - end % page;
    if start >= end {
        return Ok(());
    }
    // A shared mapping keeps its pages in the file behind it: they go only with a hole in that.
    let advice = if region.flags() & libc::MAP_SHARED != 0 {
        libc::MADV_REMOVE
    } else {
        libc::MADV_DONTNEED
    };
    let address = region
        .get_host_address(MemoryRegionAddress(start))
        .map_err(io::Error::other)?;
    // SAFETY: start..end lies in the region, which stays mapped while it is borrowed. No
    // reference of Rust points into guest memory; for all others the pages turn to zeros, as if
    // the guest had written them.
    let result = unsafe { libc::madvise(address.cast(), (end - start) as usize, advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn page_bytes() -> u64 {
    // SAFETY: sysconf reads a constant of the system.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4096)
}
