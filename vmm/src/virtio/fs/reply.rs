//! What a reply to a FUSE message consists of, in the layouts of `linux/fuse.h`.

use super::request::REPLY_BYTES;

/// Bytes of `struct fuse_entry_out`.
const ENTRY_BYTES: usize = 128;
/// Bytes of `struct fuse_dirent` without its name.
const DIRENT_BYTES: usize = 24;

/// A reply under way: its head is filled in last.
#[derive(Debug, Default)]
pub struct Reply {
    bytes: Vec<u8>,
}

/// A file's attributes as the guest is told them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields carry the names of linux/fuse.h")]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub blksize: u32,
}

/// A file that the guest is told of, for a number of seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// The node; 0: there is no such file.
    pub node: u64,
    /// Its attributes.
    pub attr: Attr,
    /// For how many seconds it may be believed.
    pub valid_s: u64,
}

/// An entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The file's number.
    pub ino: u64,
    /// Where the next entry is.
    pub offset: u64,
    /// `DT_...`
    pub kind: u8,
    /// Its name.
    pub name: &'a [u8],
}

impl DirEntry<'_> {
    /// Bytes in a reply.
    fn bytes(&self) -> usize {
        (DIRENT_BYTES + self.name.len()).next_multiple_of(8)
    }
}

impl Reply {
    /// Forgets what was said and leaves room for the head.
    pub fn begin(&mut self) {
        self.bytes.clear();
        self.bytes.resize(REPLY_BYTES, 0);
    }

    /// The whole reply, with the head for `unique`.
    pub fn finish(&mut self, unique: u64) -> &[u8] {
        let header = super::request::reply_header(unique, 0, self.bytes.len());
        self.bytes[..REPLY_BYTES].copy_from_slice(&header);
        &self.bytes
    }

    /// Bytes so far, without the head.
    pub fn len(&self) -> usize {
        self.bytes.len() - REPLY_BYTES
    }

    /// Whether nothing was said but the head.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Says bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Says `count` bytes that `fill` writes and tells the number of.
    ///
    /// # Errors
    /// That of `fill`.
    pub fn filled<E>(
        &mut self,
        count: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let before = self.bytes.len();
        self.bytes.resize(before + count, 0);
        let len = fill(&mut self.bytes[before..])?;
        self.bytes.truncate(before + len.min(count));
        Ok(())
    }

    /// Says a number of 16 bits.
    pub fn half(&mut self, half: u16) {
        self.bytes(&half.to_le_bytes());
    }

    /// Says numbers of 32 bits.
    pub fn words(&mut self, words: &[u32]) {
        for word in words {
            self.bytes(&word.to_le_bytes());
        }
    }

    /// Says numbers of 64 bits.
    pub fn longs(&mut self, longs: &[u64]) {
        for long in longs {
            self.bytes(&long.to_le_bytes());
        }
    }

    /// Says a `struct fuse_entry_out`.
    pub fn entry(&mut self, entry: &Entry) {
        self.longs(&[entry.node, 0, entry.valid_s, entry.valid_s]);
        self.words(&[0, 0]);
        self.attr(&entry.attr);
    }

    /// Says a `struct fuse_attr_out`, good for `valid_s` seconds.
    pub fn attributes(&mut self, attr: &Attr, valid_s: u64) {
        self.longs(&[valid_s]);
        self.words(&[0, 0]);
        self.attr(attr);
    }

    /// Says a `struct fuse_open_out`.
    pub fn open(&mut self, handle: u64, flags: u32) {
        self.longs(&[handle]);
        self.words(&[flags, 0]);
    }

    /// Says an entry of a directory if `room` bytes are enough for all entries, and whether.
    pub fn dir_entry(&mut self, entry: &DirEntry<'_>, room: usize) -> bool {
        if self.len() + entry.bytes() > room {
            return false;
        }
        self.longs(&[entry.ino, entry.offset]);
        self.words(&[entry.name.len() as u32, u32::from(entry.kind)]);
        self.bytes(entry.name);
        let padding = entry.bytes() - DIRENT_BYTES - entry.name.len();
        self.bytes(&[0; 8][..padding]);
        true
    }

    /// Whether [`Reply::dir_entry_plus`] would fit.
    pub fn has_room_for(&self, entry: &DirEntry<'_>, room: usize) -> bool {
        self.len() + ENTRY_BYTES + entry.bytes() <= room
    }

    /// As [`Reply::dir_entry`], with what the file is; there must be room.
    pub fn dir_entry_plus(&mut self, told: &Entry, entry: &DirEntry<'_>) {
        self.entry(told);
        self.dir_entry(entry, usize::MAX);
    }

    fn attr(&mut self, attr: &Attr) {
        self.longs(&[
            attr.ino,
            attr.size,
            attr.blocks,
            attr.atime.0 as u64,
            attr.mtime.0 as u64,
            attr.ctime.0 as u64,
        ]);
        self.words(&[
            attr.atime.1,
            attr.mtime.1,
            attr.ctime.1,
            attr.mode,
            attr.nlink,
            attr.uid,
            attr.gid,
            attr.rdev,
            attr.blksize,
            0,
        ]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_interface() {
        let mut reply = Reply::default();
        let mut size = |say: &dyn Fn(&mut Reply)| {
            reply.begin();
            say(&mut reply);
            reply.len()
        };
        assert_eq!(size(&|reply| reply.entry(&Entry::default())), ENTRY_BYTES);
        assert_eq!(size(&|reply| reply.attributes(&Attr::default(), 1)), 104);
        assert_eq!(size(&|reply| reply.open(1, 2)), 16);
    }

    #[test]
    fn entries_are_padded_and_stop_where_the_room_ends() {
        let entry = |name| DirEntry {
            ino: 1,
            offset: 2,
            kind: 8,
            name,
        };
        let mut reply = Reply::default();
        reply.begin();
        assert!(reply.dir_entry(&entry(b"a"), 32));
        assert_eq!(reply.len(), 32);
        assert!(!reply.dir_entry(&entry(b"b"), 63));
        assert!(reply.dir_entry(&entry(b"12345678"), 64));
        assert_eq!(reply.finish(9)[..4], 80_u32.to_le_bytes());
    }
}
