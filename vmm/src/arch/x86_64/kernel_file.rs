//! The kernel's file as its loader reads it: mapped from the host's page cache and copied once,
//! by this process. Read by system calls, each page would cost the kernel more to find than the
//! copying takes.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

use vm_memory::{
    FileOffset, MmapRegion, ReadVolatile, VolatileMemory, VolatileMemoryError, VolatileSlice,
    bitmap::BitmapSlice, mmap::MmapRegionBuilder,
};

/// A kernel's file and the place where it is read next.
pub(super) struct KernelFile {
    mapping: MmapRegion,
    at: usize,
}

impl KernelFile {
    /// Maps the whole file. Like a guest's image it must not shrink as long as this lives.
    ///
    /// # Errors
    /// When the file is empty or cannot be mapped.
    pub(super) fn map(file: &File) -> io::Result<Self> {
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mapping = MmapRegionBuilder::new(bytes)
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file.try_clone()?, 0))
            .build()
            .map_err(io::Error::other)?;
        Ok(Self { mapping, at: 0 })
    }

    /// The next bytes, at most `len`, and moves on behind them.
    fn next(&mut self, len: usize) -> VolatileSlice<'_> {
        let at = self.at.min(self.mapping.size());
        let len = len.min(self.mapping.size() - at);
        self.at = at + len;
        self.mapping
            .get_slice(at, len)
            .expect("the length was cut to the mapping")
    }
}

impl Read for KernelFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(self.next(buffer.len()).copy_to(buffer))
    }
}

impl ReadVolatile for KernelFile {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let bytes = self.next(buffer.len());
        bytes.copy_to_volatile_slice(buffer.subslice(0, bytes.len())?);
        Ok(bytes.len())
    }
}

impl Seek for KernelFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(place) => Some(place),
            SeekFrom::End(distance) => (self.mapping.size() as u64).checked_add_signed(distance),
            SeekFrom::Current(distance) => (self.at as u64).checked_add_signed(distance),
        };
        let place = place.ok_or(io::ErrorKind::InvalidInput)?;
        self.at = usize::try_from(place).map_err(io::Error::other)?;
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn kernel(bytes: &[u8]) -> KernelFile {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        KernelFile::map(&file).unwrap()
    }

    #[test]
    fn it_reads_as_the_file_does() {
        let mut kernel = kernel(b"0123456789");
        assert_eq!(kernel.seek(SeekFrom::Start(4)).unwrap(), 4);
        let mut text = [0; 3];
        kernel.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"456");
        assert_eq!(kernel.seek(SeekFrom::End(-1)).unwrap(), 9);
        assert_eq!(kernel.read(&mut text).unwrap(), 1);
        assert_eq!(kernel.read(&mut text).unwrap(), 0);
    }

    #[test]
    fn a_place_behind_its_end_has_nothing_to_read() {
        let mut kernel = kernel(b"0123");
        kernel.seek(SeekFrom::Start(1 << 40)).unwrap();
        assert_eq!(kernel.read(&mut [0; 4]).unwrap(), 0);
        assert!(kernel.seek(SeekFrom::Current(i64::MIN)).is_err());
    }

    #[test]
    fn memory_is_filled_as_far_as_the_file_reaches() {
        let mut kernel = kernel(b"0123456789");
        kernel.seek(SeekFrom::Start(6)).unwrap();
        let mut memory = [b'-'; 6];
        let filled = kernel
            .read_volatile(&mut VolatileSlice::from(&mut memory[..]))
            .unwrap();
        assert_eq!((filled, &memory), (4, b"6789--"));
    }
}
