//! Clocks, the random pool, signals.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::checked;

/// Nanoseconds since the guest booted, CLOCK_BOOTTIME.
pub(crate) fn boottime_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a writable timespec. The clock exists since Linux 2.6.39.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The most bytes [`add_entropy`] takes.
pub(crate) const MAX_ENTROPY: usize = 512;

/// Adds `bytes`, all of them random, to the kernel's pool through `urandom`.
pub(crate) fn add_entropy(urandom: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: i32,
        length: i32,
        bytes: [u8; MAX_ENTROPY],
    }
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    if bytes.len() > MAX_ENTROPY {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut info = PoolInfo {
        entropy_bits: bytes.len() as i32 * 8,
        length: bytes.len() as i32,
        bytes: [0; MAX_ENTROPY],
    };
    info.bytes[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the ioctl reads the two numbers and `length` bytes, which lie within `info`.
    let answer = unsafe { libc::ioctl(urandom.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    checked(answer.into()).map(drop)
}

/// A broken pipe is an error of the call that met it, not the end of this process.
pub(crate) fn ignore_broken_pipes() -> io::Result<()> {
    // SAFETY: SIG_IGN is a valid action for SIGPIPE.
    let earlier = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    if earlier == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Undoes what this process did to signals that a program would inherit: a broken pipe ends it
/// again, and none is blocked. Handlers need no undoing, execve does that.
pub(crate) fn reset_signals() -> io::Result<()> {
    // SAFETY: SIG_DFL is a valid action for SIGPIPE.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// Sets the NIS domain name of this UTS namespace.
pub(crate) fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `name`, which the kernel copies.
    let answer = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    checked(answer.into()).map(drop)
}
