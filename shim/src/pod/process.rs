//! A process of a pod as the host knows it: where it is in its life, its streams, its exit.
//!
//! ```text
//!             start_process            the agent's word, or the VMM's death
//!   Created ────────────────► Running ─────────────────────────────────────► Stopped(Exit)
//!      │                      ▲     │                                           ▲
//!      │               resume │     │ pause                                     │
//!      │                      │     ▼                                           │
//!      │                      Paused ───────────────────────────────────────────┤
//!      └────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The state is the host's own: asking for it never waits on the guest.

use std::{
    fmt,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use protocol::agent::{WaitProcessRequest, WaitProcessResponse};
use tokio::{
    sync::{Notify, broadcast, watch},
    time::{sleep, timeout},
};

use super::Event;
use crate::{
    container::{Pumps, Streams},
    id::ContainerId,
    sandbox::{self, Sandbox, no_limit},
    sys,
};

/// The status of a process whose end nobody saw: what SIGKILL gives.
const KILLED: u32 = 137;

/// How long after a SIGKILL the rest of a process's output may take.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long after an exec's end its output may take: what it left running in the container may
/// hold its streams for ever.
const EXEC_LAST_WORDS: Duration = Duration::from_millis(500);

/// How long the output of a process may still take when it is removed, where its end did not wait
/// for it.
const REMOVAL: Duration = Duration::from_secs(10);

/// The name of an exec, unique in its container.
pub type ExecId = ContainerId;

/// A process: a container's first one, or one of its execs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The container.
    pub container: ContainerId,
    /// The exec; none is the container's first process.
    pub exec: Option<ExecId>,
}

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n when signal n ended it.
    pub status: u32,
    /// By the host's clock.
    pub at: SystemTime,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It waits for its start.
    Created,
    /// It runs.
    Running,
    /// It runs and its container is frozen.
    Paused,
    /// It has ended.
    Stopped(Exit),
}

/// A process's standard streams on the host. Bytes are carried by the pod's process.
#[derive(Debug, Default)]
pub struct Stdio {
    /// What it reads.
    pub stdin: Input,
    /// Where its output goes; a terminal's, too.
    pub stdout: Option<OwnedFd>,
    /// Where its errors go; unused with a terminal.
    pub stderr: Option<OwnedFd>,
    /// When the process's end is told.
    pub ending: Ending,
}

/// What a process reads.
#[derive(Debug, Default)]
pub enum Input {
    /// Nothing.
    #[default]
    Nothing,
    /// What comes from here.
    From(OwnedFd),
    /// What comes from where its start says.
    AtStart,
}

/// When a process's end is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ending {
    /// When its output was written, too: who waited for the end then has all of it.
    #[default]
    Written,
    /// At once: who reads the output sees its end by itself, or never comes.
    Ended,
}

impl Stdio {
    /// None at all.
    pub fn null() -> Self {
        Self::default()
    }

    /// Both ways by one side of a pseudo-terminal.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn terminal(side: OwnedFd) -> std::io::Result<Self> {
        Ok(Self {
            stdin: Input::From(side.try_clone()?),
            stdout: Some(side),
            ..Self::default()
        })
    }

    /// Columns and rows of the terminal that they are, if it knows them.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        let Input::From(stdin) = &self.stdin else {
            return None;
        };
        let size = sys::terminal_size(stdin.as_fd()).ok();
        size.filter(|(columns, rows)| *columns > 0 && *rows > 0)
    }
}

impl ProcessId {
    /// The first process of `container`.
    pub fn first(container: ContainerId) -> Self {
        Self {
            container,
            exec: None,
        }
    }

    /// The exec's name as the agent has it.
    pub(super) fn exec_name(&self) -> String {
        self.exec
            .as_ref()
            .map_or(String::new(), ToString::to_string)
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            Some(exec) => write!(f, "{}/{exec}", self.container),
            None => write!(f, "{}", self.container),
        }
    }
}

impl Status {
    /// The word that other runtimes use.
    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) id: ProcessId,
    pub(super) terminal: bool,
    /// The host's process that stands for it.
    pub(super) pid: u32,
    status: watch::Sender<Status>,
    streams: Mutex<Carried>,
    ending: Ending,
    /// Held while it is being started, so that its end is told after its start.
    pub(super) starting: tokio::sync::Mutex<()>,
    /// Held while its container is being frozen or thawed: of two who want the same at once, one
    /// does it, and the status is what the guest did last.
    pub(super) freezing: tokio::sync::Mutex<()>,
    /// Told when a SIGKILL was sent to it, or any signal when only its output was left.
    pub(super) killed: Notify,
    /// Whether it has ended in the guest and its output is still to be read.
    pub(super) draining: AtomicBool,
}

/// The streams' way.
#[derive(Debug)]
enum Carried {
    Waiting(Streams),
    Under(Arc<Pumps>),
    Closed,
}

impl Process {
    pub(super) fn new(
        id: ProcessId,
        pid: u32,
        terminal: bool,
        (streams, ending): (Streams, Ending),
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            terminal,
            pid,
            status: watch::channel(Status::Created).0,
            streams: Mutex::new(Carried::Waiting(streams)),
            ending,
            starting: tokio::sync::Mutex::new(()),
            freezing: tokio::sync::Mutex::new(()),
            killed: Notify::new(),
            draining: AtomicBool::new(false),
        })
    }

    pub(super) fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// Changes the status, unless the process has ended.
    pub(super) fn becomes(&self, next: Status) -> bool {
        self.status.send_if_modified(|status| {
            let alive = !matches!(status, Status::Stopped(_));
            if alive {
                *status = next;
            }
            alive
        })
    }

    /// Waits for the end.
    pub(super) async fn ended(&self) -> Exit {
        let mut status = self.status.subscribe();
        loop {
            if let Status::Stopped(exit) = *status.borrow_and_update() {
                return exit;
            }
            // The sender lives as long as `self`.
            if status.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits until it is not frozen.
    pub(super) async fn thawed(&self) {
        let mut status = self.status.subscribe();
        // The sender lives as long as `self`.
        let _ = status.wait_for(|status| *status != Status::Paused).await;
    }

    /// Begins to carry bytes, those of `input` where that was to be said now.
    pub(super) fn relay(&self, input: Option<OwnedFd>) -> std::io::Result<()> {
        let mut carried = self.carried();
        if let Carried::Waiting(streams) = std::mem::replace(&mut *carried, Carried::Closed) {
            *carried = Carried::Under(Arc::new(streams.relay(input)?));
        }
        Ok(())
    }

    /// Ends the stream of its input.
    pub(super) fn close_stdin(&self) {
        if let Carried::Under(pumps) = &*self.carried() {
            pumps.close_input();
        }
    }

    /// Waits until the output of a process that is removed was written, where its end did not wait.
    pub(super) async fn written(&self) {
        let pumps = match (self.ending, &*self.carried()) {
            (Ending::Ended, Carried::Under(pumps)) => pumps.clone(),
            _ => return,
        };
        if timeout(REMOVAL, pumps.drained()).await.is_err() {
            tracing::warn!(process = %self.id, "it is removed before all of its output was read");
        }
    }

    /// Lets go of all streams.
    pub(super) fn close(&self) {
        let before = std::mem::replace(&mut *self.carried(), Carried::Closed);
        drop(before);
    }

    fn carried(&self) -> MutexGuard<'_, Carried> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until everything that it wrote is where it belongs. A reader that takes nothing more
    /// holds up no process that was killed.
    async fn drained(&self) {
        let pumps = match &*self.carried() {
            Carried::Under(pumps) => pumps.clone(),
            _ => return,
        };
        let enough = async {
            match self.id.exec {
                Some(_) => sleep(EXEC_LAST_WORDS).await,
                None => {
                    self.killed.notified().await;
                    sleep(LAST_WORDS).await;
                }
            }
        };
        tokio::select! {
            biased;
            () = pumps.drained() => {}
            () = enough => tracing::debug!(process = %self.id, "its end is told before all of its output was read"),
        }
    }
}

/// Waits for the process's end, by the agent's word or the VMM's death, and tells it.
pub(super) async fn watch(
    process: Arc<Process>,
    sandbox: Arc<Sandbox>,
    events: broadcast::Sender<Event>,
) {
    let request = WaitProcessRequest {
        container_id: process.id.container.to_string(),
        exec_id: process.id.exec_name(),
        ..Default::default()
    };
    let ended = sandbox
        .wait("waiting for a process", async |agent| {
            agent.wait_process(no_limit(), &request).await
        })
        .await;
    let status = match &ended {
        Ok(ended) => status_of(ended),
        Err(error) => {
            tell_of(&process.id, error);
            KILLED
        }
    };
    let _started = process.starting.lock().await;
    let lives = !matches!(ended, Err(sandbox::Error::Death { .. }));
    if lives && process.ending == Ending::Written {
        process.draining.store(true, Ordering::Relaxed);
        process.drained().await;
    }
    let exit = Exit {
        status,
        at: SystemTime::now(),
    };
    let id = process.id.clone();
    process.becomes(Status::Stopped(exit));
    // Without listeners nobody needs to know.
    let _ = events.send(Event::Exit { process: id, exit });
}

/// The machine's death is told by the face, once for all processes.
fn tell_of(process: &ProcessId, error: &sandbox::Error) {
    let error_chain = crate::text::chain(error);
    match error {
        sandbox::Error::Death { .. } => {
            tracing::debug!(%process, error = error_chain, "the end of a process was not seen");
        }
        _ => tracing::warn!(%process, error = error_chain, "the end of a process was not seen"),
    }
}

/// A guest may say any number; a status has eight bits.
fn status_of(ended: &WaitProcessResponse) -> u32 {
    ended.exit_status.min(u32::from(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_that_no_process_can_have_is_not_taken_for_success() {
        for (said, is) in [(0, 0), (137, 137), (256, 255), (u32::MAX, 255)] {
            let ended = WaitProcessResponse {
                exit_status: said,
                ..Default::default()
            };
            assert_eq!(status_of(&ended), is);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_has_ended_stays_so() {
        let id = ProcessId::first(ContainerId::parse("web").expect("a name"));
        let streams = (Streams::default(), Ending::default());
        let process = Process::new(id, 1, false, streams);
        assert_eq!(process.status().word(), "created");
        let exit = Exit {
            status: 3,
            at: SystemTime::now(),
        };
        assert!(process.becomes(Status::Stopped(exit)));
        assert!(!process.becomes(Status::Running));
        assert_eq!(process.ended().await, exit);
    }
}
