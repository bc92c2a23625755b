//! What it was started with.
#![expect(unsafe_code, reason = "an inherited descriptor, a terminal's size")]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

/// The socket to the pod.
pub(crate) fn socket() -> io::Result<OwnedFd> {
    let number = shim::oci::RELAY_SOCKET;
    // SAFETY: takes numbers.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, as was just seen, and this is the only place that takes it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Columns and rows of the terminal that is standard input.
pub(crate) fn terminal_size() -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which `size` is.
    let done = unsafe { libc::ioctl(0, libc::TIOCGWINSZ, &raw mut size) };
    (done == 0 && size.ws_col > 0).then_some((size.ws_col, size.ws_row))
}
