//! One container by the commands that engines give, from `create` to `delete`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::{
        prctl::set_child_subreaper,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use serde_json::Value;

use crate::{container::Bundle, guest::bin};

/// Enough for a busy lab machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A container of the command line.
pub struct Container {
    /// Its bundle.
    pub bundle: Bundle,
    /// What stands for it, once it is made.
    pub pid: Pid,
    root: PathBuf,
    id: String,
}

impl Container {
    /// Makes one, `web`, in which `script` runs, its output in a file.
    ///
    /// # Errors
    /// When it is not made.
    pub fn create(script: &str, change: impl FnOnce(&mut Value)) -> Result<Self> {
        let mut container = Self::plan(None, "web", script)?;
        container.bundle.edit(change)?;
        container.make()?;
        Ok(container)
    }

    /// One that is not made yet, whose state lies in `root`, by default a place of its own.
    ///
    /// # Errors
    /// When its bundle cannot be made.
    pub fn plan(root: Option<&Path>, id: &str, script: &str) -> Result<Self> {
        let bundle = Bundle::new(&["sh", "-c", script])?;
        Ok(Self {
            root: root.map_or_else(|| bundle.path().join("state"), Path::to_owned),
            bundle,
            pid: Pid::from_raw(0),
            id: id.to_owned(),
        })
    }

    /// Makes it.
    ///
    /// # Errors
    /// When that fails.
    pub fn make(&mut self) -> Result<()> {
        // As an engine's monitor does, to adopt what the command leaves running.
        set_child_subreaper(true)?;
        let output = File::create(self.output_file())?;
        let status = self
            .creation()?
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .status()?;
        let pid = fs::read_to_string(self.pid_file()).unwrap_or_default();
        self.pid = Pid::from_raw(pid.parse().unwrap_or(0));
        ensure!(status.success(), "create: {}", self.output()?);
        Ok(())
    }

    /// The command that makes it.
    ///
    /// # Errors
    /// When the tests were not started by `cargo xtask test`.
    pub fn creation(&self) -> Result<Command> {
        let mut command = self.command(&["create", "--start-timeout", "100", "--bundle"])?;
        command
            .arg(self.bundle.path())
            .arg("--pid-file")
            .arg(self.pid_file())
            .arg(&self.id);
        Ok(command)
    }

    /// A command in its root.
    ///
    /// # Errors
    /// As [`Container::creation`].
    pub fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(bin("bulkhead")?);
        command
            .arg("--root")
            .arg(&self.root)
            .args(args)
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a command in its root.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        Ok(self.command(args)?.output()?)
    }

    /// The output of a command that succeeds.
    ///
    /// # Errors
    /// When it does not.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let output = self.run(args)?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{args:?}: {words}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What `state` says of it.
    ///
    /// # Errors
    /// When it says nothing.
    pub fn status(&self) -> Result<String> {
        let state: Value = serde_json::from_str(&self.ok(&["state", &self.id])?)?;
        Ok(state["status"].as_str().unwrap_or_default().to_owned())
    }

    /// What it printed.
    ///
    /// # Errors
    /// When it was not made.
    pub fn output(&self) -> Result<String> {
        Ok(fs::read_to_string(self.output_file())?)
    }

    /// The status with which its pid ends, as a monitor sees it.
    ///
    /// # Errors
    /// When it does not end, or a signal ended it.
    pub fn ended(&self) -> Result<i32> {
        let mut ended = None;
        eventually("its end", || {
            ended = match waitpid(self.pid, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive => None,
                WaitStatus::Exited(_, status) => Some(status),
                other => bail!("{} ended otherwise: {other:?}", self.id),
            };
            Ok(ended.is_some())
        })?;
        ended.context("no status")
    }

    /// The pod's process: the one that the journal names.
    ///
    /// # Errors
    /// When there is no journal.
    pub fn owner(&self) -> Result<Pid> {
        let journal = fs::read_to_string(self.state().join("journal"))?;
        let first: Value = serde_json::from_str(journal.lines().next().context("empty")?)?;
        Ok(Pid::from_raw(
            first["owner"].as_i64().context("no pid")? as i32
        ))
    }

    /// The process of its machine.
    ///
    /// # Errors
    /// When there is none.
    pub fn vmm(&self) -> Result<Pid> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.owner()?))?.flatten();
        let children =
            tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let children: String = children.collect();
        let first = children.split_whitespace().next().context("no VMM")?;
        Ok(Pid::from_raw(first.parse()?))
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its state directory.
    pub fn state(&self) -> PathBuf {
        self.root.join("default").join(&self.id)
    }

    /// The file that its output goes to.
    pub fn output_file(&self) -> PathBuf {
        self.bundle.path().join("output")
    }

    fn pid_file(&self) -> PathBuf {
        self.bundle.path().join("pid")
    }
}

impl Drop for Container {
    /// One of a test that failed is not the next one's leftover.
    fn drop(&mut self) {
        if fs::symlink_metadata(self.state()).is_ok() {
            let _ = self.run(&["delete", "--force", &self.id]);
        }
    }
}

/// Asks until the answer is yes.
///
/// # Errors
/// When it stays no, or cannot be had.
pub fn eventually(what: &str, holds: impl FnMut() -> Result<bool>) -> Result<()> {
    eventually_within(PATIENCE, what, holds)
}

/// As [`eventually`], for what takes longer.
///
/// # Errors
/// As [`eventually`].
pub fn eventually_within(
    patience: Duration,
    what: &str,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !holds()? {
        ensure!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
