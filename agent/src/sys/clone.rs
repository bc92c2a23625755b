//! Making processes: clone3 straight into a cgroup and namespaces.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::sched::CloneFlags as Namespaces;

use super::checked;

/// Where a new process begins.
pub(crate) struct CloneFlags<'a> {
    /// The namespaces it is the first process of.
    pub(crate) namespaces: Namespaces,
    /// The cgroup it is born in; the caller's own when absent.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// On which side of the fork the caller is.
pub(crate) enum Forked {
    /// In the parent.
    Parent {
        /// The child's id.
        pid: i32,
        /// The child's descriptor.
        pidfd: OwnedFd,
    },
    /// In the child.
    Child,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Makes a child with a copy of this process's memory.
///
/// The child of a process with threads may not allocate or lock; so this
/// refuses unless the caller is the only thread of its process.
pub(crate) fn clone3(flags: &CloneFlags<'_>) -> io::Result<Forked> {
    clone(flags, 0, libc::SIGCHLD as u64)
}

/// Makes a child of the parent of this process, whose end is told as this one's would be.
pub(crate) fn clone_sibling(flags: &CloneFlags<'_>) -> io::Result<Forked> {
    clone(flags, libc::CLONE_PARENT as u64, 0)
}

fn clone(flags: &CloneFlags<'_>, more: u64, exit_signal: u64) -> io::Result<Forked> {
    require_one_thread()?;
    let mut pidfd: RawFd = -1;
    let mut bits = flags.namespaces.bits() as u32 as u64 | libc::CLONE_PIDFD as u64 | more;
    if flags.cgroup.is_some() {
        bits |= CLONE_INTO_CGROUP;
    }
    let arguments = libc::clone_args {
        flags: bits,
        pidfd: &raw mut pidfd as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: flags.cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    // SAFETY: the arguments are of the size given and live through the call, `pidfd` is a
    // writable i32; without CLONE_VM the child runs on its own copy of this stack, and as this
    // is the only thread no lock of the copy is held by a thread that is gone.
    let pid = checked(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    })?;
    if pid == 0 {
        return Ok(Forked::Child);
    }
    // SAFETY: CLONE_PIDFD succeeded, so the kernel stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Forked::Parent {
        pid: pid as i32,
        pidfd,
    })
}

/// Fails unless this process has one thread: what unshare says of a process with more.
fn require_one_thread() -> io::Result<()> {
    // SAFETY: unshare takes no memory; CLONE_THREAD asks for nothing but this very check, see
    // unshare(2), and leaves the process as it is.
    let answer = unsafe { libc::unshare(libc::CLONE_THREAD) };
    checked(answer.into())
        .map(drop)
        .map_err(|_| io::Error::other("the agent has more than one thread"))
}

/// Is the first process of a pid namespace, for ever: does nothing, holds nothing open. As it
/// ignores the ends of its children, the kernel collects them, orphans too.
pub(crate) fn be_first_process() -> ! {
    let prepare = || -> io::Result<()> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        super::arrange(&[null.as_fd(); 3])?;
        // Its number is another descriptor's now.
        std::mem::forget(null);
        super::forbid_inspection()?;
        nix::unistd::setsid()?;
        nix::unistd::chdir("/")?;
        // SAFETY: SIG_IGN is a valid action for SIGCHLD.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
        super::reset_signals()
    };
    if prepare().is_err() {
        super::exit_now(1);
    }
    loop {
        nix::unistd::pause();
    }
}

/// A descriptor of the process `pid`.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers.
    let fd = checked(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sends `signal` to the process of `pidfd`.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed and no other memory is passed.
    checked(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// Sends `signal` to the process `pid`; never to a group, never to all.
pub(crate) fn kill(pid: u32, signal: i32) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().filter(|pid| *pid > 1);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: the call takes no memory.
    checked(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Collects one child that has ended, if there is one: its id and its status as a shell tells it.
pub(crate) fn wait_any() -> Option<(i32, u32)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a writable int.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
        if pid > 0 {
            let status = if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            return Some((pid, status as u32));
        }
        if pid == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
}
