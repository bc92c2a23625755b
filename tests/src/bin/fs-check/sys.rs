//! System calls as they are: what they return, or the error's number.

#![expect(unsafe_code, reason = "the calls themselves are what is checked")]

use std::{ffi::CString, mem::MaybeUninit, os::unix::ffi::OsStrExt, path::Path};

/// The number of an error.
pub(crate) type Errno = i32;
/// What a call returns.
pub(crate) type Outcome<T = i64> = Result<T, Errno>;

fn path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no path here has a zero")
}

fn text(text: &str) -> CString {
    CString::new(text).expect("no text here has a zero")
}

fn result(value: impl Into<i64>) -> Outcome {
    match value.into() {
        ..0 => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        value => Ok(value),
    }
}

/// Defines calls that take paths (`&Path`), numbers, and nothing else.
macro_rules! calls {
    ($($name:ident($($path:ident),*; $($number:ident: $type:ty),*);)*) => {$(
        pub(crate) fn $name($($path: &Path,)* $($number: $type),*) -> Outcome {
            $(let $path = path($path);)*
            // SAFETY: the paths are C strings that outlive the call; the rest are numbers.
            result(unsafe { libc::$name($($path.as_ptr(),)* $($number),*) })
        }
    )*};
}

calls! {
    mkdir(at; mode: u32);
    mkfifo(at; mode: u32);
    mknod(at; mode: u32, device: u64);
    unlink(at;);
    rmdir(at;);
    rename(from, to;);
    link(from, to;);
    symlink(target, at;);
    chmod(at; mode: u32);
    chown(at; uid: u32, gid: u32);
    lchown(at; uid: u32, gid: u32);
    truncate(at; size: i64);
    access(at; mode: i32);
    chdir(at;);
    close(; fd: i32);
    fsync(; fd: i32);
    fdatasync(; fd: i32);
    syncfs(; fd: i32);
    ftruncate(; fd: i32, size: i64);
    fallocate(; fd: i32, mode: i32, offset: i64, len: i64);
    lseek(; fd: i32, offset: i64, whence: i32);
    flock(; fd: i32, operation: i32);
    inotify_init1(; flags: i32);
}

pub(crate) fn open(at: &Path, flags: i32, mode: u32) -> Outcome<i32> {
    let at = path(at);
    // SAFETY: the path is a C string that outlives the call.
    result(unsafe { libc::open(at.as_ptr(), flags, mode) }).map(|fd| fd as i32)
}

pub(crate) fn rename2(from: &Path, to: &Path, flags: u32) -> Outcome {
    let (from, to, here) = (path(from), path(to), libc::AT_FDCWD);
    // SAFETY: both paths are C strings that outlive the call.
    result(unsafe { libc::renameat2(here, from.as_ptr(), here, to.as_ptr(), flags) })
}

pub(crate) fn link_fd(fd: i32, to: &Path) -> Outcome {
    let (from, to) = (text(&format!("/proc/self/fd/{fd}")), path(to));
    let (here, follow) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: both paths are C strings that outlive the call.
    result(unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), follow) })
}

pub(crate) fn read_link(at: &Path) -> Outcome<Vec<u8>> {
    let at = path(at);
    let mut target = vec![0_u8; 5000];
    // SAFETY: the call writes at most the buffer's length into it.
    let len = unsafe { libc::readlink(at.as_ptr(), target.as_mut_ptr().cast(), target.len()) };
    target.truncate(result(len as i64)? as usize);
    Ok(target)
}

pub(crate) fn stat(at: &Path) -> Outcome<libc::stat> {
    let at = path(at);
    let mut stat = MaybeUninit::zeroed();
    // SAFETY: the call writes one `stat`.
    result(unsafe { libc::lstat(at.as_ptr(), stat.as_mut_ptr()) })?;
    // SAFETY: every field is an integer and all were zeroed.
    Ok(unsafe { stat.assume_init() })
}

pub(crate) fn fstat(fd: i32) -> Outcome<libc::stat> {
    let mut stat = MaybeUninit::zeroed();
    // SAFETY: the call writes one `stat`.
    result(unsafe { libc::fstat(fd, stat.as_mut_ptr()) })?;
    // SAFETY: every field is an integer and all were zeroed.
    Ok(unsafe { stat.assume_init() })
}

/// The time of birth, if the file system tells.
pub(crate) fn born(at: &Path) -> Outcome<Option<i64>> {
    let at = path(at);
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let mask = libc::STATX_BTIME;
    // SAFETY: the call writes one `statx`.
    result(unsafe { libc::statx(libc::AT_FDCWD, at.as_ptr(), 0, mask, stat.as_mut_ptr()) })?;
    // SAFETY: every field is an integer and all were zeroed.
    let stat = unsafe { stat.assume_init() };
    Ok((stat.stx_mask & libc::STATX_BTIME != 0).then_some(stat.stx_btime.tv_sec))
}

/// The longest name.
pub(crate) fn name_max(at: &Path) -> Outcome {
    let at = path(at);
    let mut figures = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the call writes one `statfs`.
    result(unsafe { libc::statfs(at.as_ptr(), figures.as_mut_ptr()) })?;
    // SAFETY: every field is an integer and all were zeroed.
    Ok(unsafe { figures.assume_init() }.f_namelen)
}

/// Sets access and modification times; nanoseconds may be `UTIME_NOW` or `UTIME_OMIT`.
pub(crate) fn set_times(at: &Path, times: [(i64, i64); 2]) -> Outcome {
    let at = path(at);
    let times = times.map(|(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec });
    // SAFETY: there are two times, as the call expects.
    result(unsafe {
        libc::utimensat(
            libc::AT_FDCWD,
            at.as_ptr(),
            times.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
        )
    })
}

pub(crate) fn write(fd: i32, bytes: &[u8]) -> Outcome {
    // SAFETY: the call reads the slice.
    result(unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) } as i64)
}

pub(crate) fn write_at(fd: i32, bytes: &[u8], offset: i64) -> Outcome {
    // SAFETY: the call reads the slice.
    result(unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), offset) } as i64)
}

pub(crate) fn read_at(fd: i32, bytes: &mut [u8], offset: i64) -> Outcome {
    // SAFETY: the call writes at most the slice's length into it.
    result(unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), bytes.len(), offset) } as i64)
}

pub(crate) fn read(fd: i32, bytes: &mut [u8]) -> Outcome {
    // SAFETY: the call writes at most the slice's length into it.
    result(unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) } as i64)
}

pub(crate) fn copy_range(from: (i32, i64), to: (i32, i64), len: usize) -> Outcome {
    let (mut from_offset, mut to_offset) = (from.1, to.1);
    // SAFETY: both offsets are variables of ours.
    let count = unsafe {
        libc::copy_file_range(
            from.0,
            &raw mut from_offset,
            to.0,
            &raw mut to_offset,
            len,
            0,
        )
    };
    result(count as i64)
}

pub(crate) fn set_xattr(at: &Path, name: &str, value: &[u8], flags: i32) -> Outcome {
    let (at, name) = (path(at), text(name));
    // SAFETY: both are C strings, and the call reads the slice.
    result(unsafe {
        libc::lsetxattr(
            at.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    })
}

pub(crate) fn get_xattr(at: &Path, name: &str, room: usize) -> Outcome<Vec<u8>> {
    let (at, name) = (path(at), text(name));
    let mut value = vec![0_u8; room];
    // SAFETY: both are C strings, and the call writes at most `room` bytes.
    let len =
        unsafe { libc::lgetxattr(at.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
    value.truncate(result(len as i64)? as usize);
    Ok(value)
}

pub(crate) fn list_xattr(at: &Path) -> Outcome<String> {
    let at = path(at);
    let mut names = vec![0_u8; 4096];
    // SAFETY: the path is a C string, and the call writes at most the buffer's length.
    let len = unsafe { libc::llistxattr(at.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(result(len as i64)? as usize);
    let mut names: Vec<_> = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .collect();
    names.sort_unstable();
    Ok(String::from_utf8_lossy(&names.join(&b' ')).into_owned())
}

pub(crate) fn remove_xattr(at: &Path, name: &str) -> Outcome {
    let (at, name) = (path(at), text(name));
    // SAFETY: both are C strings.
    result(unsafe { libc::lremovexattr(at.as_ptr(), name.as_ptr()) })
}

/// Sets a lock of the process (`F_SETLK`) or of the open file (`F_OFD_SETLK`) on the whole file.
pub(crate) fn lock(fd: i32, command: i32, kind: i32) -> Outcome {
    // SAFETY: every field is an integer, for which zero is a value.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = kind as i16;
    // SAFETY: the call reads one `flock`.
    result(unsafe { libc::fcntl(fd, command, &raw const lock) })
}

pub(crate) fn watch(fd: i32, at: &Path, events: u32) -> Outcome {
    let at = path(at);
    // SAFETY: the path is a C string.
    result(unsafe { libc::inotify_add_watch(fd, at.as_ptr(), events) })
}

/// A descriptor that stays open.
pub(crate) fn borrow(fd: i32) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: what the rules open they do not close before they are done with it.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

pub(crate) fn set_umask(mask: u32) {
    // SAFETY: takes a number.
    unsafe { libc::umask(mask) };
}

/// What `act` gives when it is done by another user, in one group and a supplementary one.
pub(crate) fn by<T>(uid: u32, gid: u32, group: u32, act: impl FnOnce() -> T) -> T {
    let switch = |uid, gid, group| {
        // SAFETY: the list has one number.
        unsafe { libc::setgroups(1, &raw const group) };
        // SAFETY: takes numbers.
        unsafe { libc::setegid(gid) };
        // SAFETY: takes a number.
        unsafe { libc::seteuid(uid) };
    };
    switch(uid, gid, group);
    let done = act();
    switch(0, 0, 0);
    // Groups can be set only now.
    switch(0, 0, 0);
    done
}

/// What a child process's `act` gives, a small number.
pub(crate) fn in_child(act: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the process has one thread.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let status = act();
        // SAFETY: takes a number.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: the call writes one number.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    libc::WEXITSTATUS(status)
}

/// A file in memory.
pub(crate) struct Mapping {
    at: *mut u8,
    len: usize,
}

impl Mapping {
    pub(crate) fn new(fd: i32, len: usize, flags: i32) -> Outcome<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping takes the place of nothing.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
        if at == libc::MAP_FAILED {
            return result(-1).map(|_| unreachable!("-1 is an error"));
        }
        Ok(Self { at: at.cast(), len })
    }

    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: the range lies within the mapping.
        let to = unsafe { self.at.add(offset) };
        // SAFETY: source and destination are as long and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: the range lies within the mapping.
        let from = unsafe { self.at.add(offset) };
        // SAFETY: source and destination are as long and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    pub(crate) fn sync(&self) -> Outcome {
        // SAFETY: the mapping is ours.
        result(unsafe { libc::msync(self.at.cast(), self.len, libc::MS_SYNC) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// Memory as direct input and output wants it: aligned to 4096 bytes.
pub(crate) fn aligned(len: usize) -> &'static mut [u8] {
    let layout = std::alloc::Layout::from_size_align(len, 4096).expect("a power of two");
    // SAFETY: the layout is not empty.
    let at = unsafe { std::alloc::alloc_zeroed(layout) };
    assert!(!at.is_null(), "no memory");
    // SAFETY: the memory is ours, zeroed, and never given back.
    unsafe { std::slice::from_raw_parts_mut(at, len) }
}
