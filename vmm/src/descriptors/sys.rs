//! How a number that the process was started with becomes an owned descriptor.
//!
//! Who owns a number is told by its close-on-exec flag. A descriptor that came
//! through `execve` cannot have it; everything this process opens has it from
//! the start; and taking a number sets it. So a number without the flag is
//! inherited and nobody's, and one with it is somebody's.

#![expect(unsafe_code, reason = "numbers become owned descriptors")]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::Mutex,
};

/// Takes an inherited descriptor, or `None` if it belongs to this process already.
///
/// # Errors
/// When no descriptor has this number.
pub(super) fn take(number: RawFd) -> io::Result<Option<OwnedFd>> {
    // Between the question and the mark nobody else may ask.
    static TAKING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = TAKING
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());

    // SAFETY: takes numbers.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Ok(None);
    }
    // SAFETY: takes numbers.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open, came through execve, and the flag shows that no one took it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }))
}
