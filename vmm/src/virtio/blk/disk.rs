//! The host's side of a disk: a raw image file or a block device. Knows
//! nothing of virtio.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt},
};

use nix::{
    fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl},
    sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs},
};
use vm_memory::VolatileSlice;

use super::{request::Extent, sys};

/// What is written where the file system cannot zero a range by itself.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a regular file nor a block device.
    #[error("the disk must be a regular file or a block device")]
    Kind,
    /// Less than one sector.
    #[error("the disk has {0} bytes, it needs at least 512")]
    Size(u64),
    /// The descriptor may not be written.
    #[error("the disk was opened for reading only: open it for writing, or make it read-only")]
    Access,
    /// Its attributes cannot be read.
    #[error("cannot look at the disk")]
    Look(#[source] io::Error),
}

/// A raw image file or a block device.
pub struct Disk {
    file: File,
    bytes: u64,
}

impl Disk {
    /// Looks at an open file.
    ///
    /// # Errors
    /// When it is neither a file nor a block device, has no sector, or may not be written
    /// although it should.
    pub fn new(mut file: File, read_only: bool) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(Error::Look)?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(Error::Kind);
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|error| Error::Look(error.into()))?;
        if !read_only && flags & OFlag::O_ACCMODE.bits() != libc::O_RDWR {
            return Err(Error::Access);
        }
        // The end is where a block device says its size too.
        let bytes = file.seek(SeekFrom::End(0)).map_err(Error::Look)?;
        if bytes < 512 {
            return Err(Error::Size(bytes));
        }
        Ok(Self { file, bytes })
    }

    /// The size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the contents are in the host's memory and nowhere else, so that nothing is gained
    /// by asking for several things at a time.
    pub(super) fn is_in_memory(&self) -> bool {
        // A device's node is in memory, too; its contents are not.
        let is_file = self.file.metadata().is_ok_and(|it| it.is_file());
        is_file
            && fstatfs(&self.file).is_ok_and(|system| {
                let kind = system.filesystem_type();
                kind == TMPFS_MAGIC || kind == HUGETLBFS_MAGIC
            })
    }

    /// The file or device itself.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Fills all of `buffers` with what is at `offset`.
    ///
    /// # Errors
    /// The host's; `UnexpectedEof` when the file has become shorter.
    pub fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        sys::read_at(&self.file, buffers, offset)
    }

    /// Writes all of `buffers` to `offset`.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        sys::write_at(&self.file, buffers, offset)
    }

    /// Makes everything written so far outlast a crash of the host.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives a range up.
    ///
    /// # Errors
    /// The host's; `EOPNOTSUPP` when it cannot.
    pub fn discard(&self, extent: &Extent) -> io::Result<()> {
        self.punch(extent)
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The host's.
    pub fn write_zeroes(&self, extent: &Extent) -> io::Result<()> {
        let by_host = if extent.unmap {
            self.punch(extent)
        } else {
            self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, extent)
        };
        match by_host {
            Err(error) if is_unsupported(&error) => self.zero_by_hand(extent),
            done => done,
        }
    }

    fn punch(&self, extent: &Extent) -> io::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, extent)
    }

    /// One call for files and, since Linux 4.9, for block devices.
    fn allocate(&self, how: FallocateFlags, extent: &Extent) -> io::Result<()> {
        if extent.bytes.is_empty() {
            return Ok(());
        }
        let number =
            |bytes| i64::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG));
        let offset = number(extent.bytes.start)?;
        let len = number(extent.bytes.end - extent.bytes.start)?;
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, how, offset, len)?)
    }

    fn zero_by_hand(&self, extent: &Extent) -> io::Result<()> {
        let mut at = extent.bytes.start;
        while at < extent.bytes.end {
            let len = (extent.bytes.end - at).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }
}

/// Whether the host has no such operation.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}
