//! The mount API that works on descriptors, so that no path is looked up twice.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use super::checked;

/// `struct mount_attr` of mount_setattr(2).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct MountAttr {
    /// Attributes to set.
    pub(crate) set: u64,
    /// Attributes to clear.
    pub(crate) clear: u64,
    /// One of `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0.
    pub(crate) propagation: u64,
    /// A user namespace for an id-mapped mount, set by [`id_map`].
    pub(crate) userns_fd: u64,
}

impl MountAttr {
    /// One that sets the attributes `set` and nothing else.
    pub(crate) const fn setting(set: u64) -> Self {
        Self {
            set,
            clear: 0,
            propagation: 0,
            userns_fd: 0,
        }
    }
}

/// Maps the ids of the mount `mount`, and of all below it when `recursive`, as `users` does.
pub(crate) fn id_map(
    mount: BorrowedFd<'_>,
    recursive: bool,
    users: BorrowedFd<'_>,
) -> io::Result<()> {
    let attr = MountAttr {
        set: libc::MOUNT_ATTR_IDMAP,
        userns_fd: users.as_raw_fd() as u64,
        ..MountAttr::default()
    };
    mount_setattr(mount, recursive, &attr)
}

/// Changes attributes of the mount `mount`, and of all below it when `recursive`.
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attr: &MountAttr,
) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a C string and `attr` has the layout and size that are passed.
    checked(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// A detached copy of the mount at `path` below `directory`, with all below it when `recursive`.
pub(crate) fn open_tree(
    directory: BorrowedFd<'_>,
    path: &CStr,
    recursive: bool,
) -> io::Result<OwnedFd> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32;
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    // SAFETY: the path is a C string.
    let fd = checked(unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
        )
    })?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Attaches the detached mount `mount` on the file or directory `target`.
pub(crate) fn move_mount(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both paths are C strings.
    checked(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// A file system being configured, fsopen(2).
pub(crate) struct FsContext(OwnedFd);

impl FsContext {
    /// Opens the file system `kind`.
    pub(crate) fn open(kind: &str) -> io::Result<Self> {
        let kind = CString::new(kind)?;
        // SAFETY: the name is a C string.
        let fd = checked(unsafe {
            libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC)
        })?;
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Opens the file system that is mounted at `mount`, to change it.
    pub(crate) fn pick(mount: BorrowedFd<'_>) -> io::Result<Self> {
        let flags = libc::FSPICK_EMPTY_PATH | libc::FSPICK_CLOEXEC;
        // SAFETY: the path is a C string.
        let fd = checked(unsafe {
            libc::syscall(libc::SYS_fspick, mount.as_raw_fd(), c"".as_ptr(), flags)
        })?;
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Changes the file system as set.
    pub(crate) fn reconfigure(&self) -> io::Result<()> {
        self.configure(libc::FSCONFIG_CMD_RECONFIGURE, None, None)
    }

    /// Sets `key`, to `value` or as a flag.
    pub(crate) fn set(&self, key: &str, value: Option<&str>) -> io::Result<()> {
        let key = CString::new(key)?;
        let value = value.map(CString::new).transpose()?;
        let command = if value.is_some() {
            libc::FSCONFIG_SET_STRING
        } else {
            libc::FSCONFIG_SET_FLAG
        };
        self.configure(command, Some(&key), value.as_deref())
    }

    /// Makes the file system and a detached mount of it with the attributes `attr`.
    pub(crate) fn mount(&self, attr: u64) -> io::Result<OwnedFd> {
        self.configure(libc::FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: the call takes no memory.
        let fd = checked(unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                libc::FSMOUNT_CLOEXEC,
                attr,
            )
        })?;
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// What the kernel has to say about the last failure, if anything.
    pub(crate) fn complaint(&self) -> Option<String> {
        let mut text = [0; 512];
        let length = nix::unistd::read(self.0.as_fd(), &mut text).ok()?;
        let text = String::from_utf8_lossy(&text[..length]);
        let text = text.trim_start_matches(['e', 'w', 'i']).trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn configure(&self, command: u32, key: Option<&CStr>, value: Option<&CStr>) -> io::Result<()> {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: key and value are null or C strings that live through the call.
        checked(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                pointer(key),
                pointer(value),
                0,
            )
        })
        .map(drop)
    }
}
