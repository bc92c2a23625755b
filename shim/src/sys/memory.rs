//! Memory that a process can do without while it waits.

use std::{
    ffi::{c_int, c_void},
    ptr, slice,
};

const PAGE: usize = 4096;

/// Gives back what starting took and waiting does not need: pages of the program and its libraries
/// that were read from their files, which are read again when they are used, and the free parts of
/// the heap.
pub(crate) fn give_back() {
    // SAFETY: takes a number, and touches only what the allocator has for itself.
    unsafe { libc::malloc_trim(0) };
    // SAFETY: `give_back_object` is such a function and uses no data.
    unsafe { libc::dl_iterate_phdr(Some(give_back_object), ptr::null_mut()) };
}

/// Gives back the pages of one program or library that nobody can have written to.
unsafe extern "C" fn give_back_object(
    object: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: the loader passes a description that is valid during the call.
    let object = unsafe { &*object };
    // SAFETY: the description names the object's headers and their number.
    let headers = unsafe { slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        // Whole pages of this segment alone.
        let start = (object.dlpi_addr as usize).wrapping_add(header.p_vaddr as usize);
        let end = start.wrapping_add(header.p_memsz as usize) & !(PAGE - 1);
        let start = start.next_multiple_of(PAGE);
        if let Some(len) = end.checked_sub(start).filter(|len| *len > 0) {
            let start = ptr::without_provenance_mut(start);
            // SAFETY: the range is a mapping of a file that was never writable, neither by its
            // flags nor for relocations (nothing here has relocations in such segments), so each
            // page reads from the file what it read before.
            unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) };
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory of files that is mapped at the moment.
    fn mapped_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssFile:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse().unwrap()
    }

    #[test]
    fn a_program_goes_on_when_its_memory_was_given_back() {
        // Other tests use memory meanwhile.
        let mut seen = Vec::new();
        while seen.iter().all(|(before, after)| after >= before) {
            assert!(seen.len() < 20, "KiB before and after: {seen:?}");
            let before = mapped_kib();
            give_back();
            seen.push((before, mapped_kib()));
        }
        assert_eq!(format!("{:?}", vec![1.5; 2]), "[1.5, 1.5]");
    }
}
