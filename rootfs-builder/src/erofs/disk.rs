//! EROFS on disk, as far as an uncompressed image has it. Everything is little-endian.
//!
//! ```text
//!   block 0   1024 zeros · superblock (128) · inodes and small directories ...
//!   ...       the blocks of large directories
//!   ...       the contents of files, each from a block of its own
//! ```
//!
//! An inode is named by its place: `nid` times 32 is where it begins. Behind its 64 bytes lie its
//! extended attributes, behind these what of a directory or symbolic link fills no whole block.
//! The kernel's `fs/erofs/erofs_fs.h` is the specification.

/// The size of a block.
pub(super) const BLOCK: usize = 4096;

/// Where the superblock lies.
pub(super) const SUPERBLOCK: usize = 1024;

/// What it begins with.
pub(super) const MAGIC: u32 = 0xe0f5_e1e2;

/// Its size, behind which the first inode may begin.
pub(super) const SUPERBLOCK_BYTES: usize = 128;

/// The unit of inode numbers.
pub(super) const SLOT: usize = 32;

/// The size of an inode of the extended form.
pub(super) const INODE_BYTES: usize = 64;

/// The size of a directory's entry without its name.
pub(super) const DIRENT_BYTES: usize = 12;

/// The size of the header of an inode's extended attributes.
pub(super) const XATTR_HEADER: usize = 12;

/// The size of an extended attribute without name and value.
pub(super) const XATTR_ENTRY: usize = 4;

/// `EROFS_FEATURE_COMPAT_SB_CHKSUM | EROFS_FEATURE_COMPAT_MTIME`
pub(super) const FEATURES_COMPAT: u32 = 0b11;

/// `EROFS_INODE_FLAT_PLAIN`: the content lies in whole blocks.
pub(super) const FLAT_PLAIN: u16 = 0;

/// `EROFS_INODE_FLAT_INLINE`: what fills no block lies behind the inode.
pub(super) const FLAT_INLINE: u16 = 2;

// Types of files, in a mode and in a directory's entry.
pub(super) const S_IFIFO: u16 = 0o010_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFLNK: u16 = 0o120_000;

/// The type in a directory's entry by the type in a mode.
pub(super) fn dirent_type(mode: u16) -> u8 {
    match mode & 0o170_000 {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        _ => 7,
    }
}

/// The prefixes of names of extended attributes, which are kept as numbers.
pub(super) const XATTR_PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// A device's number as the kernel keeps it.
pub(super) fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The superblock's checksum: CRC-32C without the last inversion, over its block from where the
/// superblock begins, its own field being zero.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            sum >> 1 ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc_32c() {
        assert_eq!(!checksum(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_are_the_kernels() {
        assert_eq!(device_number(8, 1), 0x801);
        assert_eq!(device_number(259, 0x12345), 0x1231_0345);
    }
}
