//! How a number that the process was started with becomes an owned descriptor.
//!
//! Two things together make a number nobody's, and so free to be taken. It has
//! no close-on-exec flag: what came through `execve` cannot have it, and taking
//! it sets it. And once [`remember`] was called, before the process opened
//! anything itself, it is one that was open then.

#![expect(unsafe_code, reason = "numbers become owned descriptors")]

use std::{
    collections::BTreeSet,
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::Mutex,
};

/// The numbers that were open at the start and are not taken; nothing while nobody has looked.
static INHERITED: Mutex<Option<BTreeSet<RawFd>>> = Mutex::new(None);

/// Remembers which numbers from `first` on the process was started with. They follow one another.
pub(super) fn remember(first: RawFd) {
    let mut inherited = INHERITED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if inherited.is_none() {
        let open = (first..RawFd::MAX).take_while(|number| flags(*number).is_ok());
        *inherited = Some(open.collect());
    }
}

/// Takes an inherited descriptor, or `None` if it belongs to this process already.
///
/// # Errors
/// When no descriptor has this number.
pub(super) fn take(number: RawFd) -> io::Result<Option<OwnedFd>> {
    // Between the question and the mark nobody else may ask.
    let mut inherited = INHERITED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let flags = flags(number)?;
    let free = inherited
        .as_mut()
        .is_none_or(|numbers| numbers.remove(&number));
    if !free || flags & libc::FD_CLOEXEC != 0 {
        return Ok(None);
    }
    // SAFETY: takes numbers.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open, came through execve, and the flag shows that no one took it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }))
}

fn flags(number: RawFd) -> io::Result<libc::c_int> {
    // SAFETY: takes numbers.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(flags)
    }
}
