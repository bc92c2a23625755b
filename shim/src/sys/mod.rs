//! The few calls to the kernel that no safe crate wraps.
#![expect(
    unsafe_code,
    reason = "ioctls of terminals, random bytes, the runtime's reactor, mounts by descriptor, memory \
              that is not needed"
)]

mod memory;
mod mount;
mod process;

pub(crate) use memory::give_back;
#[cfg(test)]
pub(crate) use mount::apart;
pub(crate) use mount::{Attributes, mount_of, move_mount, open_tree, set_attributes};
pub(crate) use process::{
    clone_into, close_from, control_terminal, exit_copy, pidfd, pidfd_signal, receive,
};

use std::{
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

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

/// Which side of a fork this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fork {
    /// The one that was there.
    Parent,
    /// The new one.
    Child,
}

fn single_threaded() -> std::io::Result<()> {
    match std::fs::read_dir("/proc/self/task")?.count() {
        1 => Ok(()),
        threads => Err(std::io::Error::other(format!(
            "the process has {threads} threads and cannot be copied"
        ))),
    }
}

/// Makes a copy of this process, which must have a single thread: others would not be copied, nor
/// the locks that they hold released.
pub(crate) fn fork() -> std::io::Result<Fork> {
    single_threaded()?;
    // SAFETY: the process has one thread, as was just counted, and it is in no lock here.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        _ => Ok(Fork::Parent),
    }
}

/// A copy of a descriptor with a number of at least `least`, closed on execution.
pub(crate) fn duplicate(descriptor: &OwnedFd, least: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: fcntl with F_DUPFD_CLOEXEC touches no memory.
    let copy = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) };
    if copy < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the copy was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Lets `command` find `descriptors` as its descriptors 3, 4 and so on.
pub(crate) fn pass_descriptors<const N: usize>(
    command: &mut Command,
    descriptors: [OwnedFd; N],
) -> std::io::Result<()> {
    let first = 3;
    let above = first + N as i32;
    // None of the numbers that are wanted may be one that `Command` uses between fork and exec, so
    // they are all taken while it lives; and each descriptor has a number above them, so that none
    // is overwritten before its turn.
    let mut taken = Vec::new();
    let mut high = Vec::with_capacity(N);
    for descriptor in descriptors {
        loop {
            let copy = duplicate(&descriptor, first)?;
            if copy.as_raw_fd() >= above {
                high.push(copy);
                break;
            }
            taken.push(copy);
        }
    }
    let place = move || {
        let _taken = &taken;
        for (number, descriptor) in (first..).zip(&high) {
            // SAFETY: dup2 touches no memory, and the numbers are those the new program is to have.
            if unsafe { libc::dup2(descriptor.as_raw_fd(), number) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it calls dup2 alone, which is async-signal-safe, and reads
    // memory that was made before.
    unsafe { command.pre_exec(place) };
    Ok(())
}

/// Has the process of `command` killed when the thread that starts it ends.
pub(crate) fn dies_with_its_parent(command: &mut Command) {
    let bind = || {
        // SAFETY: takes numbers.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec it makes one system call, which is async-signal-safe.
    unsafe { command.pre_exec(bind) };
}
