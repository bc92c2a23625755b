//! What is in a directory.

use std::{ffi::CStr, io, ops::Range};

use nix::unistd::{Whence, lseek64};

use super::{
    super::{
        reply::{DirEntry, Entry, Reply},
        request::check_name,
    },
    Share, error, sys,
};

/// Room for directory entries that is read at a time.
const MAX_ENTRIES_BYTES: usize = 64 * 1024;

/// Directory entries on their way.
#[derive(Default)]
pub(super) struct Entries {
    /// What was read last.
    bytes: Vec<u8>,
    /// What of it no reply had room for yet.
    unsaid: Option<Unsaid>,
    /// All that was ever read, for tests.
    #[cfg(test)]
    pub(super) read_bytes: usize,
}

/// The rest of what was read, where a listing is likely to go on. Entries are shorter than what is
/// said of them, so that without it most would be read several times.
struct Unsaid {
    handle: u64,
    offset: u64,
    at: Range<usize>,
}

/// How far a reply came.
struct Said {
    /// Of the entries as the kernel lays them out.
    bytes: usize,
    /// Where the next entry is.
    next: u64,
}

impl Entries {
    fn take_unsaid(&mut self, handle: u64, offset: u64) -> Option<Range<usize>> {
        let unsaid = self.unsaid.take()?;
        (unsaid.handle == handle && unsaid.offset == offset).then_some(unsaid.at)
    }
}

impl Share {
    /// Says entries of an open directory from `offset` on, which is a place that the kernel
    /// named with an entry before; with `plus` also what they are.
    pub(super) fn list(
        &mut self,
        (node, handle): (u64, u64),
        offset: u64,
        room: usize,
        plus: bool,
        reply: &mut Reply,
    ) -> io::Result<()> {
        self.leave_room()?;
        let mut entries = std::mem::take(&mut self.entries);
        let listed = self.list_from((node, handle), offset, (room, plus), &mut entries, reply);
        self.entries = entries;
        listed
    }

    fn list_from(
        &mut self,
        (node, handle): (u64, u64),
        offset: u64,
        (room, plus): (usize, bool),
        entries: &mut Entries,
        reply: &mut Reply,
    ) -> io::Result<()> {
        let at = self.read_entries((node, handle), offset, room, entries)?;
        let bytes = &entries.bytes[at.clone()];
        let said = self.say_entries((node, handle), bytes, room, plus, reply)?;
        let Some(Said { bytes, next }) = said else {
            return Ok(());
        };
        let left = at.start + bytes..at.end;
        if left.is_empty() {
            // The next call goes on from here without seeking.
            self.handles.get_mut(handle, node)?.position = next;
        } else {
            entries.unsaid = Some(Unsaid {
                handle,
                offset: next,
                at: left,
            });
        }
        Ok(())
    }

    /// Where in `entries` those are that come next.
    fn read_entries(
        &mut self,
        (node, handle): (u64, u64),
        offset: u64,
        room: usize,
        entries: &mut Entries,
    ) -> io::Result<Range<usize>> {
        let unsaid = entries.take_unsaid(handle, offset);
        let handle = self.handles.get_mut(handle, node)?;
        let directory = handle.file()?;
        if let Some(at) = unsaid {
            return Ok(at);
        }
        if handle.position != offset {
            let offset = i64::try_from(offset).map_err(|_| error(libc::EINVAL))?;
            lseek64(directory, offset, Whence::SeekSet)?;
        }
        // Until it is known what was said, nothing is sure.
        handle.position = u64::MAX;
        entries.bytes.resize(room.min(MAX_ENTRIES_BYTES), 0);
        if entries.bytes.is_empty() {
            return Ok(0..0);
        }
        let len = sys::entries(handle.file()?, &mut entries.bytes)?;
        #[cfg(test)]
        {
            entries.read_bytes += len;
        }
        Ok(0..len)
    }

    /// Says entries as the kernel lays them out, until the reply is full; how far that came.
    fn say_entries(
        &mut self,
        (node, handle): (u64, u64),
        entries: &[u8],
        room: usize,
        plus: bool,
        reply: &mut Reply,
    ) -> io::Result<Option<Said>> {
        let device = self.nodes.device_of(node)?;
        let mut said = None;
        let mut left = entries;
        while let Some((entry, name, rest)) = take_entry(left) {
            let entry = DirEntry {
                ino: self.nodes.shown_inode(device, entry.ino),
                ..entry
            };
            if plus {
                if !reply.has_room_for(&entry, room) {
                    break;
                }
                let told = self.tell_listed(node, handle, name);
                reply.dir_entry_plus(&told, &entry);
            } else if !reply.dir_entry(&entry, room) {
                break;
            }
            left = rest;
            said = Some(Said {
                bytes: entries.len() - left.len(),
                next: entry.offset,
            });
        }
        Ok(said)
    }

    /// A name that cannot be told of, such as `..` or one just removed, is only listed.
    fn tell_listed(&mut self, node: u64, handle: u64, name: &CStr) -> Entry {
        if check_name(name.to_bytes()).is_err() {
            return Entry::default();
        }
        let attributes = self
            .handles
            .get(handle, node)
            .and_then(|handle| sys::attributes_at(handle.file()?, name));
        attributes
            .and_then(|attributes| self.tell_of(&attributes, node, name))
            .unwrap_or_default()
    }
}

/// Takes one `struct linux_dirent64` off the front: the entry, its name with the zero, the rest.
fn take_entry(entries: &[u8]) -> Option<(DirEntry<'_>, &CStr, &[u8])> {
    const HEAD: usize = 19;
    let (head, _) = entries.split_first_chunk::<HEAD>()?;
    let (ino, rest) = head.split_first_chunk()?;
    let (offset, rest) = rest.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let (entry, others) = entries.split_at_checked(usize::from(u16::from_ne_bytes(*len)))?;
    let name = CStr::from_bytes_until_nul(entry.get(HEAD..)?).ok()?;
    let entry = DirEntry {
        ino: u64::from_ne_bytes(*ino),
        offset: u64::from_ne_bytes(*offset),
        kind: *rest.first()?,
        name: name.to_bytes(),
    };
    Some((entry, name, others))
}
