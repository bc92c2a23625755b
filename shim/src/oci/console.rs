//! A container's terminal on the host: a pseudo-terminal whose master is sent
//! to the caller's console socket.
//!
//! The terminal that the container has is the guest's; this one passes bytes
//! as they are.

use std::{
    io::{self, IoSlice},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
};

use nix::{
    pty::openpty,
    sys::{
        socket::{ControlMessage, MsgFlags, sendmsg},
        termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
    },
};

use crate::sys;

/// What is sent along with the master: other runtimes send its name.
const NAME: &[u8] = b"/dev/ptmx";

/// Why there is no terminal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No pseudo-terminal.
    #[error("cannot make a terminal")]
    Make(#[source] io::Error),
    /// Nobody takes it.
    #[error("cannot send the terminal to the console socket {}", path.display())]
    Send {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The side of a terminal that is the container's.
#[derive(Debug)]
pub struct Console(OwnedFd);

impl Console {
    /// Makes a terminal and sends its master to the socket at `path`.
    ///
    /// # Errors
    /// When there is none left, or nobody listens.
    pub fn send_to(path: &Path) -> Result<Self, Error> {
        let made = || -> io::Result<_> {
            let pair = openpty(None, None)?;
            let mut mode = tcgetattr(&pair.slave)?;
            cfmakeraw(&mut mode);
            tcsetattr(&pair.slave, SetArg::TCSANOW, &mode)?;
            // The library leaves both open over an execution.
            Ok((
                sys::duplicate(&pair.master, 3)?,
                sys::duplicate(&pair.slave, 3)?,
            ))
        };
        let (master, slave) = made().map_err(Error::Make)?;
        let sent = || -> io::Result<()> {
            let socket = UnixStream::connect(path)?;
            let rights = [master.as_raw_fd()];
            let control = [ControlMessage::ScmRights(&rights)];
            let bytes = [IoSlice::new(NAME)];
            sendmsg::<()>(
                socket.as_raw_fd(),
                &bytes,
                &control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            )?;
            Ok(())
        };
        sent().map_err(|source| Error::Send {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self(slave))
    }

    /// The container's side.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// A copy of the container's side.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        os::{fd::AsFd, unix::net::UnixListener},
    };

    use super::*;

    #[test]
    fn the_caller_gets_the_master_and_bytes_pass_as_they_are() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("console.sock");
        let listener = UnixListener::bind(&path).expect("bound");
        let console = Console::send_to(&path).expect("sent");
        let (stream, _) = listener.accept().expect("accepted");
        let mut name = [0; 32];
        let (count, mut sent) = sys::receive(stream.as_fd(), &mut name).expect("received");
        assert_eq!(&name[..count], NAME);

        let mut master = File::from(sent.remove(0));
        File::from(console.into_fd())
            .write_all(b"a\nb")
            .expect("written");
        let mut bytes = [0; 3];
        master.read_exact(&mut bytes).expect("read");
        assert_eq!(&bytes, b"a\nb");
    }

    #[test]
    fn a_socket_that_is_not_there_is_named() {
        let error = Console::send_to(Path::new("/nonexistent/s")).expect_err("refused");
        assert!(error.to_string().contains("/nonexistent/s"), "{error}");
    }
}
