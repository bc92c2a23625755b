//! The process that runs the virtual machine, as the sandbox holds it.

use std::{
    fmt,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::ExitStatus,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
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

use super::mapped::{Cut, Mapped};
use crate::{sys, text::printable};

/// What is read of the VMM's last words.
const STDERR_MAX: usize = 4096;

/// The VMM. Dropping it kills and reaps it.
#[derive(Debug)]
pub(super) struct Vmm {
    pid: u32,
    process: Mutex<Process>,
    /// Readable when the process has ended; several may wait at once.
    ended: AsyncFd<OwnedFd>,
    stderr: std::fs::File,
    /// Why it was ended by us, if it was and there is something to be said.
    verdict: OnceLock<Verdict>,
    /// What was read of it: several may ask how the process ended, and each is told the same.
    words: Mutex<Vec<u8>>,
    mapped: Mapped,
}

/// Why we ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nobody needs it any more.
    Dismissed,
    /// Something in its guest was to end and did not.
    Deaf,
    /// Its guest's agent says nothing.
    Silent {
        /// For so long.
        seconds: u64,
    },
}

/// How the VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    status: Option<ExitStatus>,
    last_words: String,
    verdict: Option<Verdict>,
    /// What its guest had as memory, and has no more.
    cut: Option<Box<Cut>>,
}

impl Death {
    /// Whether it was ended since nobody needed it any more, so that nothing is to be found out.
    pub fn is_dismissal(&self) -> bool {
        self.verdict == Some(Verdict::Dismissed)
    }
}

impl Vmm {
    /// Starts it, with these files as the guest's memory.
    pub(super) fn launch(
        mut launch: Launch,
        config: &VmConfig,
        mapped: Mapped,
    ) -> Result<Self, launch::Error> {
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
            pid: process.pid(),
            process: Mutex::new(process),
            ended: sys::watch_readable(pidfd).map_err(launch::Error::Prepare)?,
            stderr: stderr.into(),
            verdict: OnceLock::new(),
            words: Mutex::default(),
            mapped,
        })
    }

    /// Its pid.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends it now and returns when it is over and nothing is left of it.
    pub(super) fn end(&self) {
        let mut process = self.process();
        if let Err(error) = process.kill().and_then(|()| process.wait()) {
            tracing::warn!(%error, "the VMM cannot be ended");
        }
    }

    /// Whether it is over.
    pub(super) fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(self.ended.get_ref().as_fd(), PollFlags::POLLIN)];
        poll(&mut ended, PollTimeout::ZERO) == Ok(1)
    }

    /// Ends it now, because of this; what it has died of already is the reason that is told.
    pub(super) fn condemn(&self, verdict: Verdict) {
        if !self.has_ended() {
            let _ = self.verdict.set(verdict);
        }
        if let Err(error) = self.process().kill() {
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
        let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let room = STDERR_MAX.saturating_sub(words.len());
        let _ = (&self.stderr).take(room as u64).read_to_end(&mut words);
        Death {
            status: self.process().try_wait().ok().flatten(),
            last_words: last_line(&words),
            verdict: self.verdict.get().copied(),
            cut: self.mapped.cut().map(Box::new),
        }
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn prepare(errno: nix::errno::Errno) -> launch::Error {
    launch::Error::Prepare(errno.into())
}

fn last_line(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or_default().trim();
    printable(line.strip_prefix("bulkhead-vmm: ").unwrap_or(line), 500)
}

/// Who sends it who is not a person.
fn hint(signal: i32) -> &'static str {
    match signal {
        libc::SIGKILL => " (perhaps the host ran out of memory: its kernel's log tells)",
        libc::SIGSYS => " (a system call that its jail does not allow)",
        _ => "",
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.verdict {
            None => {}
            Some(Verdict::Dismissed) => return f.write_str("its containers were deleted"),
            Some(Verdict::Deaf) => return f.write_str("its guest did not end what was killed"),
            Some(Verdict::Silent { seconds }) => {
                return write!(
                    f,
                    "the agent has not answered for {seconds} s, while the virtual machine ran"
                );
            }
        }
        let status = self.status.unwrap_or_default();
        match (self.status.is_some(), status.signal(), status.code()) {
            (true, Some(signal), _) => {
                write!(f, "the VMM was killed by signal {signal}{}", hint(signal))?;
            }
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
        match &self.cut {
            Some(cut) => write!(f, "; {cut}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn death(raw: i32, words: &[u8]) -> String {
        Death {
            status: Some(ExitStatus::from_raw(raw)),
            last_words: last_line(words),
            verdict: None,
            cut: None,
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
    fn an_end_that_was_ours_has_our_reason() {
        let death = |verdict| Death {
            status: Some(ExitStatus::from_raw(9)),
            last_words: String::new(),
            verdict: Some(verdict),
            cut: None,
        };
        let dismissed = death(Verdict::Dismissed);
        assert_eq!(dismissed.to_string(), "its containers were deleted");
        assert!(dismissed.is_dismissal());
        let deaf = death(Verdict::Deaf);
        assert_eq!(deaf.to_string(), "its guest did not end what was killed");
        assert!(!deaf.is_dismissal());
        let silent = death(Verdict::Silent { seconds: 60 });
        assert_eq!(
            silent.to_string(),
            "the agent has not answered for 60 s, while the virtual machine ran"
        );
        assert!(!silent.is_dismissal());
    }

    #[test]
    fn each_way_to_end_has_its_sentence() {
        assert_eq!(
            death(9, b""),
            "the VMM was killed by signal 9 (perhaps the host ran out of memory: its kernel's log tells)"
        );
        assert_eq!(death(11, b""), "the VMM was killed by signal 11");
        assert_eq!(death(0, b""), "the guest powered itself off");
        assert_eq!(death(3 << 8, b""), "the guest reset itself");
        assert_eq!(
            death(4 << 8, b""),
            "the guest's CPU failed with a triple fault"
        );
        assert_eq!(death(7 << 8, b""), "the VMM ended with status 7");
    }
}
