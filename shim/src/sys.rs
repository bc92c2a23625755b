//! The few calls to the kernel that no safe crate wraps.
#![expect(
    unsafe_code,
    reason = "ioctls of terminals, random bytes, the runtime's reactor"
)]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// The size of a terminal: columns and rows.
pub(crate) fn terminal_size(terminal: BorrowedFd<'_>) -> std::io::Result<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which `size` is.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok((size.ws_col, size.ws_row))
}

/// `N` bytes from the kernel's random number generator, at most 256.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    const { assert!(N <= 256, "more may be read in part") };
    let mut bytes = [0; N];
    loop {
        // SAFETY: the kernel writes at most the `N` bytes that the array has.
        let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
        // Up to 256 bytes come whole once the generator is ready, and a wait for that may be
        // interrupted.
        if count == N as isize {
            return bytes;
        }
    }
}

/// Nanoseconds since the epoch.
pub(crate) fn realtime_ns() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos() as u64)
}

/// `fd` in the runtime, to be waited for until it is readable.
pub(crate) fn watch_readable(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, stays open and keeps its number for as long as it lives, and
    // the `AsyncFd` owns it.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    watched.map_err(std::io::Error::from)
}
