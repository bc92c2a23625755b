//! What each FUSE message does. Everything in it is the guest's: numbers of
//! nodes and handles are looked up, names checked, sizes bounded, flags masked.

use std::{
    ffi::CStr,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    time::Duration,
};

use fuse_backend_rs::{
    abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV, stat64, statvfs64},
    api::filesystem::{
        Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply,
        OpenOptions, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
    },
};
use nix::{
    fcntl::{
        AtFlags, FallocateFlags, FcntlArg, OFlag, RenameFlags, fallocate, fcntl, openat,
        readlinkat, renameat2,
    },
    sys::{
        stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, mkdirat, mknodat, utimensat},
        time::TimeSpec,
    },
    unistd::{
        Gid, Uid, UnlinkatFlags, Whence, fchownat, fdatasync, fsync, ftruncate, linkat, lseek64,
        symlinkat, truncate, unlinkat,
    },
};

use super::{
    BELIEF, Number, Share, State, check_name, error,
    nodes::{ROOT, Version},
    sys,
};

/// What FUSE can do and we want; see `docs/decisions` for what we leave out.
const WANTED: [FsOptions; 12] = [
    FsOptions::ASYNC_READ,
    FsOptions::ATOMIC_O_TRUNC,
    FsOptions::BIG_WRITES,
    FsOptions::AUTO_INVAL_DATA,
    FsOptions::DO_READDIRPLUS,
    FsOptions::READDIRPLUS_AUTO,
    FsOptions::ASYNC_DIO,
    FsOptions::PARALLEL_DIROPS,
    FsOptions::MAX_PAGES,
    FsOptions::CACHE_SYMLINKS,
    FsOptions::HANDLE_KILLPRIV_V2,
    FsOptions::INIT_EXT,
];

/// The longest value, or list of names, of extended attributes that Linux knows.
const MAX_ATTRIBUTE_BYTES: usize = 64 * 1024;

/// Room for directory entries that is read at a time.
const MAX_ENTRIES_BYTES: usize = 64 * 1024;

/// Flags of `open` that the guest may choose.
const OPEN_FLAGS: OFlag = OFlag::O_ACCMODE
    .union(OFlag::O_APPEND)
    .union(OFlag::O_TRUNC)
    .union(OFlag::O_SYNC)
    .union(OFlag::O_DSYNC);

/// Hands an entry on and returns its size in the reply, 0 when the reply is full.
type Add<'a> = dyn FnMut(&mut State, DirEntry<'_>) -> io::Result<usize> + 'a;

impl Share {
    fn open_flags(&self, flags: u32) -> io::Result<OFlag> {
        let flags = OFlag::from_bits_truncate(flags as i32) & OPEN_FLAGS;
        let writes = (flags & OFlag::O_ACCMODE) != OFlag::O_RDONLY;
        if writes || flags.contains(OFlag::O_TRUNC) {
            self.may_write()?;
        }
        Ok(flags)
    }

    fn told(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.tell(&mut self.state(), parent, name)
    }

    /// Opens a node and says whether the guest may go on with what it has cached of it.
    fn open_node(
        &self,
        number: u64,
        flags: OFlag,
        fuse_flags: u32,
    ) -> io::Result<(u64, OpenOptions)> {
        let state = &mut *self.state();
        let file = self.reopen(state, number, flags)?;
        if flags.contains(OFlag::O_TRUNC) && fuse_flags & FOPEN_IN_KILL_SUIDGID != 0 {
            self.drop_set_ids(state, number)?;
        }
        let version = Version::of(&sys::attributes(&file)?.stat);
        let node = state.nodes.get_mut(number)?;
        let mut options = OpenOptions::empty();
        if version.is_some() {
            options.set(OpenOptions::KEEP_CACHE, node.seen == version);
            options.set(OpenOptions::CACHE_DIR, node.kind == libc::S_IFDIR);
        }
        node.seen = version;
        let append = flags.contains(OFlag::O_APPEND);
        Ok((state.handles.insert(number, file, append), options))
    }

    /// What a write of someone without `CAP_FSETID` does to a file.
    fn drop_set_ids(&self, state: &State, number: u64) -> io::Result<()> {
        let path = state.nodes.get(number)?.path.as_fd();
        let mode = sys::attributes(path)?.stat.st_mode;
        let mut dropped = libc::S_ISUID;
        if mode & libc::S_IXGRP != 0 {
            dropped |= libc::S_ISGID;
        }
        if mode & dropped == 0 {
            return Ok(());
        }
        self.set_mode(path, mode & !dropped)
    }

    fn set_mode(&self, path: impl AsFd, mode: u32) -> io::Result<()> {
        let name = Number::of(path.as_fd());
        Ok(fchmodat(
            &self.descriptors,
            name.as_c_str(),
            mode_of(mode),
            FchmodatFlags::FollowSymlink,
        )?)
    }

    /// Makes something called `name` in `parent`, owned by the guest's caller.
    fn make<T>(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        make: impl Fn(&OwnedFd) -> io::Result<T>,
    ) -> io::Result<T> {
        self.may_write()?;
        check_name(name.to_bytes()).map_err(error)?;
        let state = self.state();
        let directory = &state.nodes.get(parent)?.path;
        let by_caller = {
            let _owner = sys::Owner::assume(context.uid, context.gid)?;
            make(directory)
        };
        match by_caller {
            // The guest's kernel has let the caller, who may be in a group that only it knows of.
            Err(refused) if refused.raw_os_error() == Some(libc::EACCES) => {
                let made = make(directory)?;
                let inherits_group = sys::attributes(directory)?.stat.st_mode & libc::S_ISGID != 0;
                let gid = (!inherits_group).then_some(Gid::from_raw(context.gid));
                let uid = Some(Uid::from_raw(context.uid));
                fchownat(directory, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                Ok(made)
            }
            done => done,
        }
    }

    fn list(
        &self,
        number: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut Add<'_>,
    ) -> io::Result<()> {
        let state = &mut *self.state();
        let mut entries = std::mem::take(&mut state.entries);
        entries.resize((size as usize).min(MAX_ENTRIES_BYTES), 0);
        let listed = read_entries(state, number, handle, offset, &mut entries)
            .and_then(|len| add_entries(state, &entries[..len], add));
        state.entries = entries;
        listed
    }

    fn attribute_path(&self, number: u64) -> io::Result<Number> {
        Ok(Number::of(self.state().nodes.get(number)?.path.as_fd()))
    }

    fn remove(&self, parent: u64, name: &CStr, flags: UnlinkatFlags) -> io::Result<()> {
        self.may_write()?;
        check_name(name.to_bytes()).map_err(error)?;
        Ok(unlinkat(
            &self.state().nodes.get(parent)?.path,
            name,
            flags,
        )?)
    }

    fn sync(&self, number: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let state = &mut *self.state();
        let file = &state.handles.get(handle, number)?.file;
        if data_only {
            fdatasync(file)?;
        } else {
            fsync(file)?;
        }
        Ok(())
    }

    fn set_attributes(
        &self,
        number: u64,
        wanted: &stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<()> {
        let state = &mut *self.state();
        let path = &state.nodes.get(number)?.path;
        let chosen = |flag, id| valid.contains(flag).then_some(id);
        let uid = chosen(SetattrValid::UID, wanted.st_uid).map(Uid::from_raw);
        let gid = chosen(SetattrValid::GID, wanted.st_gid).map(Gid::from_raw);
        if uid.is_some() || gid.is_some() {
            let flags = AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW;
            fchownat(path, c"", uid, gid, flags)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            match handle {
                Some(handle) => {
                    ftruncate(&state.handles.get(handle, number)?.file, wanted.st_size)?;
                }
                None if state.nodes.get(number)?.kind == libc::S_IFREG => {
                    truncate(Number::of(path.as_fd()).as_c_str(), wanted.st_size)?;
                }
                None => return Err(error(libc::EINVAL)),
            }
            if valid.contains(SetattrValid::KILL_SUIDGID) {
                self.drop_set_ids(state, number)?;
            }
        }
        let path = &state.nodes.get(number)?.path;
        if valid.contains(SetattrValid::MODE) {
            self.set_mode(path, wanted.st_mode)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |set, now, seconds, nanoseconds| {
                if valid.contains(now) {
                    TimeSpec::UTIME_NOW
                } else if valid.contains(set) {
                    TimeSpec::new(seconds, nanoseconds)
                } else {
                    TimeSpec::UTIME_OMIT
                }
            };
            utimensat(
                &self.descriptors,
                Number::of(path.as_fd()).as_c_str(),
                &time(
                    SetattrValid::ATIME,
                    SetattrValid::ATIME_NOW,
                    wanted.st_atime,
                    wanted.st_atime_nsec,
                ),
                &time(
                    SetattrValid::MTIME,
                    SetattrValid::MTIME_NOW,
                    wanted.st_mtime,
                    wanted.st_mtime_nsec,
                ),
                UtimensatFlags::FollowSymlink,
            )?;
        }
        Ok(())
    }
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        Ok(WANTED.into_iter().collect())
    }

    fn destroy(&self) {
        self.forget_all();
    }

    fn lookup(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        match self.told(parent, name) {
            // No node: that is believed as long as anything else.
            Err(missing) if missing.raw_os_error() == Some(libc::ENOENT) => Ok(Entry {
                entry_timeout: BELIEF,
                ..Entry::default()
            }),
            told => told,
        }
    }

    fn forget(&self, _context: &Context, number: u64, count: u64) {
        self.state().nodes.forget(number, count);
    }

    fn getattr(
        &self,
        _context: &Context,
        number: u64,
        _handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let attributes = sys::attributes(&self.state().nodes.get(number)?.path)?;
        Ok((attributes.stat, BELIEF))
    }

    fn setattr(
        &self,
        context: &Context,
        number: u64,
        wanted: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.may_write()?;
        self.set_attributes(number, &wanted, handle, valid)?;
        self.getattr(context, number, handle)
    }

    fn readlink(&self, _context: &Context, number: u64) -> io::Result<Vec<u8>> {
        let target = readlinkat(&self.state().nodes.get(number)?.path, c"")?;
        Ok(target.into_vec())
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, |directory| {
            Ok(symlinkat(target, directory, name)?)
        })?;
        self.told(parent, name)
    }

    /// Makes no device: only the host says what its own device files are. The device 0:0 is
    /// none, it is how overlayfs says that a file is gone.
    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let kind = SFlag::from_bits_truncate(mode & libc::S_IFMT);
        match mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => {}
            libc::S_IFCHR if device == 0 => {}
            _ => return Err(error(libc::EPERM)),
        }
        self.make(context, parent, name, |directory| {
            Ok(mknodat(directory, name, kind, mode_of(mode & !umask), 0)?)
        })?;
        self.told(parent, name)
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, |directory| {
            Ok(mkdirat(directory, name, mode_of(mode & !umask))?)
        })?;
        self.told(parent, name)
    }

    fn unlink(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, UnlinkatFlags::NoRemoveDir)
    }

    fn rmdir(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, UnlinkatFlags::RemoveDir)
    }

    fn rename(
        &self,
        _context: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.may_write()?;
        check_name(old_name.to_bytes()).map_err(error)?;
        check_name(new_name.to_bytes()).map_err(error)?;
        let state = self.state();
        Ok(renameat2(
            &state.nodes.get(old_parent)?.path,
            old_name,
            &state.nodes.get(new_parent)?.path,
            new_name,
            RenameFlags::from_bits_truncate(flags),
        )?)
    }

    fn link(
        &self,
        _context: &Context,
        number: u64,
        new_parent: u64,
        new_name: &CStr,
    ) -> io::Result<Entry> {
        self.may_write()?;
        check_name(new_name.to_bytes()).map_err(error)?;
        {
            let state = self.state();
            // Through /proc, because linking a bare descriptor asks for a capability
            // outside of any user namespace.
            linkat(
                &self.descriptors,
                Number::of(state.nodes.get(number)?.path.as_fd()).as_c_str(),
                &state.nodes.get(new_parent)?.path,
                new_name,
                AtFlags::AT_SYMLINK_FOLLOW,
            )?;
        }
        self.told(new_parent, new_name)
    }

    fn open(
        &self,
        _context: &Context,
        number: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = self.open_flags(flags)?;
        let (handle, options) = self.open_node(number, flags, fuse_flags)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        wanted: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let flags = self.open_flags(wanted.flags)?;
        self.leave_room(&self.state())?;
        let made = self.make(context, parent, name, |directory| {
            let exclusive = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let mode = mode_of(wanted.mode & !wanted.umask);
            Ok(openat(directory, name, flags | exclusive, mode)?)
        });
        let file = match made {
            Ok(file) => file,
            // Made by the host since the guest looked: opened like any other file, by its node.
            Err(exists)
                if exists.raw_os_error() == Some(libc::EEXIST)
                    && wanted.flags as i32 & libc::O_EXCL == 0 =>
            {
                let entry = self.told(parent, name)?;
                let (handle, options) = self.open_node(entry.inode, flags, wanted.fuse_flags)?;
                return Ok((entry, Some(handle), options, None));
            }
            Err(other) => return Err(other),
        };
        let path = openat(
            &self.descriptors,
            Number::of(file.as_fd()).as_c_str(),
            OFlag::O_PATH | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        let attributes = sys::attributes(&path)?;
        let state = &mut *self.state();
        let entry = state.tell(path, &attributes);
        let append = flags.contains(OFlag::O_APPEND);
        let handle = state.handles.insert(entry.inode, file.into(), append);
        Ok((entry, Some(handle), OpenOptions::empty(), None))
    }

    fn read(
        &self,
        _context: &Context,
        number: u64,
        handle: u64,
        into: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let state = &mut *self.state();
        let file = &mut state.handles.get(handle, number)?.file;
        into.write_from(file, size as usize, offset)
    }

    fn write(
        &self,
        _context: &Context,
        number: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.may_write()?;
        let state = &mut *self.state();
        let handle = state.handles.get(handle, number)?;
        let append = flags as i32 & libc::O_APPEND != 0;
        if handle.append != append {
            let flags = if append {
                OFlag::O_APPEND
            } else {
                OFlag::empty()
            };
            fcntl(&handle.file, FcntlArg::F_SETFL(flags))?;
            handle.append = append;
        }
        let written = from.read_to(&mut handle.file, size as usize, offset)?;
        if fuse_flags & WRITE_KILL_PRIV != 0 {
            self.drop_set_ids(state, number)?;
        }
        Ok(written)
    }

    fn fsync(
        &self,
        _context: &Context,
        number: u64,
        data_only: bool,
        handle: u64,
    ) -> io::Result<()> {
        self.sync(number, handle, data_only)
    }

    fn fsyncdir(
        &self,
        _context: &Context,
        number: u64,
        data_only: bool,
        handle: u64,
    ) -> io::Result<()> {
        self.sync(number, handle, data_only)
    }

    fn fallocate(
        &self,
        _context: &Context,
        number: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.may_write()?;
        let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
            return Err(error(libc::EFBIG));
        };
        let mode = FallocateFlags::from_bits(mode as i32).ok_or_else(|| error(libc::EOPNOTSUPP))?;
        let state = &mut *self.state();
        let file = &state.handles.get(handle, number)?.file;
        Ok(fallocate(file, mode, offset, length)?)
    }

    /// Where data or a hole begins; all else the guest knows by itself.
    fn lseek(
        &self,
        _context: &Context,
        number: u64,
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
        let state = &mut *self.state();
        let file = &state.handles.get(handle, number)?.file;
        Ok(lseek64(file, offset, whence)? as u64)
    }

    fn release(
        &self,
        _context: &Context,
        number: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.state().handles.remove(handle, number)
    }

    fn statfs(&self, _context: &Context, number: u64) -> io::Result<statvfs64> {
        sys::file_system(&self.state().nodes.get(number)?.path)
    }

    fn opendir(
        &self,
        _context: &Context,
        number: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = self.open_node(number, OFlag::O_RDONLY | OFlag::O_DIRECTORY, 0)?;
        Ok((Some(handle), options))
    }

    fn releasedir(
        &self,
        _context: &Context,
        number: u64,
        _flags: u32,
        handle: u64,
    ) -> io::Result<()> {
        self.state().handles.remove(handle, number)
    }

    fn readdir(
        &self,
        _context: &Context,
        number: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list(number, handle, size, offset, &mut |_, entry| add(entry))
    }

    fn readdirplus(
        &self,
        _context: &Context,
        number: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list(number, handle, size, offset, &mut |state, entry| {
            // A name that cannot be told of, such as `..` or one just removed, is only listed.
            let told = c_name(entry.name)
                .and_then(|name| self.tell(state, number, &name).ok())
                .unwrap_or_default();
            let added = add(entry, told);
            if told.inode != 0 && !matches!(added, Ok(1..)) {
                state.nodes.forget(told.inode, 1);
            }
            added
        })
    }

    fn setxattr(
        &self,
        _context: &Context,
        number: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.may_write()?;
        let path = self.attribute_path(number)?;
        sys::set_attribute(path.as_c_str(), name, value, flags as i32)
    }

    fn getxattr(
        &self,
        _context: &Context,
        number: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let path = self.attribute_path(number)?;
        let mut value = vec![0; (size as usize).min(MAX_ATTRIBUTE_BYTES)];
        let len = sys::get_attribute(path.as_c_str(), name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(len as u32));
        }
        value.truncate(len);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _context: &Context, number: u64, size: u32) -> io::Result<ListxattrReply> {
        let path = self.attribute_path(number)?;
        let mut names = vec![0; (size as usize).min(MAX_ATTRIBUTE_BYTES)];
        let len = sys::list_attributes(path.as_c_str(), &mut names)?;
        if size == 0 {
            return Ok(ListxattrReply::Count(len as u32));
        }
        names.truncate(len);
        Ok(ListxattrReply::Names(names))
    }

    fn removexattr(&self, _context: &Context, number: u64, name: &CStr) -> io::Result<()> {
        self.may_write()?;
        let path = self.attribute_path(number)?;
        sys::remove_attribute(path.as_c_str(), name)
    }
}

/// Reads entries of an open directory from `offset` on, which is a place that the kernel
/// named with an entry before.
fn read_entries(
    state: &mut State,
    number: u64,
    handle: u64,
    offset: u64,
    entries: &mut [u8],
) -> io::Result<usize> {
    let directory = &state.handles.get(handle, number)?.file;
    let offset = i64::try_from(offset).map_err(|_| error(libc::EINVAL))?;
    lseek64(directory, offset, Whence::SeekSet)?;
    if entries.is_empty() {
        return Ok(0);
    }
    sys::entries(directory, entries)
}

/// Hands on entries as the kernel lays them out, until the reply is full.
fn add_entries(state: &mut State, mut entries: &[u8], add: &mut Add<'_>) -> io::Result<()> {
    const HEAD: usize = 19;
    let mut first = true;
    while let Some((head, _)) = entries.split_first_chunk::<HEAD>() {
        let [ino @ .., _, _, _, _, _, _, _, _, _, _, _] = head;
        let [_, _, _, _, _, _, _, _, offset @ .., _, _, _] = head;
        let len = usize::from(u16::from_ne_bytes([head[16], head[17]]));
        let Some(name) = entries.get(HEAD..len) else {
            break;
        };
        let name = name.split(|byte| *byte == 0).next().unwrap_or(name);
        let entry = DirEntry {
            ino: u64::from_ne_bytes(*ino),
            offset: u64::from_ne_bytes(*offset),
            type_: u32::from(head[18]),
            name,
        };
        match add(state, entry) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if first => return Err(error),
            // The guest has entries already that it was told of: it gets those.
            Err(_) => break,
        }
        first = false;
        entries = &entries[len..];
    }
    Ok(())
}

/// A name in a directory entry with the zero after it.
fn c_name(name: &[u8]) -> Option<std::ffi::CString> {
    std::ffi::CString::new(name).ok()
}

fn mode_of(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode & 0o7777)
}

const _: () = assert!(ROOT == fuse_backend_rs::api::filesystem::ROOT_ID);
