//! What is done to attributes, plain and extended.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::AtFlags,
    sys::{
        stat::{FchmodatFlags, UtimensatFlags, fchmodat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchownat, ftruncate, truncate},
};

use super::{
    super::{operation::SetAttr, reply::Reply},
    Attributes, BELIEF_S, Number, Share,
    contents::{set_ids_before, without_set_ids},
    device, error, mode_of,
    nodes::{gone, has_set_ids},
    sys,
};

/// `FATTR_...` of linux/fuse.h.
mod valid {
    pub(super) const MODE: u32 = 1 << 0;
    pub(super) const UID: u32 = 1 << 1;
    pub(super) const GID: u32 = 1 << 2;
    pub(super) const SIZE: u32 = 1 << 3;
    pub(super) const ATIME: u32 = 1 << 4;
    pub(super) const MTIME: u32 = 1 << 5;
    pub(super) const FH: u32 = 1 << 6;
    pub(super) const ATIME_NOW: u32 = 1 << 7;
    pub(super) const MTIME_NOW: u32 = 1 << 8;
    pub(super) const KILL_SUIDGID: u32 = 1 << 11;
}

/// The longest value, or list of names, of extended attributes that Linux knows.
const MAX_EXTENDED_BYTES: usize = 64 * 1024;

impl Share {
    /// Sets attributes and tells those that the file has then.
    pub(super) fn set_attributes(
        &mut self,
        number: u64,
        wanted: &SetAttr,
    ) -> io::Result<Attributes> {
        self.may_write()?;
        let has = |flags| wanted.valid & flags != 0;
        let node = self.nodes.node(number)?;
        let is_file = node.kind == libc::S_IFREG;
        let handle = node.handle().filter(|_| is_file);
        let may_have_set_ids = node.set_ids;
        let handle = match has(valid::FH) && is_file {
            true => Some(self.handles.get(wanted.handle, number)?),
            false => handle.and_then(|handle| self.handles.get(handle, number).ok()),
        };
        let file: BorrowedFd<'_> = match handle {
            Some(handle) => handle.file()?.as_fd(),
            None => self.nodes.descriptor(number)?,
        };
        let name = Number::of(file);
        let name = name.as_c_str();

        let uid = has(valid::UID).then(|| Uid::from_raw(wanted.uid));
        let gid = has(valid::GID).then(|| Gid::from_raw(wanted.gid));
        if uid.is_some() || gid.is_some() {
            let flags = AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW;
            fchownat(file, c"", uid, gid, flags)?;
        }
        if has(valid::SIZE) {
            let size = i64::try_from(wanted.size).map_err(|_| error(libc::EFBIG))?;
            if !is_file {
                return Err(error(libc::EINVAL));
            }
            let mode = set_ids_before(file, may_have_set_ids)?;
            if has(valid::FH) {
                ftruncate(file, size)?;
            } else {
                truncate(name, size)?;
            }
            if let Some(mode) = mode {
                let kill = has(valid::KILL_SUIDGID);
                let mode = if kill { without_set_ids(mode) } else { mode };
                set_mode(&self.descriptors, &Number::of(file), mode)?;
            }
        }
        if has(valid::MODE) {
            set_mode(&self.descriptors, &Number::of(file), wanted.mode)?;
        }
        if has(valid::ATIME | valid::MTIME) {
            let time = |set, now, (seconds, nanoseconds): (u64, u32)| {
                if has(now) {
                    TimeSpec::UTIME_NOW
                } else if has(set) {
                    TimeSpec::new(seconds as i64, i64::from(nanoseconds))
                } else {
                    TimeSpec::UTIME_OMIT
                }
            };
            utimensat(
                &self.descriptors,
                name,
                &time(valid::ATIME, valid::ATIME_NOW, wanted.atime),
                &time(valid::MTIME, valid::MTIME_NOW, wanted.mtime),
                UtimensatFlags::FollowSymlink,
            )?;
        }
        let attributes = sys::attributes(file)?;
        self.nodes.node_mut(number)?.set_ids = has_set_ids(&attributes);
        Ok(attributes)
    }

    /// The file as a path below the thread's working directory.
    fn path(&mut self, node: u64) -> io::Result<Number> {
        let handle = self.nodes.node(node)?.handle();
        Ok(match handle.map(|handle| self.handles.get(handle, node)) {
            Some(Ok(handle)) => Number::of(handle.file()?.as_fd()),
            _ => Number::of(self.nodes.descriptor(node)?),
        })
    }

    pub(super) fn set_extended(
        &mut self,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> io::Result<()> {
        self.may_write()?;
        let path = self.path(node)?;
        sys::set_attribute(path.as_c_str(), name, value, flags as i32)?;
        if kill_sgid {
            let mode = u32::from(self.attributes(node)?.stx_mode);
            if mode & libc::S_ISGID != 0 {
                set_mode(&self.descriptors, &path, mode & !libc::S_ISGID)?;
            }
        }
        Ok(())
    }

    /// Says the value, or its length when the guest has no room.
    pub(super) fn get_extended(
        &mut self,
        node: u64,
        name: &CStr,
        size: u32,
        reply: &mut Reply,
    ) -> io::Result<()> {
        self.say_of(node, size, reply, |path, room| {
            sys::get_attribute(path, name, room)
        })
    }

    /// Says all names, or their length when the guest has no room.
    pub(super) fn list_extended(
        &mut self,
        node: u64,
        size: u32,
        reply: &mut Reply,
    ) -> io::Result<()> {
        self.say_of(node, size, reply, sys::list_attributes)
    }

    /// Says what `get` finds out about a file. One that has no descriptor needs none for that:
    /// guests ask for the ACL of every file before they open it.
    fn say_of(
        &mut self,
        node: u64,
        size: u32,
        reply: &mut Reply,
        get: impl Fn(sys::Path<'_>, &mut [u8]) -> io::Result<usize>,
    ) -> io::Result<()> {
        if self.nodes.node(node)?.handle().is_some() || self.nodes.held_descriptor(node).is_some() {
            let path = self.path(node)?;
            return say(size, reply, |room| {
                get(sys::Path::Open(path.as_c_str()), room)
            });
        }
        let (directory, name) = self.nodes.place(node)?;
        let path = Number::below(directory, name);
        say(size, reply, |room| get(sys::Path::Named(&path), room)).map_err(gone)?;
        // What was found counts only if it is still that file's. That nothing was found costs no
        // second call: who goes on with another file by this name is told so.
        self.nodes.attributes(node).map(drop)
    }

    pub(super) fn remove_extended(&mut self, node: u64, name: &CStr) -> io::Result<()> {
        self.may_write()?;
        let path = self.path(node)?;
        sys::remove_attribute(path.as_c_str(), name)
    }

    /// Says a `struct fuse_statx_out`, the only one with a time of birth.
    pub(super) fn say_statx(&self, attributes: &Attributes, reply: &mut Reply) {
        let time = |reply: &mut Reply, time: libc::statx_timestamp| {
            reply.longs(&[time.tv_sec as u64]);
            reply.words(&[time.tv_nsec, 0]);
        };
        let known = libc::STATX_BASIC_STATS | libc::STATX_BTIME;
        reply.longs(&[BELIEF_S]);
        reply.words(&[0, 0]);
        reply.longs(&[0, 0]);
        reply.words(&[attributes.stx_mask & known, attributes.stx_blksize]);
        reply.longs(&[0]); // attributes: immutable files and the like are the host's
        reply.words(&[attributes.stx_nlink, attributes.stx_uid, attributes.stx_gid]);
        reply.half(attributes.stx_mode);
        reply.half(0);
        reply.longs(&[
            self.nodes
                .shown_inode(device(attributes), attributes.stx_ino),
            attributes.stx_size,
            attributes.stx_blocks,
            0,
        ]);
        time(reply, attributes.stx_atime);
        time(reply, attributes.stx_btime);
        time(reply, attributes.stx_ctime);
        time(reply, attributes.stx_mtime);
        reply.words(&[attributes.stx_rdev_major, attributes.stx_rdev_minor, 0, 0]);
        reply.bytes(&[0; 14 * 8]);
    }
}

/// `descriptors` is [`super::OwnFiles::descriptors`]: a file that was opened by path only has no other way.
fn set_mode(descriptors: &OwnedFd, file: &Number, mode: u32) -> io::Result<()> {
    let follow = FchmodatFlags::FollowSymlink;
    Ok(fchmodat(
        descriptors,
        file.as_c_str(),
        mode_of(mode),
        follow,
    )?)
}

/// Says what `get` writes, or only its length when `size` is 0.
fn say(
    size: u32,
    reply: &mut Reply,
    get: impl FnOnce(&mut [u8]) -> io::Result<usize>,
) -> io::Result<()> {
    if size == 0 {
        let len = get(&mut [])?;
        reply.words(&[len as u32, 0]);
        return Ok(());
    }
    reply.filled((size as usize).min(MAX_EXTENDED_BYTES), get)
}
