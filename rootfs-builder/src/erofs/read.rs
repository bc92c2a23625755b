//! Images read back: what a host must know of one, such as its users' names.
//!
//! It reads what [`super::write()`] writes and refuses every other form. An image is taken for
//! the work of a stranger: whatever its bytes, nothing is read beyond the file, no loop is without
//! an end, and nothing is larger in memory than its caller allowed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::disk::{
    BLOCK, DIRENT_BYTES, FLAT_INLINE, FLAT_PLAIN, INODE_BYTES, MAGIC, S_IFDIR, S_IFLNK, S_IFREG,
    SLOT, SUPERBLOCK, XATTR_ENTRY, XATTR_HEADER, XATTR_PREFIXES, checksum,
};
use crate::filesystem::Time;

/// As many symbolic links are followed on the way to one file.
const LINKS_MAX: usize = 40;

/// The largest directory that is looked through.
const DIRECTORY_MAX: u64 = 256 << 20;

/// Why something cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("cannot read the image")]
    Io(#[from] io::Error),
    /// Another kind of file, or damaged.
    #[error("not an EROFS image as Bulkhead makes them: {0}")]
    Format(&'static str),
    /// The file that something is copied to.
    #[error("cannot write the copy")]
    Write(#[source] io::Error),
    /// More than was asked for.
    #[error("the file has {length} bytes, at most {limit} are read")]
    TooLarge {
        /// Its length.
        length: u64,
        /// The limit.
        limit: u64,
    },
}

/// An image.
#[derive(Debug)]
pub struct Image<'a> {
    file: &'a File,
    length: u64,
    root: u64,
}

/// An inode that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Kind and permissions.
    pub mode: u16,
    /// The owning user.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// How many names it has.
    pub links: u32,
    /// The length of its content.
    pub size: u64,
    /// When the content changed last.
    pub mtime: Time,
    /// The number of the device that it stands for, or its first block.
    pub place: u32,
    nid: u64,
    format: u16,
    xattr_bytes: u64,
}

impl<'a> Image<'a> {
    /// Reads the superblock.
    ///
    /// # Errors
    ///
    /// When it is none of ours, or damaged.
    pub fn open(file: &'a File) -> Result<Self, Error> {
        let length = file.metadata()?.len();
        let mut block = [0; BLOCK];
        if length < BLOCK as u64 {
            return Err(Error::Format("it is shorter than a block"));
        }
        file.read_exact_at(&mut block, 0)?;
        let superblock = &mut block[SUPERBLOCK..];
        if number(superblock, 0, 4) != u64::from(MAGIC) {
            return Err(Error::Format("it does not begin as one"));
        }
        let sum = number(superblock, 4, 4);
        superblock[4..8].fill(0);
        if u64::from(checksum(superblock)) != sum {
            return Err(Error::Format("the superblock's checksum is wrong"));
        }
        // Block size, address of the inodes, incompatible features.
        let plain = number(superblock, 12, 1) == 12
            && number(superblock, 40, 4) == 0
            && number(superblock, 80, 4) == 0;
        if !plain {
            return Err(Error::Format("it has features that are not known"));
        }
        if number(superblock, 36, 4) * BLOCK as u64 > length {
            return Err(Error::Format("it is truncated"));
        }
        Ok(Self {
            file,
            length,
            root: number(superblock, 14, 2),
        })
    }

    /// The root directory.
    ///
    /// # Errors
    ///
    /// When the image is damaged.
    pub fn root(&self) -> Result<Found, Error> {
        self.inode(self.root)
    }

    /// What a path leads to, symbolic links followed as a process in the image would; `None`
    /// where it leads to nothing.
    ///
    /// # Errors
    ///
    /// When the image is damaged.
    pub fn find(&self, path: &str) -> Result<Option<Found>, Error> {
        let mut trail = vec![self.root()?];
        let mut left: Vec<Vec<u8>> = components(path.as_bytes());
        let mut links = 0;
        while let Some(name) = left.pop() {
            if name == b".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let Some(directory) = trail.last().filter(|found| found.is_directory()) else {
                return Ok(None);
            };
            let Some(found) = self.child(directory, &name)? else {
                return Ok(None);
            };
            if found.mode & 0o170_000 != S_IFLNK {
                trail.push(found);
                continue;
            }
            links += 1;
            if links > LINKS_MAX {
                return Ok(None);
            }
            let target = self.read(&found, BLOCK as u64)?;
            if target.starts_with(b"/") {
                trail.truncate(1);
            }
            left.extend(components(&target));
        }
        Ok(trail.pop())
    }

    /// The content of the regular file that `path` leads to; `None` where there is none.
    ///
    /// # Errors
    ///
    /// When it is larger than `limit`, or the image is damaged.
    pub fn read_file(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, Error> {
        match self.find(path)? {
            Some(found) if found.mode & 0o170_000 == S_IFREG => self.read(&found, limit).map(Some),
            _ => Ok(None),
        }
    }

    /// Writes the content of an inode, however long, to `copy`.
    ///
    /// # Errors
    ///
    /// When the image is damaged, or `copy` cannot be written.
    pub fn copy(&self, found: &Found, copy: &mut impl io::Write) -> Result<(), Error> {
        const PIECE: u64 = 1 << 20;
        let (body, start, behind) = self.extent(found)?;
        let mut bytes = vec![0; body.min(PIECE) as usize];
        let mut done = 0;
        while done < body {
            let piece = &mut bytes[..(body - done).min(PIECE) as usize];
            self.read_at(piece, start + done)?;
            copy.write_all(piece).map_err(Error::Write)?;
            done += piece.len() as u64;
        }
        // Less than a block.
        let mut tail = vec![0; (found.size - body) as usize];
        self.read_at(&mut tail, behind)?;
        copy.write_all(&tail).map_err(Error::Write)
    }

    /// How much of an inode's content lies in blocks, where they begin, and where the rest is.
    fn extent(&self, found: &Found) -> Result<(u64, u64, u64), Error> {
        let tail = match found.format {
            FLAT_INLINE => found.size % BLOCK as u64,
            _ => 0,
        };
        let body = found.size - tail;
        let start = u64::from(found.place) * BLOCK as u64;
        if start.checked_add(body).is_none_or(|end| end > self.length) {
            return Err(Error::Format("a file lies outside of it"));
        }
        let behind = found.nid * SLOT as u64 + INODE_BYTES as u64 + found.xattr_bytes;
        Ok((body, start, behind))
    }

    /// The content of an inode, at most `limit` bytes of it.
    ///
    /// # Errors
    ///
    /// When it is larger, or the image is damaged.
    pub fn read(&self, found: &Found, limit: u64) -> Result<Vec<u8>, Error> {
        if found.size > limit {
            return Err(Error::TooLarge {
                length: found.size,
                limit,
            });
        }
        let (body, start, behind) = self.extent(found)?;
        let mut bytes = vec![0; found.size as usize];
        let (first, last) = bytes.split_at_mut(body as usize);
        self.read_at(first, start)?;
        self.read_at(last, behind)?;
        Ok(bytes)
    }

    /// The names in a directory and the inodes' numbers, but for `.` and `..`.
    ///
    /// # Errors
    ///
    /// When the image is damaged.
    pub fn names(&self, directory: &Found) -> Result<BTreeMap<Vec<u8>, u64>, Error> {
        let content = self.read(directory, DIRECTORY_MAX)?;
        let mut names = BTreeMap::new();
        for block in content.chunks(BLOCK) {
            for (name, nid) in dirents(block)? {
                if name != b"." && name != b".." {
                    names.insert(name.to_owned(), nid);
                }
            }
        }
        Ok(names)
    }

    /// The inode of a number.
    ///
    /// # Errors
    ///
    /// When there is none, or one of another form.
    pub fn inode(&self, nid: u64) -> Result<Found, Error> {
        let at = nid
            .checked_mul(SLOT as u64)
            .ok_or(Error::Format("an inode lies outside of it"))?;
        let mut bytes = [0; INODE_BYTES];
        self.read_at(&mut bytes, at)?;
        let format = number(&bytes, 0, 2) as u16;
        let layout = format >> 1;
        if format & 1 != 1 || !matches!(layout, FLAT_PLAIN | FLAT_INLINE) {
            return Err(Error::Format("an inode is of another form"));
        }
        let units = number(&bytes, 2, 2);
        Ok(Found {
            mode: number(&bytes, 4, 2) as u16,
            size: number(&bytes, 8, 8),
            place: number(&bytes, 16, 4) as u32,
            uid: number(&bytes, 24, 4) as u32,
            gid: number(&bytes, 28, 4) as u32,
            mtime: Time {
                seconds: number(&bytes, 32, 8).cast_signed(),
                nanoseconds: number(&bytes, 40, 4) as u32,
            },
            links: number(&bytes, 44, 4) as u32,
            nid,
            format: layout,
            xattr_bytes: match units {
                0 => 0,
                units => (units - 1) * XATTR_ENTRY as u64 + XATTR_HEADER as u64,
            },
        })
    }

    /// The extended attributes of an inode.
    ///
    /// # Errors
    ///
    /// When the image is damaged.
    pub fn xattrs(&self, found: &Found) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
        let mut bytes = vec![0; found.xattr_bytes as usize];
        self.read_at(&mut bytes, found.nid * SLOT as u64 + INODE_BYTES as u64)?;
        let mut attributes = BTreeMap::new();
        let mut rest = bytes.get(XATTR_HEADER..).unwrap_or_default();
        let damaged = || Error::Format("extended attributes are cut off");
        while !rest.is_empty() {
            let head = rest.get(..XATTR_ENTRY).ok_or_else(damaged)?;
            let (name_bytes, value_bytes) = (head[0].into(), number(head, 2, 2) as usize);
            let end = XATTR_ENTRY + name_bytes + value_bytes;
            let body = rest.get(XATTR_ENTRY..end).ok_or_else(damaged)?;
            let (name, value) = body.split_at(name_bytes);
            let prefix = XATTR_PREFIXES.iter().find(|known| known.1 == head[1]);
            let (prefix, _) = prefix.ok_or(Error::Format("an attribute's name is unknown"))?;
            attributes.insert([prefix, name].concat(), value.to_owned());
            rest = rest
                .get(end.next_multiple_of(XATTR_ENTRY)..)
                .unwrap_or_default();
        }
        Ok(attributes)
    }

    fn child(&self, directory: &Found, name: &[u8]) -> Result<Option<Found>, Error> {
        match self.names(directory)?.get(name) {
            Some(nid) => self.inode(*nid).map(Some),
            None => Ok(None),
        }
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> Result<(), Error> {
        let end = at.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.length) {
            return Err(Error::Format("a part lies outside of it"));
        }
        Ok(self.file.read_exact_at(buffer, at)?)
    }
}

impl Found {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == S_IFDIR
    }
}

/// The parts of a path, the first one last.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .rev()
        .map(<[u8]>::to_owned)
        .collect()
}

/// The names and numbers in a block of a directory.
fn dirents(block: &[u8]) -> Result<Vec<(&[u8], u64)>, Error> {
    const DAMAGED: Error = Error::Format("a directory is damaged");
    let offset = |at: usize| number(block, at * DIRENT_BYTES + 8, 2) as usize;
    if block.len() < DIRENT_BYTES {
        return Err(DAMAGED);
    }
    let names = offset(0);
    let count = names / DIRENT_BYTES;
    if names % DIRENT_BYTES != 0 || count == 0 || names > block.len() {
        return Err(DAMAGED);
    }
    let mut found = Vec::with_capacity(count);
    for index in 0..count {
        let end = match index + 1 < count {
            true => offset(index + 1),
            false => block.len(),
        };
        let mut name = block.get(offset(index)..end).ok_or(DAMAGED)?;
        if index + 1 == count {
            // The last name ends where zeros begin.
            let end = name.iter().position(|byte| *byte == 0);
            name = &name[..end.unwrap_or(name.len())];
        }
        found.push((name, number(block, index * DIRENT_BYTES, 8)));
    }
    Ok(found)
}

/// A little-endian number of `width` bytes.
fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    let field = &bytes[at..at + width];
    field
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}
