#![expect(
    unsafe_code,
    reason = "system calls that no crate of ours wraps: statx by descriptor, getdents64, \
              extended attributes by path, file system ids of one thread"
)]
//! The system calls of the shared directory that need raw pointers.

use std::{
    ffi::CStr,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd},
};

/// A file's attributes and the mount by which it was reached.
#[derive(Clone, Copy)]
pub(super) struct Attributes {
    pub(super) stat: libc::stat64,
    pub(super) mount: u64,
}

/// The attributes of an open file, also of one opened by path only.
pub(super) fn attributes(file: impl AsFd) -> io::Result<Attributes> {
    let mut x = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a C string of no bytes, `x` is as large as the call expects and is
    // written by it only within.
    let result = unsafe {
        libc::statx(
            file.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW,
            libc::STATX_BASIC_STATS | libc::STATX_MNT_ID,
            x.as_mut_ptr(),
        )
    };
    check(result)?;
    // SAFETY: every field is an integer and all were zeroed.
    let x = unsafe { x.assume_init() };
    // SAFETY: every field of stat64 is an integer, for which zero is a value.
    let mut stat: libc::stat64 = unsafe { MaybeUninit::zeroed().assume_init() };
    stat.st_dev = libc::makedev(x.stx_dev_major, x.stx_dev_minor);
    stat.st_rdev = libc::makedev(x.stx_rdev_major, x.stx_rdev_minor);
    stat.st_ino = x.stx_ino;
    stat.st_mode = u32::from(x.stx_mode);
    stat.st_nlink = u64::from(x.stx_nlink);
    stat.st_uid = x.stx_uid;
    stat.st_gid = x.stx_gid;
    stat.st_size = x.stx_size as i64;
    stat.st_blksize = i64::from(x.stx_blksize);
    stat.st_blocks = x.stx_blocks as i64;
    stat.st_atime = x.stx_atime.tv_sec;
    stat.st_atime_nsec = i64::from(x.stx_atime.tv_nsec);
    stat.st_mtime = x.stx_mtime.tv_sec;
    stat.st_mtime_nsec = i64::from(x.stx_mtime.tv_nsec);
    stat.st_ctime = x.stx_ctime.tv_sec;
    stat.st_ctime_nsec = i64::from(x.stx_ctime.tv_nsec);
    Ok(Attributes {
        stat,
        mount: x.stx_mnt_id,
    })
}

/// Figures of the file system that an open file is on.
pub(super) fn file_system(file: impl AsFd) -> io::Result<libc::statvfs64> {
    let mut figures = MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: `figures` is as large as the call expects and is written by it only within.
    let result = unsafe { libc::fstatvfs64(file.as_fd().as_raw_fd(), figures.as_mut_ptr()) };
    check(result)?;
    // SAFETY: every field is an integer and all were zeroed.
    Ok(unsafe { figures.assume_init() })
}

/// Reads directory entries as the kernel lays them out; 0 at the end.
pub(super) fn entries(directory: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the call writes at most `buffer.len()` bytes into `buffer`.
    let count = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            directory.as_fd().as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Reads an extended attribute; its length when `buffer` is empty.
pub(super) fn get_attribute(path: &CStr, name: &CStr, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: both are C strings, and the call writes at most `buffer.len()` bytes into `buffer`.
    let count = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Reads the names of all extended attributes; their length when `buffer` is empty.
pub(super) fn list_attributes(path: &CStr, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `path` is a C string, and the call writes at most `buffer.len()` bytes into `buffer`.
    let count = unsafe { libc::listxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes an extended attribute.
pub(super) fn set_attribute(path: &CStr, name: &CStr, value: &[u8], flags: i32) -> io::Result<()> {
    // SAFETY: both are C strings, and the call reads `value.len()` bytes of `value`.
    check(unsafe {
        libc::setxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    })
}

/// Removes an extended attribute.
pub(super) fn remove_attribute(path: &CStr, name: &CStr) -> io::Result<()> {
    // SAFETY: both are C strings.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
}

/// Makes new files of this thread belong to `uid` and `gid`, until it is dropped.
///
/// The ids are the thread's own: the calls are made without the C library, which would
/// change every thread.
pub(super) struct Owner {
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Owner {
    /// Takes the ids on.
    ///
    /// # Errors
    /// `EPERM` when the process may not take them on or they do not exist in its user namespace.
    pub(super) fn assume(uid: u32, gid: u32) -> io::Result<Self> {
        let mut owner = Self {
            uid: None,
            gid: None,
        };
        owner.gid = swap(libc::SYS_setfsgid, gid)?;
        owner.uid = swap(libc::SYS_setfsuid, uid)?;
        Ok(owner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some(uid) = self.uid {
            set_fs_id(libc::SYS_setfsuid, uid);
        }
        if let Some(gid) = self.gid {
            set_fs_id(libc::SYS_setfsgid, gid);
        }
    }
}

/// Sets an id and returns the one before it, `None` when that is the same.
fn swap(call: libc::c_long, id: u32) -> io::Result<Option<u32>> {
    let before = set_fs_id(call, u32::MAX);
    if before == id {
        return Ok(None);
    }
    set_fs_id(call, id);
    // The call tells nothing of its success; asking with an id that is none tells what is set.
    if set_fs_id(call, u32::MAX) != id {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    Ok(Some(before))
}

fn set_fs_id(call: libc::c_long, id: u32) -> u32 {
    // SAFETY: both calls take an integer and touch no memory.
    let before = unsafe { libc::syscall(call, id) };
    before as u32
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
