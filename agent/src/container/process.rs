//! One process of a container, from its making to its end.
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
    pid: u32,
    pidfd: OwnedFd,
    exit: watch::Receiver<Option<Exit>>,
    /// There until the start.
    control: Mutex<Option<Control>>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    stdin_closed: Arc<Notify>,
}

impl Process {
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
            pid: child.pid.unsigned_abs(),
            pidfd: child.pidfd,
            exit,
            control: Mutex::new(Some(child.control)),
            terminal,
            stdin_closed,
        })
    }

    /// Its id in the guest.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Its descriptor.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Lets it execute its program, and answers when it has.
    pub(super) async fn start(&self) -> Result<Started, Error> {
        let asked = Instant::now();
        let control = lock(&self.control).take().ok_or(Error::StartedBefore)?;
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
                (None | Some((Message::Ready, _)), _) => {
                    let text = "the process ended before it could execute its program; \
                                linux.seccomp may forbid what leads there";
                    return Err(Error::Process(text.into()));
                }
            }
        }
    }

    /// Whether [`Self::start`] was called.
    pub(super) fn was_started(&self) -> bool {
        lock(&self.control).is_none()
    }

    /// Whether it has not ended.
    pub(super) fn is_running(&self) -> bool {
        self.exit.borrow().is_none()
    }

    /// Sends it a signal.
    pub(super) fn signal(&self, signal: i32) -> Result<(), Error> {
        if let Some(exit) = *self.exit.borrow() {
            return Err(Error::Ended(exit.status));
        }
        sys::pidfd_send_signal(self.pidfd(), signal).map_err(doing("send a signal"))
    }

    /// Waits for its end.
    pub(super) async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
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
        let terminal = self.terminal.as_ref().ok_or(Error::NoTerminal)?;
        sys::set_size(terminal.get_ref().as_fd(), columns, rows)
            .map_err(doing("set the terminal's size"))
    }

    /// Closes its standard input once what the host sent has been read.
    pub(super) fn close_stdin(&self) {
        self.stdin_closed.notify_one();
    }
}

fn watch_terminal(master: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    sys::watch(master, Interest::READABLE | Interest::WRITABLE)
}
