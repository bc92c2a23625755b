//! Processes and descriptors that come from elsewhere: copies of this one, and what it inherited
//! or is sent.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

use super::Fork;

/// The most descriptors that come with one message.
const DESCRIPTORS: usize = 8;

/// Closes every descriptor from `first` on. Nothing may own one yet: for a program's first line.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: takes numbers; what they are closed for is on the caller, who is told.
    match unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A copy of this process, as [`super::fork`] makes it, in new namespaces of the kinds `flags`;
/// the parent gets the copy's pid.
pub(crate) fn clone_into(flags: i32) -> io::Result<(Fork, u32)> {
    super::single_threaded()?;
    // SAFETY: clone_args is plain numbers, for which zero means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    let size = size_of::<libc::clone_args>();
    // SAFETY: without CLONE_VM and without a stack this is fork, and the process has one thread, so
    // no lock is held by a thread that the copy lacks.
    match unsafe { libc::syscall(libc::SYS_clone3, ptr::from_mut(&mut args), size) } {
        0 => Ok((Fork::Child, 0)),
        pid @ 1.. => Ok((Fork::Parent, pid as u32)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends this process, a copy, without running anything of the original's.
pub(crate) fn exit_copy(status: i32) -> ! {
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(status) }
}

/// A descriptor of the process `pid`, if there is one.
pub(crate) fn pidfd(pid: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: takes numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd >= 0 {
        // SAFETY: pidfd_open returned a new descriptor that nobody else has.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        error => Err(error),
    }
}

/// Sends a signal to the process behind a descriptor; one that is gone gets none.
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let info: *const libc::siginfo_t = ptr::null();
    let fd = pidfd.as_raw_fd();
    // SAFETY: takes numbers and no siginfo.
    let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, info, 0) };
    match done {
        0.. => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}

/// Makes `terminal` the controlling terminal of this session.
pub(crate) fn control_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes numbers.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Receives bytes and the descriptors that come with them.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just made these descriptors for this process.
            let owned = numbers
                .into_iter()
                .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            descriptors.extend(owned);
        }
    }
    Ok((message.bytes, descriptors))
}
