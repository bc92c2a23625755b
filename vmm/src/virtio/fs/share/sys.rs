#![expect(
    unsafe_code,
    reason = "system calls that no crate of ours wraps: statx, getdents64, extended attributes by \
              path, file system ids of one thread, and file contents straight to and from guest \
              memory"
)]
//! The system calls of the shared directory that need raw pointers.

use std::{
    ffi::{CStr, c_char, c_void},
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd},
};

use smallvec::SmallVec;
use vm_memory::VolatileSlice;

/// A file's attributes and the mount by which it was reached.
pub(super) type Attributes = libc::statx;

/// The attributes of an open file, also of one opened by path only.
pub(super) fn attributes(file: impl AsFd) -> io::Result<Attributes> {
    attributes_at(file, c"")
}

/// The attributes of `name` in a directory, not of what a link leads to.
pub(super) fn attributes_at(directory: impl AsFd, name: &CStr) -> io::Result<Attributes> {
    let mut attributes = MaybeUninit::<Attributes>::zeroed();
    // SAFETY: the path is a C string, `attributes` is as large as the call expects and is written
    // by it only within.
    let result = unsafe {
        libc::statx(
            directory.as_fd().as_raw_fd(),
            name.as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT,
            libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID,
            attributes.as_mut_ptr(),
        )
    };
    check(result)?;
    // SAFETY: every field is an integer and all were zeroed.
    Ok(unsafe { attributes.assume_init() })
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

/// Makes the whole file system that an open file is on durable.
pub(super) fn sync_file_system(file: impl AsFd) -> io::Result<()> {
    // SAFETY: takes a descriptor's number.
    check(unsafe { libc::syncfs(file.as_fd().as_raw_fd()) })
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

/// A path below the thread's working directory, which is the directory of its descriptors.
#[derive(Clone, Copy)]
pub(super) enum Path<'a> {
    /// The number of an open file: that file is meant.
    Open(&'a CStr),
    /// A name in an open directory: a link is meant itself.
    Named(&'a CStr),
}

/// Reads an extended attribute; its length when `buffer` is empty.
pub(super) fn get_attribute(path: Path<'_>, name: &CStr, buffer: &mut [u8]) -> io::Result<usize> {
    let (path, get) = match path {
        Path::Open(path) => (path, libc::getxattr as GetAttribute),
        Path::Named(path) => (path, libc::lgetxattr as GetAttribute),
    };
    // SAFETY: both are C strings, and the call writes at most `buffer.len()` bytes into `buffer`.
    let count = unsafe {
        get(
            path.as_ptr(),
            name.as_ptr(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

type GetAttribute = unsafe extern "C" fn(*const c_char, *const c_char, *mut c_void, usize) -> isize;

/// Reads the names of all extended attributes; their length when `buffer` is empty.
pub(super) fn list_attributes(path: Path<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let (path, list) = match path {
        Path::Open(path) => (path, libc::listxattr as ListAttributes),
        Path::Named(path) => (path, libc::llistxattr as ListAttributes),
    };
    // SAFETY: `path` is a C string, and the call writes at most `buffer.len()` bytes into `buffer`.
    let count = unsafe { list(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

type ListAttributes = unsafe extern "C" fn(*const c_char, *mut c_char, usize) -> isize;

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

/// Copies between open files and tells how much.
pub(super) fn copy(
    (from, mut from_offset): (&File, i64),
    (to, mut to_offset): (&File, i64),
    len: usize,
) -> io::Result<usize> {
    // SAFETY: both offsets are variables of ours that outlive the call.
    let count = unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut from_offset,
            to.as_raw_fd(),
            &raw mut to_offset,
            len,
            0,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Fills `buffers` from `offset` on and tells how much there was.
pub(super) fn read(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    transfer(buffers, offset, |vectors, offset| {
        let count = vectors.len() as i32;
        // SAFETY: each vector is guest memory that the caller borrows; the kernel writes to it
        // as the guest itself may at any time.
        unsafe { libc::preadv64(file.as_raw_fd(), vectors.as_ptr(), count, offset) }
    })
}

/// Writes `buffers` to `offset` and tells how much was taken.
pub(super) fn write(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    transfer(buffers, offset, |vectors, offset| {
        let count = vectors.len() as i32;
        // SAFETY: each vector is guest memory that the caller borrows; the kernel only reads it.
        unsafe { libc::pwritev64(file.as_raw_fd(), vectors.as_ptr(), count, offset) }
    })
}

/// One call for as many buffers as the kernel takes at once, until one does less than asked.
fn transfer(
    buffers: &[VolatileSlice<'_>],
    offset: u64,
    call: impl Fn(&[libc::iovec], i64) -> isize,
) -> io::Result<usize> {
    let vectors: SmallVec<[libc::iovec; 8]> = buffers
        .iter()
        .map(|buffer| libc::iovec {
            iov_base: buffer.ptr_guard_mut().as_ptr().cast(),
            iov_len: buffer.len(),
        })
        .collect();
    let mut done = 0;
    for vectors in vectors.chunks(libc::UIO_MAXIOV as usize) {
        let wanted: usize = vectors.iter().map(|vector| vector.iov_len).sum();
        let at = offset
            .checked_add(done as u64)
            .and_then(|at| i64::try_from(at).ok())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
        let count = loop {
            match usize::try_from(call(vectors, at)) {
                Ok(count) => break count,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    // What was done before is told; the error comes back with the next request.
                    return if done > 0 { Ok(done) } else { Err(error) };
                }
            }
        };
        done += count;
        if count < wanted {
            break;
        }
    }
    Ok(done)
}

/// The file system ids that the calling thread acts with.
pub(super) fn ids() -> (u32, u32) {
    (
        set_fs_id(libc::SYS_setfsuid, u32::MAX),
        set_fs_id(libc::SYS_setfsgid, u32::MAX),
    )
}

/// Makes new files of this thread belong to someone else, until it is dropped.
///
/// The ids are the thread's own: the calls are made without the C library, which would
/// change every thread.
pub(super) struct Owner {
    own: (u32, u32),
    assumed: (u32, u32),
}

impl Owner {
    /// Takes ids on; `own` are those that the thread has.
    ///
    /// # Errors
    /// `EPERM` when the process may not take them on or they do not exist in its user namespace.
    pub(super) fn assume(own: (u32, u32), (uid, gid): (u32, u32)) -> io::Result<Self> {
        let mut owner = Self { own, assumed: own };
        if gid != own.1 {
            owner.assumed.1 = gid;
            swap(libc::SYS_setfsgid, gid)?;
        }
        if uid != own.0 {
            owner.assumed.0 = uid;
            swap(libc::SYS_setfsuid, uid)?;
        }
        Ok(owner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if self.assumed.0 != self.own.0 {
            set_fs_id(libc::SYS_setfsuid, self.own.0);
        }
        if self.assumed.1 != self.own.1 {
            set_fs_id(libc::SYS_setfsgid, self.own.1);
        }
    }
}

fn swap(call: libc::c_long, id: u32) -> io::Result<()> {
    set_fs_id(call, id);
    // The call tells nothing of its success; asking with an id that is none tells what is set.
    if set_fs_id(call, u32::MAX) != id {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    Ok(())
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
