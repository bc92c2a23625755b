//! A terminal with somebody before it.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsFd,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    pty::{Winsize, openpty},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    PATIENCE,
    command::{line, number},
};

/// A command that runs in a terminal.
pub struct Terminal {
    line: String,
    child: Child,
    master: File,
    /// What was shown and not yet asked for.
    shown: String,
}

impl Terminal {
    /// Starts `command` in one of this size.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Result<Self> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None)?;
        let end = || pty.slave.try_clone().map(Stdio::from);
        let line = line(&command);
        let child = command
            .stdin(end()?)
            .stdout(end()?)
            .stderr(end()?)
            .spawn()
            .with_context(|| format!("cannot run `{line}`"))?;
        // It keeps the terminal's other end open.
        drop(command);
        Ok(Self {
            line,
            child,
            master: pty.master.into(),
            shown: String::new(),
        })
    }

    /// Types.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn type_in(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Waits until `wanted` is shown, and forgets all up to it.
    ///
    /// # Errors
    /// When it is not.
    pub fn shows(&mut self, wanted: &str) -> Result<()> {
        let shown = self.shows_within(wanted, PATIENCE)?;
        ensure!(
            shown,
            "`{}` shows no {wanted:?}, only {:?}",
            self.line,
            self.shown
        );
        Ok(())
    }

    /// Whether `wanted` is shown within a moment; all up to it is then forgotten.
    ///
    /// # Errors
    /// When the terminal fails.
    pub fn shows_soon(&mut self, wanted: &str) -> Result<bool> {
        self.shows_within(wanted, Duration::from_secs(3))
    }

    fn shows_within(&mut self, wanted: &str, patience: Duration) -> Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(at) = self.shown.find(wanted) {
                self.shown.drain(..at + wanted.len());
                return Ok(true);
            }
            if Instant::now() > deadline || !self.take()? {
                return Ok(false);
            }
        }
    }

    /// Changes its size, as a terminal emulator does when its window changes.
    ///
    /// # Errors
    /// When the command has ended.
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<()> {
        let (rows, columns) = (rows.to_string(), columns.to_string());
        let status = Command::new("stty")
            .args(["rows", &rows, "columns", &columns])
            .stdin(Stdio::from(self.master.as_fd().try_clone_to_owned()?))
            .status()?;
        ensure!(status.success(), "stty failed");
        // It is not this child's controlling terminal, so nobody else tells it.
        Ok(kill(
            Pid::from_raw(self.child.id() as i32),
            Signal::SIGWINCH,
        )?)
    }

    /// Types keys, each by itself, and all again every few seconds until the command ends; returns
    /// its status and what was still shown.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end_by(mut self, keys: &[&str]) -> Result<(i32, String)> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            for key in keys {
                self.type_in(key)?;
                std::thread::sleep(Duration::from_millis(500));
            }
            let again = Instant::now() + Duration::from_secs(5);
            while Instant::now() < again {
                if self.child.try_wait()?.is_some() {
                    return self.end();
                }
                self.take()?;
            }
        }
        bail!(
            "`{}` does not end by {keys:?}; it shows {:?}",
            self.line,
            self.shown
        );
    }

    /// Waits for the command's end and returns its status and what was still shown.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end(mut self) -> Result<(i32, String)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.child.try_wait()?;
            let open = self.take()?;
            match status {
                Some(status) if !open => {
                    return Ok((number(status), std::mem::take(&mut self.shown)));
                }
                _ if Instant::now() > deadline => {
                    bail!("`{}` does not end; it shows {:?}", self.line, self.shown);
                }
                _ => {}
            }
        }
    }

    /// Takes what is shown within a moment. False when nobody has the other end any more.
    fn take(&mut self) -> Result<bool> {
        const MOMENT_MS: u16 = 100;
        let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(MOMENT_MS))? == 0 {
            return Ok(true);
        }
        let mut bytes = [0; 4096];
        // At its end, a terminal fails.
        let count = self.master.read(&mut bytes).unwrap_or(0);
        self.shown += &String::from_utf8_lossy(&bytes[..count]);
        Ok(count > 0)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
