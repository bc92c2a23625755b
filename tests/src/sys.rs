//! The system calls by which a process is followed from one of its own to the next.
#![expect(unsafe_code, reason = "ptrace is the kernel's interface for this")]

use std::{io, ptr};

use nix::unistd::Pid;

/// What a traced process is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// To enter the system call with this number.
    Entry(i64),
    /// Anything else.
    Other,
}

/// Follows a process, and whatever it makes, from now on.
pub(crate) fn seize(pid: Pid) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_TRACEEXEC;
    request(libc::PTRACE_SEIZE, pid, i64::from(options))
}

/// Stops a process that is followed.
pub(crate) fn interrupt(pid: Pid) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, pid, 0)
}

/// Lets it go on, with a signal or 0, up to its next event.
pub(crate) fn resume(pid: Pid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, pid, i64::from(signal))
}

/// Lets it go on, with a signal or 0, up to its next system call.
pub(crate) fn step(pid: Pid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, pid, i64::from(signal))
}

/// Follows it no longer.
pub(crate) fn detach(pid: Pid) -> io::Result<()> {
    request(libc::PTRACE_DETACH, pid, 0)
}

/// The process that a stopped one has just made.
pub(crate) fn made(pid: Pid) -> io::Result<Pid> {
    let mut message: libc::c_ulong = 0;
    // SAFETY: the kernel writes one unsigned long to the address, which is that of one.
    let done = unsafe {
        libc::ptrace(
            libc::PTRACE_GETEVENTMSG,
            pid.as_raw(),
            0_usize,
            ptr::from_mut(&mut message),
        )
    };
    ok(done)?;
    Ok(Pid::from_raw(message as i32))
}

/// Where a process has stopped at a system call.
pub(crate) fn stop(pid: Pid) -> io::Result<Stop> {
    const ENTRY: u8 = libc::PTRACE_SYSCALL_INFO_ENTRY;
    // SAFETY: it consists of numbers, for which zero is a value.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::ptrace_syscall_info>();
    // SAFETY: the kernel writes at most `size` bytes to the address, which has so many.
    let done = unsafe {
        libc::ptrace(
            libc::PTRACE_GET_SYSCALL_INFO,
            pid.as_raw(),
            size,
            ptr::from_mut(&mut info),
        )
    };
    ok(done)?;
    match info.op {
        // SAFETY: for an entry it is this field of the union that was written.
        ENTRY => Ok(Stop::Entry(unsafe { info.u.entry.nr } as i64)),
        _ => Ok(Stop::Other),
    }
}

/// The status of a followed process that changed; nothing when there is none left.
pub(crate) fn wait() -> io::Result<Option<(Pid, i32)>> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD;
    // SAFETY: the kernel writes one int to the address, which is that of one.
    match unsafe { libc::waitpid(-1, &mut status, flags) } {
        -1 => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ECHILD) => Ok(None),
            error => Err(error),
        },
        pid => Ok(Some((Pid::from_raw(pid), status))),
    }
}

fn request(request: libc::c_uint, pid: Pid, data: i64) -> io::Result<()> {
    // SAFETY: these requests read and write no memory of ours.
    ok(unsafe { libc::ptrace(request, pid.as_raw(), 0_usize, data as usize) })
}

fn ok(done: libc::c_long) -> io::Result<()> {
    match done {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
