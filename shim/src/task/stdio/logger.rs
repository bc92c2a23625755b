//! A program that takes a container's output: `binary://`.
//!
//! It finds stdout on descriptor 3, stderr on 4, and closes 5 when it is ready. It ends when both
//! streams have.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{fcntl::OFlag, unistd::pipe2};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    process::{Child, Command},
    time::timeout,
};

use crate::{id::Namespace, sys};

/// How long it may take to become ready.
const READY: Duration = Duration::from_secs(10);

/// How long it may take to write the rest when the container has ended.
const END: Duration = Duration::from_secs(10);

/// Why there is no logger.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be executed.
    #[error("cannot start the logger {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It does not say that it is ready.
    #[error(
        "the logger {} did not close descriptor 5 within {} s, by which it says that it is ready",
        program.display(),
        ready.as_secs()
    )]
    Deadline {
        /// The program.
        program: PathBuf,
        /// How long it had.
        ready: Duration,
    },
}

/// A running logger. Dropping it kills it.
#[derive(Debug)]
pub struct Logger {
    child: Child,
}

/// A logger and the ends of its streams.
#[derive(Debug)]
pub struct Started {
    /// The program.
    pub logger: Logger,
    /// Where the container's output goes.
    pub stdout: OwnedFd,
    /// Where its errors go.
    pub stderr: OwnedFd,
}

impl Logger {
    /// Starts one and waits until it is ready.
    ///
    /// # Errors
    /// When it cannot be started or does not become ready.
    pub async fn start(
        program: &Path,
        arguments: &[String],
        owner: (&Namespace, &str),
    ) -> Result<Started, Error> {
        Self::start_within(READY, program, arguments, owner).await
    }

    async fn start_within(
        limit: Duration,
        program: &Path,
        arguments: &[String],
        (namespace, id): (&Namespace, &str),
    ) -> Result<Started, Error> {
        let failed = |source| Error::Start {
            program: program.to_owned(),
            source,
        };
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed(errno.into()));
        let (stdout_reader, stdout) = pipe()?;
        let (stderr_reader, stderr) = pipe()?;
        let (ready, ready_writer) = pipe()?;
        let mut command = std::process::Command::new(program);
        command
            .args(arguments)
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace.as_str())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let descriptors = [stdout_reader, stderr_reader, ready_writer];
        sys::pass_descriptors(&mut command, descriptors).map_err(failed)?;
        let mut command = Command::from(command);
        let child = command.kill_on_drop(true).spawn().map_err(failed)?;
        // With the command go our copies of what it was given.
        drop(command);
        let logger = Self { child };

        let mut ready = pipe::Receiver::from_owned_fd(ready).map_err(failed)?;
        let mut byte = [0];
        match timeout(limit, ready.read(&mut byte)).await {
            // The pipe's end says it, or one byte.
            Ok(Ok(_)) => Ok(Started {
                logger,
                stdout,
                stderr,
            }),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(Error::Deadline {
                program: program.to_owned(),
                ready: limit,
            }),
        }
    }

    /// Waits until it has written everything; its streams must have ended.
    pub async fn finish(mut self) {
        match timeout(END, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => {}
            Ok(Ok(status)) => tracing::warn!(%status, "the logger failed"),
            Ok(Err(error)) => tracing::warn!(%error, "cannot wait for the logger"),
            Err(_) => tracing::warn!("the logger does not end and is killed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_logger_that_is_never_ready_is_named_and_ended() {
        let arguments = ["-c", "exec sleep 1000"].map(str::to_owned);
        let owner = Namespace::parse("default").expect("a name");
        let limit = Duration::from_millis(100);
        let shell = Path::new("/bin/sh");
        let started = Logger::start_within(limit, shell, &arguments, (&owner, "web")).await;
        let error = started.expect_err("refused");
        assert!(matches!(error, Error::Deadline { .. }), "{error}");
    }
}
