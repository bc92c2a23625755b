//! Where everything of an image lies, decided before a byte of it is written.

use std::collections::HashMap;

use super::Error;
use super::disk::{
    BLOCK, DIRENT_BYTES, FLAT_INLINE, FLAT_PLAIN, INODE_BYTES, SLOT, SUPERBLOCK, SUPERBLOCK_BYTES,
    XATTR_ENTRY, XATTR_HEADER, XATTR_PREFIXES,
};
use crate::filesystem::{Attributes, FileSystem, InodeId, Kind, NAME_MAX, TARGET_MAX};

/// What decides where an inode lies and what is written there.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) inode: InodeId,
    /// Its place in units of [`SLOT`].
    pub(super) nid: u64,
    pub(super) links: u32,
    /// The directory that a directory is in.
    pub(super) parent: InodeId,
    /// The length of its content.
    pub(super) size: u64,
    pub(super) format: u16,
    /// The first block of its content; 0 where all of it lies behind the inode.
    pub(super) block: u32,
    /// The extended attributes as they are written.
    pub(super) xattrs: Vec<u8>,
}

/// An image without content.
#[derive(Debug)]
pub(super) struct Layout {
    /// In the order of their places.
    pub(super) inodes: Vec<Placed>,
    by_id: HashMap<InodeId, usize>,
    /// How many blocks hold the superblock and inodes.
    pub(super) metadata_blocks: u64,
    /// How many blocks the image has.
    pub(super) blocks: u64,
}

impl Layout {
    /// Lays out everything that has a name.
    pub(super) fn of(filesystem: &FileSystem) -> Result<Self, Error> {
        let mut layout = Self {
            inodes: Vec::new(),
            by_id: HashMap::new(),
            metadata_blocks: 0,
            blocks: 0,
        };
        layout.collect(filesystem)?;
        let end = layout.place();
        layout.metadata_blocks = end.div_ceil(BLOCK) as u64;
        layout.allocate(filesystem)?;
        Ok(layout)
    }

    /// What was decided about an inode.
    pub(super) fn get(&self, id: InodeId) -> Option<&Placed> {
        self.by_id.get(&id).map(|index| &self.inodes[*index])
    }

    /// Goes through the tree, counts names, and measures what they lead to.
    fn collect(&mut self, filesystem: &FileSystem) -> Result<(), Error> {
        let mut path = Vec::new();
        self.meet(filesystem, FileSystem::ROOT, FileSystem::ROOT, &path)?;
        // A directory under way, and which of its names is the next. No recursion: a tree may be
        // deeper than a stack.
        let mut open = vec![(
            FileSystem::ROOT,
            filesystem.names(FileSystem::ROOT).into_iter().flatten(),
            0,
        )];
        while let Some((directory, names, length)) = open.last_mut() {
            path.truncate(*length);
            let (directory, length) = (*directory, *length);
            let Some((name, entry)) = names.next() else {
                open.pop();
                continue;
            };
            if length > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            let length = path.len();
            let fits = (1..=NAME_MAX).contains(&name.len())
                && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
                && !matches!(&name[..], b"." | b"..");
            if !fits {
                return Err(Error::name(&path));
            }
            if !self.meet(filesystem, entry.inode, directory, &path)? {
                continue;
            }
            if filesystem.inode(entry.inode).is_directory() {
                let names = filesystem.names(entry.inode).into_iter().flatten();
                open.push((entry.inode, names, length));
            }
        }
        Ok(())
    }

    /// Counts a name of an inode and says whether it is the first.
    fn meet(
        &mut self,
        filesystem: &FileSystem,
        id: InodeId,
        parent: InodeId,
        path: &[u8],
    ) -> Result<bool, Error> {
        let inode = filesystem.inode(id);
        if inode.is_directory()
            && id != parent
            && let Some(index) = self.by_id.get(&parent)
        {
            self.inodes[*index].links += 1;
        }
        if let Some(index) = self.by_id.get(&id) {
            if inode.is_directory() {
                return Err(Error::linked_directory(path));
            }
            self.inodes[*index].links += 1;
            return Ok(false);
        }
        let size = match &inode.kind {
            Kind::Directory(names) => directory_blocks(names.keys())
                .fold(0, |_, (index, used)| index * BLOCK + used)
                as u64,
            Kind::File(extent) => extent.length,
            Kind::Symlink(target) if (1..=TARGET_MAX).contains(&target.len()) => {
                target.len() as u64
            }
            Kind::Symlink(target) => return Err(Error::target(path, target.len())),
            Kind::Device { .. } | Kind::Fifo => 0,
        };
        self.by_id.insert(id, self.inodes.len());
        self.inodes.push(Placed {
            inode: id,
            nid: 0,
            links: if inode.is_directory() { 2 } else { 1 },
            parent,
            size,
            format: match &inode.kind {
                Kind::Directory(_) | Kind::Symlink(_) => FLAT_INLINE,
                _ => FLAT_PLAIN,
            },
            block: 0,
            xattrs: xattrs(&inode.attributes).ok_or_else(|| Error::xattrs(path))?,
        });
        Ok(true)
    }

    /// Gives each inode a place and returns where the last ends. An inode lies in one block, and
    /// so does what of its content lies behind it.
    fn place(&mut self) -> usize {
        let mut at = SUPERBLOCK + SUPERBLOCK_BYTES;
        for inode in &mut self.inodes {
            let header = INODE_BYTES + inode.xattrs.len();
            let mut tail = inline_tail(inode);
            if header % BLOCK + tail > BLOCK || tail == 0 {
                // Attributes that leave no room, or nothing to put there.
                inode.format = FLAT_PLAIN;
                tail = 0;
            }
            at = at.next_multiple_of(SLOT);
            let crosses = |at: usize, length: usize| at % BLOCK + length > BLOCK;
            if crosses(at, INODE_BYTES) || tail > 0 && crosses(at + header, tail) {
                at = at.next_multiple_of(BLOCK);
            }
            inode.nid = (at / SLOT) as u64;
            at += header + tail;
        }
        at
    }

    /// Gives blocks to directories and then to files.
    fn allocate(&mut self, filesystem: &FileSystem) -> Result<(), Error> {
        let mut next = self.metadata_blocks;
        let (directories, others): (Vec<_>, Vec<_>) = self
            .inodes
            .iter_mut()
            .filter(|placed| placed.size > 0)
            .partition(|placed| filesystem.inode(placed.inode).is_directory());
        for placed in directories.into_iter().chain(others) {
            let blocks = match placed.format {
                FLAT_INLINE => placed.size / BLOCK as u64,
                _ => placed.size.div_ceil(BLOCK as u64),
            };
            if blocks > 0 {
                placed.block = u32::try_from(next).map_err(|_| Error::TooLarge)?;
                next += blocks;
            }
        }
        u32::try_from(next).map_err(|_| Error::TooLarge)?;
        self.blocks = next;
        Ok(())
    }
}

/// How much of an inode's content lies behind it.
pub(super) fn inline_tail(inode: &Placed) -> usize {
    match inode.format {
        FLAT_INLINE => (inode.size % BLOCK as u64) as usize,
        _ => 0,
    }
}

/// The names of a directory with the two that every directory has, sorted.
pub(super) fn all_names<'a>(
    names: impl Iterator<Item = &'a Vec<u8>>,
) -> impl Iterator<Item = &'a [u8]> {
    let mut own = [&b"."[..], b".."].into_iter().peekable();
    let mut names = names.map(Vec::as_slice).peekable();
    std::iter::from_fn(move || match (own.peek(), names.peek()) {
        (Some(first), Some(second)) if first < second => own.next(),
        (_, Some(_)) => names.next(),
        (_, None) => own.next(),
    })
}

/// The blocks of a directory: the number of each, and how many bytes of it are used.
fn directory_blocks<'a>(
    names: impl Iterator<Item = &'a Vec<u8>>,
) -> impl Iterator<Item = (usize, usize)> {
    let mut names = all_names(names).peekable();
    let mut index = 0;
    std::iter::from_fn(move || {
        let mut used = 0;
        while let Some(name) = names.next_if(|name| used + DIRENT_BYTES + name.len() <= BLOCK) {
            used += DIRENT_BYTES + name.len();
        }
        index += 1;
        (used > 0).then_some((index - 1, used))
    })
}

/// Extended attributes as they lie behind an inode; `None` where the format has no room.
fn xattrs(attributes: &Attributes) -> Option<Vec<u8>> {
    if attributes.xattrs.is_empty() {
        return Some(Vec::new());
    }
    let mut bytes = vec![0; XATTR_HEADER];
    for (name, value) in &attributes.xattrs {
        let (rest, number) = XATTR_PREFIXES.iter().find_map(|(prefix, number)| {
            let rest = name.strip_prefix(*prefix)?;
            // Names of a namespace go on behind its dot, others end here.
            (rest.is_empty() != prefix.ends_with(b".")).then_some((rest, *number))
        })?;
        bytes.push(u8::try_from(rest.len()).ok()?);
        bytes.push(number);
        bytes.extend(u16::try_from(value.len()).ok()?.to_le_bytes());
        bytes.extend(rest);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(XATTR_ENTRY), 0);
    }
    // Counted by sixteen bits in the inode.
    let units = (bytes.len() - XATTR_HEADER) / XATTR_ENTRY + 1;
    u16::try_from(units).is_ok().then_some(bytes)
}
