//! What is done to files that are open.

use std::{fs::File, io, os::fd::AsFd};

use nix::{
    fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl, openat},
    sys::stat::{Mode, fchmod},
    unistd::{Whence, fdatasync, fsync, ftruncate, lseek64},
};

use super::{
    super::{operation::Copy, reply::Reply},
    Attributes, Number, Share, error, mode_of,
    nodes::{Version, has_set_ids},
    sys,
};
use crate::virtio::slices::Slices;

/// `FOPEN_IN_KILL_SUIDGID`
const OPEN_KILL_SUIDGID: u32 = 1;
/// `FUSE_WRITE_KILL_SUIDGID`
const WRITE_KILL_SUIDGID: u32 = 1 << 2;

/// Making room and copying have no such flag, and the guest's kernel leaves the bits to us whoever
/// asks: they go.
const ALWAYS_KILL: bool = true;

/// `FOPEN_KEEP_CACHE`
const KEEP_CACHE: u32 = 1 << 1;
/// `FOPEN_CACHE_DIR`
const CACHE_DIR: u32 = 1 << 3;

/// The most that one message copies: others wait for it.
const MAX_COPY_BYTES: u64 = 64 << 20;

/// Flags of `open` that the guest may choose.
const OPEN_FLAGS: OFlag = OFlag::O_ACCMODE
    .union(OFlag::O_APPEND)
    .union(OFlag::O_TRUNC)
    .union(OFlag::O_SYNC)
    .union(OFlag::O_DSYNC);

/// A file that was opened: its number and `FOPEN_...`.
pub(super) struct Opened {
    pub(super) handle: u64,
    pub(super) flags: u32,
}

impl Share {
    pub(super) fn open_flags(&self, flags: u32) -> io::Result<OFlag> {
        let flags = OFlag::from_bits_truncate(flags as i32) & OPEN_FLAGS;
        let writes = (flags & OFlag::O_ACCMODE) != OFlag::O_RDONLY;
        if writes || flags.contains(OFlag::O_TRUNC) {
            self.may_write()?;
        }
        Ok(flags)
    }

    pub(super) fn open_file(
        &mut self,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<Opened> {
        let flags = self.open_flags(flags)?;
        let (file, mut attributes) = self.reopen(node, flags - OFlag::O_TRUNC)?;
        if flags.contains(OFlag::O_TRUNC) {
            // Only now it is certain which file it is.
            let mode = Some(u32::from(attributes.stx_mode)).filter(|_| has_set_ids(&attributes));
            self.empty(node, &file, flags)?;
            set_ids_after(&file, mode, fuse_flags & OPEN_KILL_SUIDGID != 0)?;
            attributes = sys::attributes(&file)?;
        }
        self.opened(node, &attributes, file, flags)
    }

    pub(super) fn open_directory(&mut self, node: u64) -> io::Result<Opened> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let (file, attributes) = self.reopen(node, flags)?;
        self.opened(node, &attributes, file, flags)
    }

    /// Keeps an open file and says whether the guest may go on with what it has cached of it.
    pub(super) fn opened(
        &mut self,
        number: u64,
        attributes: &Attributes,
        file: File,
        flags: OFlag,
    ) -> io::Result<Opened> {
        let version = Version::of(attributes);
        let append = flags.contains(OFlag::O_APPEND);
        let node = self.nodes.node_mut(number)?;
        let mut options = 0;
        if version.is_some() {
            if node.seen == version {
                options |= KEEP_CACHE;
            }
            if node.kind == libc::S_IFDIR {
                options |= CACHE_DIR;
            }
        }
        node.seen = version;
        let handle = self
            .handles
            .insert(number, attributes.stx_mnt_id, file, append);
        node.handles.push(handle);
        Ok(Opened {
            handle,
            flags: options,
        })
    }

    /// Opens a node for reading or writing, without emptying it.
    fn reopen(&mut self, number: u64, flags: OFlag) -> io::Result<(File, Attributes)> {
        if !matches!(self.nodes.node(number)?.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(error(libc::ENXIO));
        }
        self.leave_room()?;
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        // What is open already may have no name any more.
        let open = self.nodes.node(number)?.handle();
        let open = open.and_then(|handle| self.handles.get(handle, number).ok());
        let held = match open {
            Some(handle) => Some(handle.file()?.as_fd()),
            None => self.nodes.held_descriptor(number),
        };
        if let Some(held) = held {
            let name = Number::of(held);
            let file = openat(&self.descriptors, name.as_c_str(), flags, Mode::empty())?;
            let attributes = sys::attributes(&file)?;
            return Ok((file.into(), attributes));
        }
        // A name may mean anything by now, and a device can notice that it is opened. So the path
        // comes first, and the file only when it is the node's.
        let found = self.nodes.open_path(number)?;
        let attributes = sys::attributes(&found)?;
        self.nodes.check_identity(number, &attributes)?;
        let name = Number::of(found.as_fd());
        let file = openat(&self.descriptors, name.as_c_str(), flags, Mode::empty())?;
        Ok((file.into(), attributes))
    }

    /// Empties a file that was opened for writing, or opens it so for that.
    fn empty(&mut self, node: u64, file: &File, flags: OFlag) -> io::Result<()> {
        if (flags & OFlag::O_ACCMODE) != OFlag::O_RDONLY {
            return Ok(ftruncate(file, 0)?);
        }
        let (file, _) = self.reopen(node, OFlag::O_WRONLY)?;
        Ok(ftruncate(file, 0)?)
    }

    pub(super) fn write(
        &mut self,
        node: u64,
        handle: u64,
        (fuse_flags, flags): (u32, u32),
        data: &Slices<'_>,
        offset: u64,
    ) -> io::Result<usize> {
        self.may_write()?;
        let has_set_ids = self.nodes.node(node)?.set_ids;
        let handle = self.handles.get_mut(handle, node)?;
        let append = flags as i32 & libc::O_APPEND != 0;
        if handle.append != append {
            let flags = if append {
                OFlag::O_APPEND
            } else {
                OFlag::empty()
            };
            fcntl(handle.file()?, FcntlArg::F_SETFL(flags))?;
            handle.append = append;
        }
        let file = handle.file()?;
        let mode = set_ids_before(file, has_set_ids)?;
        let written = sys::write(file, data.parts(), offset)?;
        set_ids_after(file, mode, fuse_flags & WRITE_KILL_SUIDGID != 0)?;
        Ok(written)
    }

    pub(super) fn release(&mut self, number: u64, handle: u64) -> io::Result<()> {
        self.handles.remove(handle, number)?;
        if let Ok(node) = self.nodes.node_mut(number) {
            node.handles.retain(|open| *open != handle);
        }
        Ok(())
    }

    pub(super) fn sync(&mut self, node: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let file = self.handles.get(handle, node)?.file()?;
        if data_only {
            fdatasync(file)?;
        } else {
            fsync(file)?;
        }
        Ok(())
    }

    /// Makes all that the guest knows of durable, on whatever devices it is.
    pub(super) fn sync_all(&mut self, node: u64) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let kind = self.nodes.node(node)?.kind;
        if kind != libc::S_IFDIR {
            return Err(error(libc::EINVAL));
        }
        self.nodes.descriptor(node)?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        for held in self.nodes.one_of_each_device() {
            let name = Number::of(held);
            let file = openat(&self.descriptors, name.as_c_str(), flags, Mode::empty())?;
            sys::sync_file_system(file)?;
        }
        Ok(())
    }

    pub(super) fn allocate(
        &mut self,
        node: u64,
        handle: u64,
        mode: u32,
        (offset, length): (u64, u64),
    ) -> io::Result<()> {
        self.may_write()?;
        let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
            return Err(error(libc::EFBIG));
        };
        let mode = FallocateFlags::from_bits(mode as i32).ok_or_else(|| error(libc::EOPNOTSUPP))?;
        let has_set_ids = self.nodes.node(node)?.set_ids;
        let file = self.handles.get(handle, node)?.file()?;
        let before = set_ids_before(file, has_set_ids)?;
        fallocate(file, mode, offset, length)?;
        set_ids_after(file, before, ALWAYS_KILL)
    }

    /// Where data or a hole begins; all else the guest knows by itself.
    pub(super) fn seek(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let whence = match whence as i32 {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(error(libc::EINVAL)),
        };
        let offset = i64::try_from(offset).map_err(|_| error(libc::EINVAL))?;
        let file = self.handles.get(handle, node)?.file()?;
        Ok(lseek64(file, offset, whence)? as u64)
    }

    /// Copies a part of one open file to another, by the host's file system if it can.
    pub(super) fn copy(&mut self, node: u64, copy: &Copy) -> io::Result<usize> {
        self.may_write()?;
        if copy.flags != 0 {
            return Err(error(libc::EINVAL));
        }
        let offset = |offset| i64::try_from(offset).map_err(|_| error(libc::EINVAL));
        let from = self.handles.get(copy.handle_in, node)?.file()?;
        let to = self.handles.get(copy.handle_out, copy.node_out)?.file()?;
        let length = copy.length.min(MAX_COPY_BYTES) as usize;
        let before = set_ids_before(to, self.nodes.node(copy.node_out)?.set_ids)?;
        let copied = sys::copy(
            (from, offset(copy.offset_in)?),
            (to, offset(copy.offset_out)?),
            length,
        )?;
        set_ids_after(to, before, ALWAYS_KILL)?;
        Ok(copied)
    }

    pub(super) fn file_system(&mut self, node: u64, reply: &mut Reply) -> io::Result<()> {
        let figures = match self.nodes.node(node)?.handle() {
            Some(handle) => sys::file_system(self.handles.get(handle, node)?.file()?)?,
            None => sys::file_system(self.nodes.descriptor(node)?)?,
        };
        reply.longs(&[
            figures.f_blocks,
            figures.f_bfree,
            figures.f_bavail,
            figures.f_files,
            figures.f_ffree,
        ]);
        reply.words(&[
            figures.f_bsize as u32,
            figures.f_namemax as u32,
            figures.f_frsize as u32,
        ]);
        reply.bytes(&[0; 28]);
        Ok(())
    }
}

/// The mode of a file that may have set-id bits, if it has, before it is changed.
///
/// The host's kernel takes them away at every change: the process is no one with `CAP_FSETID`
/// outside of its user namespace. Whether they go is the guest's to say.
pub(super) fn set_ids_before(file: impl AsFd, may_have: bool) -> io::Result<Option<u32>> {
    if !may_have {
        return Ok(None);
    }
    let attributes = sys::attributes(file)?;
    Ok(has_set_ids(&attributes).then_some(attributes.stx_mode.into()))
}

/// Gives a file that was changed its mode back, or what is left of it.
fn set_ids_after(file: &File, before: Option<u32>, kill: bool) -> io::Result<()> {
    match before {
        Some(mode) if kill => Ok(fchmod(file, mode_of(without_set_ids(mode)))?),
        Some(mode) => Ok(fchmod(file, mode_of(mode))?),
        None => Ok(()),
    }
}

/// What a change by someone without `CAP_FSETID` leaves of a mode.
pub(super) fn without_set_ids(mode: u32) -> u32 {
    let mut dropped = libc::S_ISUID;
    if mode & libc::S_IXGRP != 0 {
        dropped |= libc::S_ISGID;
    }
    mode & !dropped
}
