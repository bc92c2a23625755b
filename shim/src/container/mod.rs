//! A container in a sandbox, from its creation to its exit status.

use std::io;

use protocol::agent::{
    CreateContainerRequest, ResizeTerminalRequest, RootFilesystem, SignalProcessRequest,
    StartProcessRequest, WaitProcessRequest,
};

mod pump;
pub mod signals;
mod stdio;
mod terminal;

pub use signals::Signals;
pub use stdio::{Streams, Wiring};
pub use terminal::{NotATerminal, RawMode, Terminal};

use crate::{
    bundle::GuestSpec,
    id::ContainerId,
    sandbox::{self, GUEST_ROOT, Sandbox, no_limit},
};

/// The exit status of a command of ours that failed itself, as container tools have it.
pub const FAILED: u8 = 125;

/// Why a container did not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sandbox could not do it.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// The program is not there.
    #[error("unable to start container process: {message}")]
    NotFound {
        /// The agent's words.
        message: String,
    },
    /// The program cannot be executed.
    #[error("unable to start container process: {message}")]
    NotExecutable {
        /// The agent's words.
        message: String,
    },
    /// The host ran out of something.
    #[error("cannot relay the standard streams")]
    Streams(#[source] io::Error),
}

impl Error {
    /// The exit status that tells of it: 127 for a missing program, 126 for one that cannot be
    /// executed, [`FAILED`] for what is our own failure.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::NotFound { .. } => 127,
            Self::NotExecutable { .. } => 126,
            Self::Sandbox(_) | Self::Streams(_) => FAILED,
        }
    }
}

/// A container whose process was made and waits to be executed.
#[derive(Debug)]
pub struct Created<'a> {
    container: Container<'a>,
    streams: Streams,
}

/// A container whose process runs.
#[derive(Debug)]
pub struct Running<'a> {
    container: Container<'a>,
    streams: stdio::Running,
}

#[derive(Debug)]
struct Container<'a> {
    sandbox: &'a Sandbox,
    id: ContainerId,
}

/// Makes a container whose root file system the sandbox shares.
///
/// # Errors
/// When the agent refuses or the machine ends.
pub async fn create<'a>(
    sandbox: &'a Sandbox,
    id: &ContainerId,
    spec: &GuestSpec,
    wiring: Wiring,
) -> Result<Created<'a>, Error> {
    let _span = sandbox.trace().span("container created");
    let request = CreateContainerRequest {
        container_id: id.as_str().to_owned(),
        spec: spec.to_json(),
        root: Some(root()).into(),
        streams: Some(wiring.names()).into(),
        ..Default::default()
    };
    let creation = sandbox.call("creating the container", async |agent| {
        agent.create_container(no_limit(), &request).await
    });
    let creation = async { creation.await.map_err(unexecutable) };
    let opening = async { wiring.open(sandbox).await.map_err(Error::from) };
    // The agent waits for the streams that the request names, so both may be under way at once.
    let (streams, _) = tokio::try_join!(opening, creation)?;
    let container = Container {
        sandbox,
        id: id.clone(),
    };
    Ok(Created { container, streams })
}

fn root() -> RootFilesystem {
    let mut root = RootFilesystem::new();
    root.set_path(GUEST_ROOT.to_owned());
    root
}

impl<'a> Created<'a> {
    /// Executes the process.
    ///
    /// # Errors
    /// When it cannot be executed or the machine ends.
    pub async fn start(self) -> Result<Running<'a>, Error> {
        let Self { container, streams } = self;
        let sandbox = container.sandbox;
        let begin_ns = sandbox.trace().now_ns();
        let request = StartProcessRequest {
            container_id: container.id.as_str().to_owned(),
            ..Default::default()
        };
        let started = sandbox.call("starting the container", async |agent| {
            agent.start_process(no_limit(), &request).await
        });
        let started = started.await.map_err(unexecutable)?;
        let now_ns = sandbox.trace().now_ns();
        let executed_ns = sandbox.guest_ns(started.boot_ns).clamp(begin_ns, now_ns);
        sandbox
            .trace()
            .add("process executed", begin_ns, executed_ns);
        let streams = streams.relay().map_err(Error::Streams)?;
        Ok(Running { container, streams })
    }
}

impl Running<'_> {
    /// Waits for the end of the process and returns its status.
    ///
    /// # Errors
    /// When the machine ends before the process does.
    pub async fn wait(&self) -> Result<u8, Error> {
        let Container { sandbox, id } = &self.container;
        let request = WaitProcessRequest {
            container_id: id.as_str().to_owned(),
            ..Default::default()
        };
        let ended = sandbox.wait("running the container", async |agent| {
            agent.wait_process(no_limit(), &request).await
        });
        let ended = ended.await?;
        if ended.oom_killed {
            tracing::warn!(container = %id, "the guest's kernel killed a process of the container for want of memory");
        }
        Ok(exit_status(ended.exit_status))
    }

    /// Waits until everything that the process wrote is where it belongs.
    pub async fn drained(&self) {
        self.streams.drained().await;
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// When the agent refuses or the machine ends.
    pub async fn signal(&self, signal: i32) -> Result<(), Error> {
        let Container { sandbox, id } = &self.container;
        let request = SignalProcessRequest {
            container_id: id.as_str().to_owned(),
            signal: signal.unsigned_abs(),
            ..Default::default()
        };
        let sent = sandbox.call("signalling the container", async |agent| {
            agent.signal_process(no_limit(), &request).await
        });
        sent.await.map(|_| ()).map_err(Error::from)
    }

    /// Tells the process's terminal its size in columns and rows.
    ///
    /// # Errors
    /// When the agent refuses or the machine ends.
    pub async fn resize(&self, (width, height): (u16, u16)) -> Result<(), Error> {
        let Container { sandbox, id } = &self.container;
        let request = ResizeTerminalRequest {
            container_id: id.as_str().to_owned(),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        let resized = sandbox.call("resizing the terminal", async |agent| {
            agent.resize_terminal(no_limit(), &request).await
        });
        resized.await.map(|_| ()).map_err(Error::from)
    }
}

/// A guest may say any number; a status has eight bits.
fn exit_status(said: u32) -> u8 {
    u8::try_from(said).unwrap_or(u8::MAX)
}

fn unexecutable(error: sandbox::Error) -> Error {
    match error {
        sandbox::Error::Refused {
            code: ttrpc::Code::NOT_FOUND,
            message,
            ..
        } => Error::NotFound { message },
        sandbox::Error::Refused {
            code: ttrpc::Code::PERMISSION_DENIED,
            message,
            ..
        } => Error::NotExecutable { message },
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: ttrpc::Code) -> Error {
        unexecutable(sandbox::Error::Refused {
            doing: "starting the container",
            code,
            message: "exec: \"sh\": no such file".to_owned(),
        })
    }

    #[test]
    fn a_missing_program_is_127_and_one_that_cannot_be_executed_126() {
        assert_eq!(refused(ttrpc::Code::NOT_FOUND).exit_status(), 127);
        assert_eq!(refused(ttrpc::Code::PERMISSION_DENIED).exit_status(), 126);
    }

    #[test]
    fn every_other_refusal_is_a_failure_of_ours() {
        assert_eq!(refused(ttrpc::Code::INTERNAL).exit_status(), 125);
        assert_eq!(refused(ttrpc::Code::INVALID_ARGUMENT).exit_status(), 125);
    }

    #[test]
    fn a_status_that_no_process_can_have_is_not_taken_for_success() {
        assert_eq!(exit_status(137), 137);
        assert_eq!(exit_status(256), 255);
        assert_eq!(exit_status(u32::MAX), 255);
    }
}
