//! An image's bytes, in one pass from its first to its last.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use super::disk::{
    BLOCK, DIRENT_BYTES, FEATURES_COMPAT, FLAT_INLINE, INODE_BYTES, MAGIC, S_IFBLK, S_IFCHR,
    S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, SLOT, SUPERBLOCK, XATTR_HEADER, checksum, device_number,
    dirent_type,
};
use super::layout::{Layout, Placed, all_names, inline_tail};
use super::{ALIGN_BYTES, Error};
use crate::digest::{Digest, Hasher};
use crate::filesystem::{self, FileSystem, Inode, InodeId, Kind, Spool};

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// The image's length.
    pub length: u64,
    /// The digest of the whole.
    pub digest: Digest,
}

/// Writes the image of everything that has a name in `filesystem` to an empty file. The same file
/// system and `uuid` give the same bytes.
///
/// # Errors
///
/// See [`Error`].
pub fn write(
    filesystem: &FileSystem,
    spool: &Spool,
    uuid: [u8; 16],
    file: &mut File,
) -> Result<Written, Error> {
    let layout = Layout::of(filesystem)?;
    let mut out = Output::new(file);
    out.put(&metadata(filesystem, &layout, uuid))?;
    for (directory, placed) in directories(filesystem, &layout) {
        let bytes = directory_bytes(filesystem, &layout, directory, placed);
        let in_blocks = bytes.len() - inline_tail(placed);
        out.put(&bytes[..in_blocks])?;
        out.pad(BLOCK as u64)?;
    }
    for placed in &layout.inodes {
        match &filesystem.inode(placed.inode).kind {
            Kind::File(extent) => out.copy(spool.read(*extent))?,
            Kind::Symlink(target) if placed.format != FLAT_INLINE => out.put(target)?,
            _ => continue,
        }
        out.pad(BLOCK as u64)?;
    }
    debug_assert_eq!(out.at, layout.blocks * BLOCK as u64);
    out.finish()
}

fn directories<'a>(
    filesystem: &'a FileSystem,
    layout: &'a Layout,
) -> impl Iterator<Item = (InodeId, &'a Placed)> {
    layout
        .inodes
        .iter()
        .map(|placed| (placed.inode, placed))
        .filter(|(id, _)| filesystem.inode(*id).is_directory())
}

/// The blocks of superblock and inodes.
fn metadata(filesystem: &FileSystem, layout: &Layout, uuid: [u8; 16]) -> Vec<u8> {
    let mut bytes = vec![0; layout.metadata_blocks as usize * BLOCK];
    for (number, placed) in layout.inodes.iter().enumerate() {
        let inode = filesystem.inode(placed.inode);
        let at = placed.nid as usize * SLOT;
        bytes[at..at + INODE_BYTES].copy_from_slice(&inode_bytes(inode, placed, number));
        let at = at + INODE_BYTES;
        bytes[at..at + placed.xattrs.len()].copy_from_slice(&placed.xattrs);
        let at = at + placed.xattrs.len();
        let tail = inline_tail(placed);
        let content = match &inode.kind {
            _ if tail == 0 => continue,
            Kind::Directory(_) => directory_bytes(filesystem, layout, placed.inode, placed),
            Kind::Symlink(target) => target.clone(),
            _ => continue,
        };
        bytes[at..at + tail].copy_from_slice(&content[content.len() - tail..]);
    }
    superblock(&mut bytes[SUPERBLOCK..BLOCK], layout, uuid);
    bytes
}

/// Fills in the superblock at the begin of `block`, the rest of the first block.
fn superblock(block: &mut [u8], layout: &Layout, uuid: [u8; 16]) {
    let root = layout.inodes.first().map_or(0, |placed| placed.nid);
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(8, &FEATURES_COMPAT.to_le_bytes());
    put(12, &[BLOCK.trailing_zeros() as u8]);
    // The first inode there is.
    put(14, &(root as u16).to_le_bytes());
    put(16, &(layout.inodes.len() as u64).to_le_bytes());
    put(36, &(layout.blocks as u32).to_le_bytes());
    put(48, &uuid);
    let sum = checksum(block);
    block[4..8].copy_from_slice(&sum.to_le_bytes());
}

fn inode_bytes(inode: &Inode, placed: &Placed, number: usize) -> [u8; INODE_BYTES] {
    let attributes = &inode.attributes;
    let xattr_units = match placed.xattrs.len() {
        0 => 0,
        length => ((length - XATTR_HEADER) / 4 + 1) as u16,
    };
    let place = match &inode.kind {
        Kind::Device { major, minor, .. } => device_number(*major, *minor),
        _ => placed.block,
    };
    let mut bytes = [0; INODE_BYTES];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    // The lowest bit says that the inode is of the extended form.
    put(0, &(placed.format << 1 | 1).to_le_bytes());
    put(2, &xattr_units.to_le_bytes());
    put(4, &mode(inode).to_le_bytes());
    put(8, &placed.size.to_le_bytes());
    put(16, &place.to_le_bytes());
    put(20, &(number as u32 + 1).to_le_bytes());
    put(24, &attributes.uid.to_le_bytes());
    put(28, &attributes.gid.to_le_bytes());
    put(32, &attributes.mtime.seconds.to_le_bytes());
    put(40, &attributes.mtime.nanoseconds.to_le_bytes());
    put(44, &placed.links.to_le_bytes());
    bytes
}

fn mode(inode: &Inode) -> u16 {
    let kind = match &inode.kind {
        Kind::Directory(_) => S_IFDIR,
        Kind::File(_) => S_IFREG,
        Kind::Symlink(_) => S_IFLNK,
        Kind::Device { block: true, .. } => S_IFBLK,
        Kind::Device { .. } => S_IFCHR,
        Kind::Fifo => S_IFIFO,
    };
    kind | inode.attributes.mode & 0o7777
}

/// The content of a directory: in each block first the entries, then their names.
fn directory_bytes(
    filesystem: &FileSystem,
    layout: &Layout,
    directory: InodeId,
    placed: &Placed,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(placed.size as usize);
    let Some(names) = filesystem.names(directory) else {
        return bytes;
    };
    let mut rest = all_names(names.keys()).peekable();
    while rest.peek().is_some() {
        let start = bytes.len().next_multiple_of(BLOCK);
        bytes.resize(start, 0);
        let mut block = Vec::new();
        let mut used = 0;
        while let Some(name) = rest.next_if(|name| used + DIRENT_BYTES + name.len() <= BLOCK) {
            used += DIRENT_BYTES + name.len();
            block.push(name);
        }
        let mut name_offset = block.len() * DIRENT_BYTES;
        for name in &block {
            let inode = match *name {
                b"." => directory,
                b".." => placed.parent,
                name => names.get(name).map_or(directory, |entry| entry.inode),
            };
            let nid = layout.get(inode).map_or(0, |placed| placed.nid);
            bytes.extend(nid.to_le_bytes());
            bytes.extend((name_offset as u16).to_le_bytes());
            bytes.push(dirent_type(mode(filesystem.inode(inode))));
            bytes.push(0);
            name_offset += name.len();
        }
        block.iter().for_each(|name| bytes.extend(*name));
    }
    bytes
}

/// The file under way. Blocks of zeros are skipped, so that they take no room.
struct Output<'a> {
    file: &'a mut File,
    hasher: Hasher,
    at: u64,
}

impl<'a> Output<'a> {
    fn new(file: &'a mut File) -> Self {
        Self {
            file,
            hasher: Hasher::new(),
            at: 0,
        }
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        for range in filesystem::data(bytes) {
            self.file
                .seek(SeekFrom::Start(self.at + range.start as u64))?;
            self.file.write_all(&bytes[range])?;
        }
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn copy(&mut self, mut content: impl Read) -> io::Result<()> {
        let mut buffer = [0; 16 * BLOCK];
        loop {
            match content.read(&mut buffer)? {
                0 => return Ok(()),
                count => self.put(&buffer[..count])?,
            }
        }
    }

    fn pad(&mut self, to: u64) -> io::Result<()> {
        let mut missing = self.at.next_multiple_of(to) - self.at;
        self.at += missing;
        while missing > 0 {
            let count = missing.min(BLOCK as u64);
            self.hasher.update(&[0; BLOCK][..count as usize]);
            missing -= count;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Written, Error> {
        self.pad(ALIGN_BYTES)?;
        self.file.set_len(self.at)?;
        Ok(Written {
            length: self.at,
            digest: self.hasher.finish(),
        })
    }
}
