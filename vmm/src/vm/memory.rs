//! The guest's RAM, and memory that the VMM and the guest both see.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use crate::{arch::x86_64::layout, virtio::Memory};

/// Why memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No memfd or not of that size.
    #[error("cannot make {what} of {bytes} bytes")]
    Create {
        /// Which memory.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be mapped.
    #[error("cannot map {what} of {bytes} bytes: {reason}")]
    Map {
        /// Which memory.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// Why.
        reason: String,
    },
    /// The size is not one a guest can have.
    #[error("memory_mib is {mib}: a guest has 64 to 524288 MiB")]
    Size {
        /// What was asked for.
        mib: u64,
    },
    /// An image file that holds nothing.
    #[error("the image is empty")]
    EmptyImage,
}

/// Makes the guest's RAM: anonymous memory, in large pages where the host has them
/// (`docs/decisions/0010-guest-ram.md`).
///
/// # Errors
/// When the size is out of bounds or the host has no room for the mapping.
pub fn guest_ram(mib: u64) -> Result<Memory, Error> {
    if !(64..=512 << 10).contains(&mib) {
        return Err(Error::Size { mib });
    }
    let mut regions = Vec::new();
    for (start, len) in layout::ram_ranges(mib << 20) {
        let mapping = super::sys::map_large(len as usize)
            .map_err(|error| map_error("guest memory", len, &error))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .expect("the ranges do not reach the end of the address space");
        regions.push(region);
    }
    Memory::from_regions(regions).map_err(|error| map_error("guest memory", mib << 20, &error))
}

/// A file of the host as memory of the guest.
pub struct Image {
    mapping: MmapRegion,
    read_only: bool,
}

impl Image {
    /// Maps a file; read-only files are mapped without write access, and their pages are those of
    /// the host's page cache, shared by every VM that maps them. The mapping's size is the
    /// file's, rounded up to pages. The file is closed: whoever takes this process over could open
    /// it again for writing.
    ///
    /// # Errors
    /// When the file is empty or cannot be mapped.
    pub fn map(file: OwnedFd, read_only: bool) -> Result<Self, Error> {
        let what = "the image";
        let file = File::from(file);
        let bytes = file
            .metadata()
            .map_err(|source| Error::Create {
                what,
                bytes: 0,
                source,
            })?
            .len()
            .next_multiple_of(0x1000);
        if bytes == 0 {
            return Err(Error::EmptyImage);
        }
        let write = if read_only { 0 } else { libc::PROT_WRITE };
        let mapping = super::sys::map_file(&file, bytes as usize, libc::PROT_READ | write)
            .map_err(|error| map_error(what, bytes, &error))?;
        Ok(Self { mapping, read_only })
    }

    /// Its size in bytes, whole pages.
    pub fn len(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// Never: an empty file is refused.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Where it is mapped in this process.
    pub fn host_address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Whether the guest may only read it.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
}

/// Memory that a file backs and that both sides may write.
///
/// # Errors
/// When it cannot be mapped.
pub fn map_shared(what: &'static str, file: OwnedFd, bytes: u64) -> Result<MmapRegion, Error> {
    MmapRegion::from_file(FileOffset::new(File::from(file), 0), bytes as usize)
        .map_err(|error| map_error(what, bytes, &error))
}

/// Anonymous memory of that size behind a descriptor.
///
/// # Errors
/// When the host refuses.
pub fn memfd(what: &'static str, bytes: u64) -> Result<OwnedFd, Error> {
    let create = |source: nix::Error| Error::Create {
        what,
        bytes,
        source: source.into(),
    };
    let fd = memfd_create(what, MFdFlags::MFD_CLOEXEC).map_err(create)?;
    nix::unistd::ftruncate(fd.as_fd(), bytes as i64).map_err(create)?;
    Ok(fd)
}

fn map_error(what: &'static str, bytes: u64, error: &dyn std::fmt::Display) -> Error {
    Error::Map {
        what,
        bytes,
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestMemory, GuestMemoryRegion};

    use super::*;

    #[test]
    fn ram_over_three_gib_goes_around_the_hole() {
        let memory = guest_ram(4096).unwrap();
        let ranges: Vec<_> = memory
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .collect();
        assert_eq!(ranges, [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for mib in [0, 63, (512 << 10) + 1] {
            assert!(matches!(guest_ram(mib), Err(Error::Size { .. })));
        }
    }

    #[test]
    fn an_image_is_there_without_its_descriptor() {
        use std::{io::Write, os::fd::AsRawFd};

        use vm_memory::{Bytes, VolatileMemory};

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"image").unwrap();
        let file = OwnedFd::from(file);
        let number = file.as_raw_fd();
        let name = || std::fs::read_link(format!("/proc/self/fd/{number}")).ok();
        let before = name();
        let image = Image::map(file, true).unwrap();
        assert_ne!(name(), before);
        let mut bytes = [0; 5];
        let contents = image.mapping.get_slice(0, 5).unwrap();
        contents.read_slice(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"image");
    }

    #[test]
    fn an_empty_image_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(
            Image::map(file.into(), true),
            Err(Error::EmptyImage)
        ));
    }
}
