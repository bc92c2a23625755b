//! The streams of a container as containerd's clients name them, opened here and given to the pod
//! as descriptors.
//!
//! A named pipe is opened in both directions. That never waits for the client; and while no client
//! reads, because containerd is being restarted or a user has left, the output waits in the pipe
//! instead of being lost. That of the input is opened when the process starts.

use std::{
    fs::{self, OpenOptions},
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
    /// The pipe of its input.
    pub stdin: Stdin,
    /// The logger.
    pub logger: Option<Logger>,
}

/// The pipe of a process's input.
///
/// It is opened when the process starts. A client that finds a reader before its call for the
/// process has returned may come to the end of its input before it knows whom to tell by CloseIO.
///
/// ```text
///   Named ──open──► Open ──close──► Closed
///     └────────────close──────────────┘
/// ```
#[derive(Debug, Default)]
pub enum Stdin {
    /// There is none.
    #[default]
    Null,
    /// It is to be opened.
    Named(PathBuf),
    /// Its writing end is held, so that a client may leave and another come.
    Open(OwnedFd),
    /// The client has said that nothing more comes.
    Closed,
}

impl Stdin {
    /// Opens the pipe, the first time, and returns its reading end.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(&mut self) -> Result<Option<OwnedFd>, Error> {
        let Self::Named(path) = self else {
            return Ok(None);
        };
        let (reader, writer) = input(path).map_err(failed("stdin", path))?;
        *self = Self::Open(writer);
        Ok(Some(reader))
    }

    /// Lets the input end once the client has let go of it, too.
    pub fn close(&mut self) {
        *self = Self::Closed;
    }
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
                fs::metadata(&path)
                    .and_then(pipe_only)
                    .map_err(failed("stdin", &path))?;
                streams.kept.stdin = Stdin::Named(path);
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
        pipe_only(file.metadata()?).map(|()| OwnedFd::from(file))
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
    pipe_only(file.metadata()?).map(|()| file.into())
}

fn pipe_only(metadata: fs::Metadata) -> io::Result<()> {
    match metadata.file_type().is_fifo() {
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
