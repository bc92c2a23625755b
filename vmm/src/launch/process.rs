//! A running VMM, as its launcher holds it.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::ExitStatus,
    thread::JoinHandle,
};

use nix::{
    errno::Errno,
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
};

/// A running VMM. Dropping it kills and reaps the process.
///
/// The process also dies with its launcher, however that ends. Nobody else may
/// reap it: a launcher that waits for any child takes the status away.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    parent: Option<JoinHandle<()>>,
    status: Option<ExitStatus>,
}

impl Process {
    /// `parent` is the thread that made the process; it ends when the process does.
    pub(super) fn new(pid: u32, pidfd: OwnedFd, parent: JoinHandle<()>) -> Self {
        Self {
            pid,
            pidfd,
            parent: Some(parent),
            status: None,
        }
    }

    /// Its pid, as the launcher's pid namespace has it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Becomes readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Ends the process at once. One that has ended is left alone.
    ///
    /// # Errors
    /// When the kernel does not allow it.
    pub fn kill(&self) -> io::Result<()> {
        if self.status.is_some() {
            return Ok(());
        }
        match kill(self.pidfd.as_fd()) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// Waits for the end of the process and tells how it ended.
    ///
    /// # Errors
    /// When another part of the launcher has reaped the process.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let status = loop {
            match waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(status) => break exit_status(status),
            }
        };
        self.status = Some(status);
        if let Some(parent) = self.parent.take() {
            // It only waits, which cannot panic.
            let _ = parent.join();
        }
        Ok(status)
    }

    /// How the process ended, or `None` while it runs.
    ///
    /// # Errors
    /// As [`Process::wait`].
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            if waitid(Id::PIDFd(self.pidfd.as_fd()), flags)? == WaitStatus::StillAlive {
                return Ok(None);
            }
        }
        self.wait().map(Some)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.kill();
            let _ = self.wait();
        }
    }
}

/// Sends SIGKILL.
pub(super) fn kill(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    super::sys::pidfd_kill(pidfd.as_raw_fd())
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match status {
        WaitStatus::Exited(_, code) => ExitStatus::from_raw((code & 0xff) << 8),
        WaitStatus::Signaled(_, signal, _) => ExitStatus::from_raw(signal as i32),
        // Only asked for the ends of processes.
        _ => ExitStatus::from_raw(0xff << 8),
    }
}
