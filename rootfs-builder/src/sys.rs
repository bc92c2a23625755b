//! fs-verity: files that cannot change any more, and whose every page is checked when it is read.
#![expect(
    unsafe_code,
    reason = "the two requests have no wrapper in a crate that is used here"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `struct fsverity_enable_arg`
#[repr(C)]
#[derive(Default)]
struct EnableArg {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt_ptr: u64,
    sig_size: u32,
    reserved1: u32,
    sig_ptr: u64,
    reserved2: [u64; 11],
}

/// `struct fsverity_digest` with room for a SHA-256.
#[repr(C)]
struct DigestArg {
    algorithm: u16,
    size: u16,
    digest: [u8; 32],
}

const HASH_SHA256: u32 = 1;
const BLOCK_BYTES: u32 = 4096;
const DIGEST_BYTES: u16 = 32;

nix::ioctl_write_ptr!(
    /// `FS_IOC_ENABLE_VERITY`
    enable_verity, b'f', 133, EnableArg
);
// `FS_IOC_MEASURE_VERITY`, whose number counts the structure without the digest.
nix::ioctl_readwrite_bad!(
    measure_verity,
    nix::request_code_readwrite!(b'f', 134, 4),
    DigestArg
);

/// Makes a file, which nobody may have open for writing, unchangeable for ever.
///
/// # Errors
///
/// When its file system cannot do that.
pub(crate) fn seal(file: &File) -> io::Result<()> {
    let argument = EnableArg {
        version: 1,
        hash_algorithm: HASH_SHA256,
        block_size: BLOCK_BYTES,
        ..EnableArg::default()
    };
    // SAFETY: the structure is the kernel's, whole, and names neither salt nor signature, so that
    // the kernel follows no pointer.
    unsafe { enable_verity(file.as_raw_fd(), &raw const argument) }?;
    Ok(())
}

/// The digest by which the kernel checks a file; `None` where it does not check it.
///
/// # Errors
///
/// When the kernel refuses to tell.
pub(crate) fn measured(file: &File) -> io::Result<Option<[u8; 32]>> {
    let mut argument = DigestArg {
        algorithm: 0,
        size: DIGEST_BYTES,
        digest: [0; 32],
    };
    // SAFETY: the kernel writes no more bytes behind the first four than `size` says, and there
    // are as many.
    match unsafe { measure_verity(file.as_raw_fd(), &raw mut argument) } {
        Ok(_) => Ok(Some(argument.digest)),
        Err(
            nix::errno::Errno::ENODATA | nix::errno::Errno::ENOTTY | nix::errno::Errno::EOPNOTSUPP,
        ) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_sealed_has_no_digest() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(measured(&file).unwrap(), None);
    }

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!(size_of::<EnableArg>(), 128);
        assert_eq!(std::mem::offset_of!(DigestArg, digest), 4);
    }
}
