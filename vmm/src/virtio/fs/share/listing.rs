//! What is in a directory.

use std::{ffi::CStr, io};

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
        entries.resize(room.min(MAX_ENTRIES_BYTES), 0);
        let listed = self
            .read_entries(node, handle, offset, &mut entries)
            .and_then(|len| self.say_entries((node, handle), &entries[..len], room, plus, reply));
        self.entries = entries;
        listed
    }

    fn read_entries(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        entries: &mut [u8],
    ) -> io::Result<usize> {
        let handle = self.handles.get_mut(handle, node)?;
        if handle.position != offset {
            let offset = i64::try_from(offset).map_err(|_| error(libc::EINVAL))?;
            lseek64(handle.file()?, offset, Whence::SeekSet)?;
        }
        // Until it is known what was said, nothing is sure.
        handle.position = u64::MAX;
        if entries.is_empty() {
            return Ok(0);
        }
        sys::entries(handle.file()?, entries)
    }

    /// Says entries as the kernel lays them out, until the reply is full.
    fn say_entries(
        &mut self,
        (node, handle): (u64, u64),
        mut entries: &[u8],
        room: usize,
        plus: bool,
        reply: &mut Reply,
    ) -> io::Result<()> {
        let device = self.nodes.device_of(node)?;
        let mut next = None;
        while let Some((entry, name, rest)) = take_entry(entries) {
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
            next = Some(entry.offset);
            entries = rest;
        }
        // All that was read was said: the next call goes on from here without seeking.
        if let (true, Some(next)) = (entries.is_empty(), next) {
            self.handles.get_mut(handle, node)?.position = next;
        }
        Ok(())
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
