//! Commands of clients: run to their end, with a deadline, and asked what came of it.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::PATIENCE;

/// What came of a command.
#[derive(Debug)]
pub struct Done {
    /// Its command line.
    line: String,
    /// Its exit status, 128 + n if signal n ended it.
    pub status: i32,
    /// What it printed.
    pub stdout: String,
    /// What it printed there.
    pub stderr: String,
}

/// Runs a command without input.
///
/// # Errors
/// When it cannot be started or does not end.
pub fn run(command: &mut Command) -> Result<Done> {
    feed(command, b"")
}

/// Runs a command with `input`.
///
/// Its output goes to files: whoever it leaves behind with them open does not hold us up.
///
/// # Errors
/// When it cannot be started or does not end.
pub fn feed(command: &mut Command, input: &[u8]) -> Result<Done> {
    let (mut stdin, mut stdout, mut stderr) = (file()?, file()?, file()?);
    stdin.write_all(input)?;
    stdin.rewind()?;
    let line = line(command);
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout.try_clone()?))
        .stderr(Stdio::from(stderr.try_clone()?))
        .spawn()
        .with_context(|| format!("cannot run `{line}`; does xtask/setup install it?"))?;
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("`{line}` does not end; so far: {}", read(&mut stderr)?);
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    if std::env::var_os("TELL").is_some() {
        eprintln!("{:>8.1?} {line}: {}", begun.elapsed(), number(status));
    }
    Ok(Done {
        line,
        status: number(status),
        stdout: read(&mut stdout)?,
        stderr: read(&mut stderr)?,
    })
}

/// A status as a shell has it.
pub(super) fn number(status: ExitStatus) -> i32 {
    let signal = status.signal().map(|signal| 128 + signal);
    status.code().or(signal).unwrap_or(-1)
}

/// A command line, for messages.
pub(super) fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy()];
    words.extend(command.get_args().map(|word| word.to_string_lossy()));
    words.join(" ")
}

fn file() -> Result<File> {
    tempfile::tempfile().context("cannot make a temporary file")
}

fn read(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

impl Done {
    /// What it printed, without the last newline.
    ///
    /// # Errors
    /// When it failed.
    pub fn text(&self) -> Result<&str> {
        self.ends_with(0)?;
        Ok(self.stdout.trim_end())
    }

    /// Fails unless this is its status.
    ///
    /// # Errors
    /// With all that it printed.
    pub fn ends_with(&self, status: i32) -> Result<&Self> {
        ensure!(
            self.status == status,
            "`{}` ended with {}, not {status}\nstdout: {}\nstderr: {}",
            self.line,
            self.status,
            self.stdout.trim_end(),
            self.stderr.trim_end()
        );
        Ok(self)
    }

    /// Fails unless it succeeded and printed just this.
    ///
    /// # Errors
    /// With all that it printed.
    pub fn prints(&self, wanted: &str) -> Result<&Self> {
        let printed = self.text()?;
        ensure!(
            printed == wanted,
            "`{}` printed {printed:?}, not {wanted:?}\nstderr: {}",
            self.line,
            self.stderr.trim_end()
        );
        Ok(self)
    }

    /// Fails unless `wanted` is in what it printed, on either stream.
    ///
    /// # Errors
    /// With all that it printed.
    pub fn tells(&self, wanted: &str) -> Result<&Self> {
        ensure!(
            self.stdout.contains(wanted) || self.stderr.contains(wanted),
            "`{}` does not tell {wanted:?}\nstdout: {}\nstderr: {}",
            self.line,
            self.stdout.trim_end(),
            self.stderr.trim_end()
        );
        Ok(self)
    }
}
