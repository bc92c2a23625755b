//! What is done to names: files are made, linked, moved and removed.

use std::{
    ffi::CStr,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::ffi::OsStringExt,
    },
};

use nix::{
    fcntl::{AtFlags, OFlag, RenameFlags, openat, readlinkat, renameat2},
    sys::stat::{SFlag, mkdirat, mknodat, umask},
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat},
};

use super::{
    super::{
        operation::{Create, Name, NewFile},
        reply::Entry,
    },
    Number, Share,
    contents::Opened,
    error, mode_of, sys,
};

/// A user and a group of the guest.
type Caller = (u32, u32);

impl Share {
    pub(super) fn read_link(&mut self, node: u64) -> io::Result<Vec<u8>> {
        let target = readlinkat(self.nodes.descriptor(node)?, c"")?;
        Ok(target.into_vec())
    }

    pub(super) fn make_link(
        &mut self,
        caller: Caller,
        parent: u64,
        name: Name<'_>,
        target: &CStr,
    ) -> io::Result<Entry> {
        let name = name.as_c_str();
        self.make(caller, parent, name, |directory| {
            Ok(symlinkat(target, directory, name)?)
        })?;
        self.tell(parent, name)
    }

    /// Makes no device: only the host says what its own device files are. The device 0:0 is
    /// none, it is how overlayfs says that a file is gone.
    pub(super) fn make_node(
        &mut self,
        caller: Caller,
        parent: u64,
        name: Name<'_>,
        (mode, umask): (u32, u32),
        device: u32,
    ) -> io::Result<Entry> {
        let kind = SFlag::from_bits_truncate(mode & libc::S_IFMT);
        match mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => {}
            libc::S_IFCHR if device == 0 => {}
            _ => return Err(error(libc::EPERM)),
        }
        self.mask(umask);
        let name = name.as_c_str();
        self.make(caller, parent, name, |directory| {
            Ok(mknodat(directory, name, kind, mode_of(mode), 0)?)
        })?;
        self.tell(parent, name)
    }

    pub(super) fn make_directory(
        &mut self,
        caller: Caller,
        parent: u64,
        name: Name<'_>,
        (mode, umask): (u32, u32),
    ) -> io::Result<Entry> {
        self.mask(umask);
        let name = name.as_c_str();
        self.make(caller, parent, name, |directory| {
            Ok(mkdirat(directory, name, mode_of(mode))?)
        })?;
        self.tell(parent, name)
    }

    /// Makes a file and opens it; one that is there already is only opened, unless the guest
    /// wants its own.
    pub(super) fn create(
        &mut self,
        caller: Caller,
        parent: u64,
        create: &Create<'_>,
    ) -> io::Result<(Entry, Opened)> {
        let flags = self.open_flags(create.file.flags)?;
        self.leave_room()?;
        self.mask(create.file.umask);
        let name = create.name.as_c_str();
        let made = self.make(caller, parent, name, |directory| {
            let exclusive = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            Ok(openat(
                directory,
                name,
                flags | exclusive,
                mode_of(create.file.mode),
            )?)
        });
        let file = match made {
            // Made by the host since the guest looked: opened like any other file.
            Err(exists)
                if exists.raw_os_error() == Some(libc::EEXIST)
                    && create.file.flags as i32 & libc::O_EXCL == 0 =>
            {
                let entry = self.tell(parent, name)?;
                let opened = self.open_file(entry.node, create.file.flags, create.file.fuse_flags);
                if opened.is_err() {
                    self.nodes.forget(entry.node, 1);
                }
                return Ok((entry, opened?));
            }
            made => made?,
        };
        let attributes = sys::attributes(&file)?;
        let entry = self.tell_of(&attributes, parent, name)?;
        let opened = self.opened(entry.node, &attributes, file.into(), flags)?;
        Ok((entry, opened))
    }

    /// Makes a file without a name (`O_TMPFILE`) and opens it.
    pub(super) fn make_unnamed(
        &mut self,
        caller: Caller,
        parent: u64,
        wanted: &NewFile,
    ) -> io::Result<(Entry, Opened)> {
        let linkable = wanted.flags & libc::O_EXCL as u32;
        let flags = self.open_flags(wanted.flags)?;
        self.leave_room()?;
        self.mask(wanted.umask);
        self.may_write()?;
        let own = self.own;
        let directory = self.nodes.descriptor(parent)?;
        let file = {
            let _owner = sys::Owner::assume(own, caller)?;
            let flags = flags
                | OFlag::O_TMPFILE
                | OFlag::from_bits_retain(linkable as i32)
                | OFlag::O_CLOEXEC;
            openat(directory, c".", flags, mode_of(wanted.mode))?
        };
        let attributes = sys::attributes(&file)?;
        let entry = self.tell_of(&attributes, parent, c"")?;
        let opened = self.opened(entry.node, &attributes, file.into(), flags)?;
        Ok((entry, opened))
    }

    pub(super) fn unlink(&mut self, parent: u64, name: Name<'_>) -> io::Result<()> {
        self.remove(parent, name, UnlinkatFlags::NoRemoveDir)
    }

    pub(super) fn remove_directory(&mut self, parent: u64, name: Name<'_>) -> io::Result<()> {
        self.remove(parent, name, UnlinkatFlags::RemoveDir)
    }

    fn remove(&mut self, parent: u64, name: Name<'_>, flags: UnlinkatFlags) -> io::Result<()> {
        self.may_write()?;
        let directory = self.nodes.descriptor(parent)?;
        Ok(unlinkat(directory, name.as_c_str(), flags)?)
    }

    pub(super) fn rename(
        &mut self,
        (old_parent, old_name): (u64, Name<'_>),
        (new_parent, new_name): (u64, Name<'_>),
        flags: u32,
    ) -> io::Result<()> {
        self.may_write()?;
        let flags = RenameFlags::from_bits(flags).ok_or_else(|| error(libc::EINVAL))?;
        let (old_name, new_name) = (old_name.as_c_str(), new_name.as_c_str());
        let (old, new) = self.nodes.descriptors(old_parent, new_parent)?;
        renameat2(old, old_name, new, new_name, flags)?;
        let moved = sys::attributes_at(new, new_name);
        let exchanged = flags
            .contains(RenameFlags::RENAME_EXCHANGE)
            .then(|| sys::attributes_at(old, old_name));
        if let Ok(moved) = moved {
            self.nodes.moved(&moved, new_parent, new_name);
        }
        if let Some(Ok(exchanged)) = exchanged {
            self.nodes.moved(&exchanged, old_parent, old_name);
        }
        Ok(())
    }

    pub(super) fn link(
        &mut self,
        node: u64,
        new_parent: u64,
        new_name: Name<'_>,
    ) -> io::Result<Entry> {
        self.may_write()?;
        let new_name = new_name.as_c_str();
        // Through /proc, because linking a bare descriptor asks for a capability outside of any
        // user namespace.
        let through = |file: BorrowedFd<'_>, directory: BorrowedFd<'_>| {
            linkat(
                &self.descriptors,
                Number::of(file).as_c_str(),
                directory,
                new_name,
                AtFlags::AT_SYMLINK_FOLLOW,
            )
        };
        let handle = self.nodes.node(node)?.handle();
        match handle.map(|handle| self.handles.get(handle, node)) {
            // A file without a name has no other way.
            Some(Ok(handle)) => {
                let file = handle.file()?.as_fd();
                through(file, self.nodes.descriptor(new_parent)?)?;
            }
            _ => {
                let (file, directory) = self.nodes.descriptors(node, new_parent)?;
                through(file, directory)?;
            }
        }
        self.tell(new_parent, new_name)
    }

    /// Makes something called `name` in `parent`, owned by the guest's caller.
    fn make<T>(
        &mut self,
        (uid, gid): Caller,
        parent: u64,
        name: &CStr,
        make: impl Fn(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        self.may_write()?;
        let own = self.own;
        let directory = self.nodes.descriptor(parent)?;
        let by_caller = {
            let _owner = sys::Owner::assume(own, (uid, gid))?;
            make(directory)
        };
        match by_caller {
            // The guest's kernel has let the caller, who may be in a group that only it knows of.
            Err(refused) if refused.raw_os_error() == Some(libc::EACCES) => {
                let made = make(directory)?;
                let inherits_group =
                    u32::from(sys::attributes(directory)?.stx_mode) & libc::S_ISGID != 0;
                let gid = (!inherits_group).then_some(Gid::from_raw(gid));
                let uid = Some(Uid::from_raw(uid));
                fchownat(directory, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                Ok(made)
            }
            done => done,
        }
    }

    /// Makes the caller's umask the thread's: the host applies it, unless the directory has a
    /// default ACL, which then counts instead.
    fn mask(&mut self, wanted: u32) {
        let wanted = wanted & 0o777;
        if self.umask != wanted {
            umask(mode_of(wanted));
            self.umask = wanted;
        }
    }
}
