//! The streams of a container as containerd's clients name them, opened here and given to the pod
//! as descriptors.
//!
//! A named pipe is opened in both directions. That never waits for the client; and while no client
//! reads, because containerd is being restarted or a user has left, the output waits in the pipe
//! instead of being lost.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

mod logger;
mod uri;

pub use logger::{Error as LoggerError, Logger};
pub use uri::{Error as UriError, Target};

use crate::id::Namespace;

/// Why a stream is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its name is none.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// It cannot be opened.
    #[error("cannot open {} for {stream}", path.display())]
    Open {
        /// stdin, stdout or stderr.
        stream: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A program cannot be read from.
    #[error("stdin cannot come from a file:// or binary:// target; name a pipe")]
    Input,
    /// Two programs.
    #[error(
        "stderr goes to another logger than stdout; name the same binary:// target for both, or a file:// for one"
    )]
    TwoLoggers,
    /// The logger does not run.
    #[error(transparent)]
    Logger(#[from] LoggerError),
}

/// A process's streams, as the client named them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// Where input comes from.
    pub stdin: String,
    /// Where output goes.
    pub stdout: String,
    /// Where errors go.
    pub stderr: String,
    /// Whether the process has a terminal, whose output and errors are one.
    pub terminal: bool,
}

/// Open streams, for the pod, and what stays here.
#[derive(Debug, Default)]
pub struct Streams {
    /// Where input comes from.
    pub stdin: Option<OwnedFd>,
    /// Where output goes.
    pub stdout: Option<OwnedFd>,
    /// Where errors go.
    pub stderr: Option<OwnedFd>,
    /// What stays.
    pub kept: Kept,
}

/// What the shim itself keeps of a process's streams.
#[derive(Debug, Default)]
pub struct Kept {
    /// The pipe of stdin, held open so that a client may leave and another come: closed by CloseIO.
    pub stdin_writer: Option<OwnedFd>,
    /// The logger.
    pub logger: Option<Logger>,
}

impl Streams {
    /// Opens those that have a name.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub async fn open(names: &Names, owner: (&Namespace, &str)) -> Result<Self, Error> {
        let mut streams = Self::default();
        match Target::parse(&names.stdin)? {
            Target::Null => {}
            Target::Fifo(path) => {
                let (reader, writer) = input(&path).map_err(failed("stdin", &path))?;
                streams.stdin = Some(reader);
                streams.kept.stdin_writer = Some(writer);
            }
            Target::File(_) | Target::Logger { .. } => return Err(Error::Input),
        }
        let stdout = Target::parse(&names.stdout)?;
        let stderr = match names.terminal {
            true => Target::Null,
            false => Target::parse(&names.stderr)?,
        };
        if let Target::Logger { program, arguments } = &stdout {
            let started = Logger::start(program, arguments, owner).await?;
            streams.kept.logger = Some(started.logger);
            streams.stdout = Some(started.stdout);
            if stderr == stdout {
                streams.stderr = Some(started.stderr);
                return Ok(streams);
            }
        } else {
            streams.stdout = output("stdout", &stdout)?;
        }
        streams.stderr = output("stderr", &stderr)?;
        Ok(streams)
    }
}

fn output(stream: &'static str, target: &Target) -> Result<Option<OwnedFd>, Error> {
    match target {
        Target::Null => Ok(None),
        Target::Fifo(path) => Ok(Some(pipe(path).map_err(failed(stream, path))?)),
        Target::File(path) => Ok(Some(appended(path).map_err(failed(stream, path))?)),
        Target::Logger { .. } => Err(Error::TwoLoggers),
    }
}

/// Both ends of the pipe that input comes through.
fn input(path: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
    let open = |options: &mut OpenOptions| {
        let file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
        pipe_only(&file).map(|()| OwnedFd::from(file))
    };
    let reader = open(OpenOptions::new().read(true))?;
    let writer = open(OpenOptions::new().write(true))?;
    Ok((reader, writer))
}

/// The pipe that output goes to, or a file that lies where a pipe is expected.
fn pipe(path: &Path) -> io::Result<OwnedFd> {
    if !fs::metadata(path)?.file_type().is_fifo() {
        return Ok(OpenOptions::new().append(true).open(path)?.into());
    }
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true);
    let file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
    pipe_only(&file).map(|()| file.into())
}

fn pipe_only(file: &File) -> io::Result<()> {
    match file.metadata()?.file_type().is_fifo() {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a named pipe",
        )),
    }
}

fn appended(path: &Path) -> io::Result<OwnedFd> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut options = OpenOptions::new();
    let file = options.append(true).create(true).mode(0o644).open(path)?;
    Ok(file.into())
}

fn failed(stream: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Open {
        stream,
        path,
        source,
    }
}

#[cfg(test)]
mod tests;
