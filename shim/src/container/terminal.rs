//! The command's own terminal, lent to a container.

use std::{
    fs::OpenOptions,
    io::{self, IsTerminal},
    os::fd::{AsFd, OwnedFd},
};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::sys;

/// There is no terminal.
#[derive(Debug, thiserror::Error)]
#[error(
    "process.terminal in config.json is true and there is no terminal here; set it to false to use pipes"
)]
pub struct NotATerminal;

/// A terminal of this process.
#[derive(Debug)]
pub struct Terminal(OwnedFd);

/// A terminal whose keys all go to the container. Dropping it puts the old mode back.
#[derive(Debug)]
pub struct RawMode<'a> {
    terminal: &'a Terminal,
    before: Termios,
}

impl Terminal {
    /// The terminal that a standard stream is, or the session's.
    ///
    /// # Errors
    /// When there is none.
    pub fn find() -> Result<Self, NotATerminal> {
        let of = |fd: &dyn AsFd, is| {
            if is {
                fd.as_fd().try_clone_to_owned().ok()
            } else {
                None
            }
        };
        let found = of(&io::stdin(), io::stdin().is_terminal())
            .or_else(|| of(&io::stdout(), io::stdout().is_terminal()))
            .or_else(|| of(&io::stderr(), io::stderr().is_terminal()))
            .or_else(|| {
                let session = OpenOptions::new().read(true).write(true).open("/dev/tty");
                session.ok().map(OwnedFd::from)
            });
        found.map(Self).ok_or(NotATerminal)
    }

    /// A copy of its descriptor.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Columns and rows.
    pub fn size(&self) -> Option<(u16, u16)> {
        // One that does not know its size says 0.
        let size = sys::terminal_size(self.0.as_fd()).ok();
        size.filter(|(columns, rows)| *columns > 0 && *rows > 0)
    }

    /// Sends keys as they are from now on.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn raw(&self) -> io::Result<RawMode<'_>> {
        let before = tcgetattr(&self.0)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&self.0, SetArg::TCSANOW, &raw)?;
        Ok(RawMode {
            terminal: self,
            before,
        })
    }
}

impl Drop for RawMode<'_> {
    fn drop(&mut self) {
        // What the container wrote last is shown first.
        let _ = tcsetattr(&self.terminal.0, SetArg::TCSADRAIN, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use nix::{
        pty::{Winsize, openpty},
        sys::termios::LocalFlags,
    };

    use super::*;

    #[test]
    fn raw_mode_ends_with_its_guard() {
        let size = Winsize {
            ws_row: 40,
            ws_col: 120,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).expect("a pty");
        let terminal = Terminal(pty.slave);
        let echoes = || {
            let mode = tcgetattr(&terminal.0).expect("a mode");
            mode.local_flags.contains(LocalFlags::ECHO)
        };
        let raw = terminal.raw().expect("raw");
        assert!(!echoes());
        drop(raw);
        assert!(echoes());
        assert_eq!(terminal.size(), Some((120, 40)));
    }
}
