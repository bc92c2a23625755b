//! What each FUSE message does. Everything in it is the guest's: numbers of
//! nodes and handles are looked up, sizes bounded, flags masked; names were
//! checked when the message was taken apart.

use std::io;

use super::{
    super::{
        operation::Operation,
        reply::{Entry, Reply},
        request::{Message, REPLY_BYTES},
    },
    BELIEF_S, Share, error,
};
use crate::virtio::slices::Slices;

/// The guest's memory that goes with a message.
pub(in super::super) struct Data<'m> {
    /// What is to be written to a file.
    pub(in super::super) from_guest: Slices<'m>,
    /// Room for the reply, its head included.
    pub(in super::super) to_guest: Slices<'m>,
}

/// How a message was answered.
pub(in super::super) enum Answer {
    /// By what is in the [`Reply`].
    Said,
    /// By so many bytes that are where they should be already, behind the head.
    Placed(usize),
}

/// What FUSE can do and we want, by `FUSE_...` of linux/fuse.h; see `docs/decisions` for what we
/// leave out.
mod flags {
    const ASYNC_READ: u64 = 1 << 0;
    const ATOMIC_O_TRUNC: u64 = 1 << 3;
    const BIG_WRITES: u64 = 1 << 5;
    const DONT_MASK: u64 = 1 << 6;
    const AUTO_INVAL_DATA: u64 = 1 << 12;
    const DO_READDIRPLUS: u64 = 1 << 13;
    const READDIRPLUS_AUTO: u64 = 1 << 14;
    const ASYNC_DIO: u64 = 1 << 15;
    const PARALLEL_DIROPS: u64 = 1 << 18;
    const POSIX_ACL: u64 = 1 << 20;
    const MAX_PAGES: u64 = 1 << 22;
    const CACHE_SYMLINKS: u64 = 1 << 23;
    const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(super) const SETXATTR_EXT: u64 = 1 << 29;
    const INIT_EXT: u64 = 1 << 30;

    pub(super) const WANTED: u64 = ASYNC_READ
        | ATOMIC_O_TRUNC
        | BIG_WRITES
        | DONT_MASK
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | POSIX_ACL
        | MAX_PAGES
        | CACHE_SYMLINKS
        | HANDLE_KILLPRIV_V2
        | SETXATTR_EXT
        | INIT_EXT;
}

/// The version that is spoken: 7.38 is the first with all that we want.
const VERSION: [u32; 2] = [7, 38];

/// Pages in a read or write.
const MAX_PAGES: u16 = 256;

impl Share {
    /// Does what a message asks for.
    ///
    /// # Errors
    /// The host's, for the guest.
    pub(in super::super) fn serve(
        &mut self,
        message: &Message,
        operation: &Operation<'_>,
        data: &mut Data<'_>,
        reply: &mut Reply,
    ) -> io::Result<Answer> {
        let node = message.node;
        let caller = (message.uid, message.gid);
        match *operation {
            Operation::Lookup { name } => reply.entry(&self.lookup(node, name)?),
            Operation::Forget { count } => self.nodes.forget(node, count),
            Operation::BatchForget { pairs } => self.forget_pairs(pairs),
            Operation::GetAttr { .. } => {
                let attributes = self.attributes(node)?;
                reply.attributes(&self.attr(&attributes), BELIEF_S);
            }
            Operation::SetAttr(wanted) => {
                let attributes = self.set_attributes(node, &wanted)?;
                reply.attributes(&self.attr(&attributes), BELIEF_S);
            }
            Operation::ReadLink => reply.bytes(&self.read_link(node)?),
            Operation::SymLink { name, target } => {
                reply.entry(&self.make_link(caller, node, name, target)?);
            }
            Operation::MkNod {
                name,
                mode,
                device,
                umask,
            } => {
                let entry = self.make_node(caller, node, name, (mode, umask), device)?;
                reply.entry(&entry);
            }
            Operation::MkDir { name, mode, umask } => {
                reply.entry(&self.make_directory(caller, node, name, (mode, umask))?);
            }
            Operation::Unlink { name } => self.unlink(node, name)?,
            Operation::RmDir { name } => self.remove_directory(node, name)?,
            Operation::Rename {
                name,
                new_parent,
                new_name,
                flags,
            } => self.rename((node, name), (new_parent, new_name), flags)?,
            Operation::Link {
                node: target,
                new_name,
            } => reply.entry(&self.link(target, node, new_name)?),
            Operation::Open { flags, fuse_flags } => {
                let opened = self.open_file(node, flags, fuse_flags)?;
                reply.open(opened.handle, opened.flags);
            }
            Operation::OpenDir => {
                let opened = self.open_directory(node)?;
                reply.open(opened.handle, opened.flags);
            }
            Operation::Create(create) => {
                let (entry, opened) = self.create(caller, node, &create)?;
                reply.entry(&entry);
                reply.open(opened.handle, opened.flags);
            }
            Operation::TmpFile(file) => {
                let (entry, opened) = self.make_unnamed(caller, node, &file)?;
                reply.entry(&entry);
                reply.open(opened.handle, opened.flags);
            }
            Operation::Read {
                handle,
                offset,
                size,
            } => {
                data.to_guest.skip(REPLY_BYTES);
                data.to_guest.truncate(size as usize);
                let file = self.handles.get(handle, node)?.file()?;
                let read = super::sys::read(file, data.to_guest.parts(), offset)?;
                return Ok(Answer::Placed(read));
            }
            Operation::Write {
                handle,
                offset,
                size,
                fuse_flags,
                flags,
            } => {
                data.from_guest.truncate(size as usize);
                if data.from_guest.len() < size as usize {
                    return Err(error(libc::EINVAL));
                }
                let written =
                    self.write(node, handle, (fuse_flags, flags), &data.from_guest, offset)?;
                reply.words(&[written as u32, 0]);
            }
            Operation::StatFs => self.file_system(node, reply)?,
            Operation::Release { handle } => self.release(node, handle)?,
            Operation::Fsync { handle, data_only } => self.sync(node, handle, data_only)?,
            Operation::SetXattr {
                name,
                value,
                flags,
                kill_sgid,
            } => self.set_extended(node, name, value, flags, kill_sgid)?,
            Operation::GetXattr { name, size } => self.get_extended(node, name, size, reply)?,
            Operation::ListXattr { size } => self.list_extended(node, size, reply)?,
            Operation::RemoveXattr { name } => self.remove_extended(node, name)?,
            Operation::Init {
                major,
                max_readahead,
                flags,
            } => self.init(major, max_readahead, flags, reply)?,
            Operation::ReadDir {
                handle,
                offset,
                size,
                plus,
            } => {
                let room = (size as usize).min(data.to_guest.len().saturating_sub(REPLY_BYTES));
                self.list((node, handle), offset, room, plus, reply)?;
            }
            Operation::Interrupt => {}
            Operation::Destroy => self.forget_all(),
            Operation::Fallocate {
                handle,
                offset,
                length,
                mode,
            } => self.allocate(node, handle, mode, (offset, length))?,
            Operation::Lseek {
                handle,
                offset,
                whence,
            } => reply.longs(&[self.seek(node, handle, offset, whence)?]),
            Operation::CopyFileRange(copy) => {
                reply.words(&[self.copy(node, &copy)? as u32, 0]);
            }
            Operation::SyncFs => self.sync_all(node)?,
            Operation::Statx { .. } => {
                let attributes = self.attributes(node)?;
                self.say_statx(&attributes, reply);
            }
        }
        Ok(Answer::Said)
    }

    fn init(
        &mut self,
        major: u32,
        max_readahead: u32,
        offered: u64,
        reply: &mut Reply,
    ) -> io::Result<()> {
        if major < VERSION[0] {
            return Err(error(libc::EPROTO));
        }
        // Without it messages have a shape that is not known here.
        if offered & flags::SETXATTR_EXT == 0 && major == VERSION[0] {
            return Err(error(libc::EPROTO));
        }
        self.forget_all();
        let agreed = offered & flags::WANTED;
        reply.words(&VERSION);
        reply.words(&[max_readahead, agreed as u32]);
        reply.half(u16::MAX); // max_background
        reply.half(u16::MAX / 4 * 3); // congestion_threshold
        reply.words(&[u32::from(MAX_PAGES) * 4096, 1]); // max_write, time_gran
        reply.half(MAX_PAGES);
        reply.half(0); // map_alignment
        reply.words(&[(agreed >> 32) as u32]);
        reply.bytes(&[0; 28]);
        Ok(())
    }

    fn lookup(
        &mut self,
        parent: u64,
        name: super::super::operation::Name<'_>,
    ) -> io::Result<Entry> {
        let told = self
            .leave_room()
            .and_then(|()| self.tell(parent, name.as_c_str()));
        match told {
            // No node: that is believed as long as anything else.
            Err(missing) if missing.raw_os_error() == Some(libc::ENOENT) => Ok(Entry {
                valid_s: BELIEF_S,
                ..Entry::default()
            }),
            // After any error but this one the guest's kernel takes a name that it knows for gone,
            // and whatever is mounted on it or below with it.
            Err(full) if matches!(full.raw_os_error(), Some(libc::ENFILE | libc::EMFILE)) => {
                Err(error(libc::ENOMEM))
            }
            told => told,
        }
    }

    fn forget_pairs(&mut self, pairs: &[u8]) {
        for pair in pairs.chunks_exact(16) {
            let (node, count) = pair.split_at(8);
            if let (Ok(node), Ok(count)) = (node.try_into(), count.try_into()) {
                self.nodes
                    .forget(u64::from_le_bytes(node), u64::from_le_bytes(count));
            }
        }
    }
}
