//! One process of a container, from its making to its end; or what stands for
//! one in a container that has none.
//!
//! ```text
//! prepared ── start ──► started ── the kernel ──► ended
//!     └───────────── killed, given up ─────────────┘
//! ```

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
    time::Instant,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Notify, watch},
};

use super::{Error, doing, failure, lock, stdio::Stdio};
use crate::{
    guest,
    launch::{Child, Control, Message},
    reaper::Exit,
    sys,
};

/// When a program began.
#[derive(Debug, Clone, Copy)]
pub struct Started {
    /// Nanoseconds from the request to the successful execve.
    pub exec_ns: u64,
    /// Nanoseconds from the guest's boot to the call of execve.
    pub boot_ns: u64,
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    body: Body,
    stage: Mutex<Stage>,
    exit: watch::Receiver<Option<Exit>>,
}

/// What there is of a process.
#[derive(Debug)]
enum Body {
    /// One of the kernel's.
    Real {
        pid: u32,
        pidfd: OwnedFd,
        terminal: Option<Arc<AsyncFd<OwnedFd>>>,
        stdin_closed: Arc<Notify>,
    },
    /// None: its end is told here.
    Placeholder(watch::Sender<Option<Exit>>),
}

/// How far it has come.
#[derive(Debug)]
enum Stage {
    /// It waits for its start; a placeholder has nothing that would have to be told.
    Prepared(Option<Control>),
    Started,
    /// This signal ended it while it waited for its start.
    EndedBefore(i32),
}

impl Process {
    /// What stands for a process.
    pub(super) fn placeholder() -> Self {
        let (ended, exit) = watch::channel(None);
        Self {
            body: Body::Placeholder(ended),
            stage: Mutex::new(Stage::Prepared(None)),
            exit,
        }
    }

    /// Waits until `child` is ready for its start.
    pub(super) async fn prepared(
        child: Child,
        exit: watch::Receiver<Option<Exit>>,
        stdio: Stdio,
    ) -> Result<Self, Error> {
        let terminal = match child.control.receive().await {
            Ok(Some((Message::Ready, terminal))) => terminal,
            Ok(Some((Message::Failed(kind, text), _))) => return Err(failure(kind, text)),
            Ok(_) => {
                return Err(Error::Process(
                    "the process ended before it was ready".into(),
                ));
            }
            Err(error) => return Err(doing("listen to a process being made")(error)),
        };
        let terminal = terminal
            .map(watch_terminal)
            .transpose()
            .map_err(doing("watch a terminal"))?
            .map(Arc::new);
        let stdin_closed = Arc::new(Notify::new());
        stdio.relay(terminal.clone(), stdin_closed.clone());
        Ok(Self {
            body: Body::Real {
                pid: child.pid.unsigned_abs(),
                pidfd: child.pidfd,
                terminal,
                stdin_closed,
            },
            stage: Mutex::new(Stage::Prepared(Some(child.control))),
            exit,
        })
    }

    /// Its id in the guest; 0 for a placeholder.
    pub(super) fn pid(&self) -> u32 {
        match self.body {
            Body::Real { pid, .. } => pid,
            Body::Placeholder(_) => 0,
        }
    }

    /// Its descriptor, unless it is a placeholder.
    pub(super) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.body {
            Body::Real { pidfd, .. } => Some(pidfd.as_fd()),
            Body::Placeholder(_) => None,
        }
    }

    /// Lets it execute its program, and answers when it has.
    pub(super) async fn start(&self) -> Result<Started, Error> {
        let asked = Instant::now();
        let Some(control) = self.take_control()? else {
            return Ok(Started {
                exec_ns: asked.elapsed().as_nanos() as u64,
                boot_ns: sys::boottime_ns(),
            });
        };
        // A process that was killed before shows below.
        let _ = control.go();
        let mut boot_ns = None;
        loop {
            let message = control
                .receive()
                .await
                .map_err(doing("listen to a process being started"))?;
            match (message, boot_ns) {
                (Some((Message::Executing(at), _)), _) => boot_ns = Some(at),
                (Some((Message::Failed(kind, text), _)), _) => return Err(failure(kind, text)),
                (None, Some(boot_ns)) => {
                    return Ok(Started {
                        exec_ns: asked.elapsed().as_nanos() as u64,
                        boot_ns,
                    });
                }
                (None | Some((Message::Ready | Message::Born(_), _)), _) => {
                    let text = "the process ended before it could execute its program; \
                                linux.seccomp may forbid what leads there";
                    return Err(Error::Process(text.into()));
                }
            }
        }
    }

    fn take_control(&self) -> Result<Option<Control>, Error> {
        let mut stage = lock(&self.stage);
        match std::mem::replace(&mut *stage, Stage::Started) {
            Stage::Prepared(control) => Ok(control),
            Stage::Started => Err(Error::StartedBefore),
            Stage::EndedBefore(signal) => {
                *stage = Stage::EndedBefore(signal);
                Err(Error::Ended(128 + signal.unsigned_abs()))
            }
        }
    }

    /// Whether [`Self::start`] was called.
    pub(super) fn was_started(&self) -> bool {
        matches!(*lock(&self.stage), Stage::Started)
    }

    /// Whether it has not ended.
    pub(super) fn is_running(&self) -> bool {
        self.exit.borrow().is_none()
    }

    /// How it ended, if it has.
    pub(super) fn exit(&self) -> Option<Exit> {
        let exit = *self.exit.borrow();
        exit.map(|exit| self.as_told(exit))
    }

    /// A process that waited for its start was killed in place of the signal it got.
    fn as_told(&self, exit: Exit) -> Exit {
        match *lock(&self.stage) {
            Stage::EndedBefore(signal) => Exit {
                status: 128 + signal.unsigned_abs(),
                ..exit
            },
            Stage::Prepared(_) | Stage::Started => exit,
        }
    }

    /// Sends it a signal.
    pub(super) fn signal(&self, signal: i32) -> Result<(), Error> {
        if let Some(exit) = self.exit() {
            return Err(Error::Ended(exit.status));
        }
        match &self.body {
            Body::Real { pidfd, .. } => {
                let signal = self.before_start(signal);
                sys::pidfd_send_signal(pidfd.as_fd(), signal).map_err(doing("send a signal"))
            }
            Body::Placeholder(ended) => {
                if let Some(status) = placeholder_status(signal) {
                    let at_ns = guest::now_ns();
                    ended.send_replace(Some(Exit { status, at_ns }));
                }
                Ok(())
            }
        }
    }

    /// The signal to send for `signal`. A process that waits for its start is the agent's own
    /// code, and in its pid namespace the first, which the kernel spares all but SIGKILL: that is
    /// sent for every signal that would have ended it.
    fn before_start(&self, signal: i32) -> i32 {
        let mut stage = lock(&self.stage);
        if !matches!(*stage, Stage::Prepared(_)) || !ends_by_default(signal) {
            return signal;
        }
        *stage = Stage::EndedBefore(signal);
        libc::SIGKILL
    }

    /// Waits for its end.
    pub(super) async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return self.as_told(exit);
            }
            if exit.changed().await.is_err() {
                // The reaper lives as long as the agent and tells every watched end.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Calls `kill` when it has ended: for what it leaves in a pid namespace that goes on.
    pub(super) fn take_along(&self, kill: impl FnOnce() + Send + 'static) {
        let mut exit = self.exit.clone();
        tokio::spawn(async move {
            let _ = exit.wait_for(Option::is_some).await;
            kill();
        });
    }

    /// Sets its terminal's size.
    pub(super) fn resize(&self, columns: u16, rows: u16) -> Result<(), Error> {
        match &self.body {
            Body::Real {
                terminal: Some(terminal),
                ..
            } => sys::set_size(terminal.get_ref().as_fd(), columns, rows)
                .map_err(doing("set the terminal's size")),
            _ => Err(Error::NoTerminal),
        }
    }

    /// Closes its standard input once what the host sent has been read.
    pub(super) fn close_stdin(&self) {
        if let Body::Real { stdin_closed, .. } = &self.body {
            stdin_closed.notify_one();
        }
    }
}

/// Whether `signal` ends a process that has not said otherwise, signal(7).
fn ends_by_default(signal: i32) -> bool {
    !matches!(
        signal,
        libc::SIGCHLD
            | libc::SIGCONT
            | libc::SIGURG
            | libc::SIGWINCH
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
    )
}

/// How `signal` ends a placeholder, if it does: as the pause container of Kubernetes, the first
/// process of its namespace, which handles two signals and is spared the others.
fn placeholder_status(signal: i32) -> Option<u32> {
    match signal {
        libc::SIGTERM | libc::SIGINT => Some(0),
        libc::SIGKILL => Some(128 + libc::SIGKILL.unsigned_abs()),
        _ => None,
    }
}

fn watch_terminal(master: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    sys::watch(master, Interest::READABLE | Interest::WRITABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_placeholder_ends_as_a_pause_container_does() {
        for (signal, status) in [(libc::SIGTERM, 0), (libc::SIGINT, 0), (libc::SIGKILL, 137)] {
            let process = Process::placeholder();
            process.start().await.unwrap();
            process.signal(libc::SIGUSR1).unwrap();
            assert!(process.is_running());
            process.signal(signal).unwrap();
            assert_eq!(process.wait().await.status, status);
            assert!(matches!(process.signal(signal), Err(Error::Ended(_))));
        }
    }

    #[tokio::test]
    async fn a_placeholder_is_started_once() {
        let process = Process::placeholder();
        assert!(process.start().await.is_ok());
        assert!(matches!(process.start().await, Err(Error::StartedBefore)));
    }

    #[test]
    fn signals_that_end_nothing_by_default_are_known() {
        assert!(ends_by_default(libc::SIGTERM) && ends_by_default(40));
        assert!(!ends_by_default(libc::SIGWINCH) && !ends_by_default(libc::SIGCONT));
    }
}
