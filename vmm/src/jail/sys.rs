//! The system calls of the jail that no crate of ours wraps.

#![expect(
    unsafe_code,
    reason = "capabilities and mounts by descriptor have no safe wrapper"
)]

use std::{
    ffi::{CString, c_int, c_long, c_ulong},
    io,
    os::{fd::RawFd, unix::ffi::OsStrExt},
    path::Path,
    ptr,
};

/// Capabilities of a thread as bit sets; it inherits none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// What it may take up.
    pub(super) permitted: u64,
    /// What is in force.
    pub(super) effective: u64,
}

/// `struct __user_cap_header_struct` of linux/capability.h.
#[repr(C)]
struct Header {
    version: u32,
    pid: c_int,
}

/// `struct __user_cap_data_struct`, of which version 3 has two: the low and the high halves.
#[repr(C)]
#[derive(Default)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const VERSION_3: u32 = 0x2008_0522;

/// Sets the calling thread's capabilities.
///
/// # Errors
/// When it asks for one that it is not permitted.
pub(super) fn set_capabilities(wanted: Capabilities) -> io::Result<()> {
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| Half {
        effective: (wanted.effective >> shift) as u32,
        permitted: (wanted.permitted >> shift) as u32,
        inheritable: 0,
    };
    let data = [half(0), half(32)];
    // SAFETY: header and data are as version 3 lays them out, and are only read.
    check(unsafe { libc::syscall(libc::SYS_capset, ptr::from_ref(&header), data.as_ptr()) })
}

/// What the calling thread may take up.
pub(super) fn permitted() -> io::Result<u64> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Half::default(), Half::default()];
    // SAFETY: header and data are as version 3 lays them out, and the call writes within them.
    check(unsafe {
        libc::syscall(
            libc::SYS_capget,
            ptr::from_mut(&mut header),
            data.as_mut_ptr(),
        )
    })?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

/// Takes every capability out of what `execve` could give.
pub(super) fn clear_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        match control(libc::PR_CAPBSET_DROP, capability, 0) {
            Ok(()) => {}
            // Beyond the last that the kernel knows.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes every capability out of what `execve` keeps.
pub(super) fn clear_ambient_set() -> io::Result<()> {
    control(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong,
        0,
    )
}

fn control(option: c_int, first: c_ulong, second: c_ulong) -> io::Result<()> {
    let none: c_ulong = 0;
    // SAFETY: the options used here take numbers.
    check(unsafe {
        libc::syscall(
            libc::SYS_prctl,
            c_long::from(option),
            first,
            second,
            none,
            none,
        )
    })
}

/// Attaches a detached mount to the directory `target`. The descriptor stays what it is.
///
/// # Errors
/// When `mount` is not a descriptor of a detached mount.
pub(super) fn attach(mount: RawFd, target: &Path) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: both paths are C strings that outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount,
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
}

/// The calling process's id, as its own namespace has it.
pub(super) fn own_pid() -> u32 {
    std::process::id()
}

fn check(result: c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
