//! The process that runs the virtual machine, as the sandbox holds it.

use std::{
    fmt,
    io::Read,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::ExitStatus,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use tokio::io::unix::AsyncFd;
use vmm::{
    config::VmConfig,
    launch::{self, Launch, Process},
};

use crate::{sys, text::printable};

/// What is read of the VMM's last words.
const STDERR_MAX: usize = 4096;

/// The VMM. Dropping it kills and reaps it.
#[derive(Debug)]
pub(super) struct Vmm {
    process: Process,
    /// Readable when the process has ended; several may wait at once.
    ended: AsyncFd<OwnedFd>,
    stderr: std::fs::File,
}

/// How the VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    status: Option<ExitStatus>,
    last_words: String,
}

impl Vmm {
    /// Starts it.
    pub(super) fn launch(mut launch: Launch, config: &VmConfig) -> Result<Self, launch::Error> {
        let (stderr, theirs) = pipe2(OFlag::O_CLOEXEC).map_err(prepare)?;
        // Only ours must not wait: what the VMM writes is read when it is gone.
        fcntl(&stderr, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(prepare)?;
        launch.stderr(theirs);
        let process = launch.spawn(config)?;
        let pidfd = process
            .pidfd()
            .try_clone_to_owned()
            .map_err(launch::Error::Prepare)?;
        Ok(Self {
            process,
            ended: sys::watch_readable(pidfd).map_err(launch::Error::Prepare)?,
            stderr: stderr.into(),
        })
    }

    /// Its pid.
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends it now and returns when it is over.
    pub(super) fn end(&self) {
        if let Err(error) = self.process.kill() {
            tracing::warn!(%error, "the VMM cannot be killed");
            return;
        }
        let mut ended = [PollFd::new(self.process.pidfd(), PollFlags::POLLIN)];
        while poll(&mut ended, PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
    }

    /// Whether it is over.
    pub(super) fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(self.process.pidfd(), PollFlags::POLLIN)];
        poll(&mut ended, PollTimeout::ZERO) == Ok(1)
    }

    /// Ends it now.
    pub(super) fn kill(&self) {
        if let Err(error) = self.process.kill() {
            tracing::warn!(%error, "the VMM cannot be killed");
        }
    }

    /// Waits for its end.
    pub(super) async fn ended(&self) {
        // An error would mean that the runtime is shutting down.
        let _ = self.ended.readable().await;
    }

    /// How it ended, once [`Vmm::ended`] returned.
    pub(super) fn death(&self) -> Death {
        let mut words = Vec::new();
        let _ = (&self.stderr)
            .take(STDERR_MAX as u64)
            .read_to_end(&mut words);
        Death {
            status: wait_status(&self.process),
            last_words: last_line(&words),
        }
    }
}

fn prepare(errno: nix::errno::Errno) -> launch::Error {
    launch::Error::Prepare(errno.into())
}

/// The status, left for the owner to reap.
fn wait_status(process: &Process) -> Option<ExitStatus> {
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    match waitid(Id::PIDFd(process.pidfd()), flags) {
        Ok(WaitStatus::Exited(_, code)) => Some(ExitStatus::from_raw((code & 0xff) << 8)),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(ExitStatus::from_raw(signal as i32)),
        _ => None,
    }
}

fn last_line(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or_default().trim();
    printable(line.strip_prefix("bulkhead-vmm: ").unwrap_or(line), 500)
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status.unwrap_or_default();
        match (self.status.is_some(), status.signal(), status.code()) {
            (true, Some(signal), _) => write!(f, "the VMM was killed by signal {signal}")?,
            (true, None, Some(0)) => f.write_str("the guest powered itself off")?,
            (true, None, Some(3)) => f.write_str("the guest reset itself")?,
            (true, None, Some(4)) => f.write_str("the guest's CPU failed with a triple fault")?,
            (true, None, Some(code)) if self.last_words.is_empty() => {
                write!(f, "the VMM ended with status {code}")?;
            }
            (true, None, Some(_)) => f.write_str("the VMM failed")?,
            _ => f.write_str("the VMM ended")?,
        }
        if !self.last_words.is_empty() {
            write!(f, ": {}", self.last_words)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn death(raw: i32, words: &[u8]) -> String {
        Death {
            status: Some(ExitStatus::from_raw(raw)),
            last_words: last_line(words),
        }
        .to_string()
    }

    #[test]
    fn a_death_is_told_with_the_vmms_last_words() {
        assert_eq!(
            death(1 << 8, b"bulkhead-vmm: the kernel is not an ELF file\n\n"),
            "the VMM failed: the kernel is not an ELF file"
        );
    }

    #[test]
    fn each_way_to_end_has_its_sentence() {
        assert_eq!(death(9, b""), "the VMM was killed by signal 9");
        assert_eq!(death(0, b""), "the guest powered itself off");
        assert_eq!(death(3 << 8, b""), "the guest reset itself");
        assert_eq!(
            death(4 << 8, b""),
            "the guest's CPU failed with a triple fault"
        );
        assert_eq!(death(7 << 8, b""), "the VMM ended with status 7");
    }
}
