//! Containers run by `bulkhead run`: a root file system of busybox and the
//! configuration that `runc spec` writes.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::guest::bin;

/// Enough for a busy lab machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Clean-up by others goes on after a command has ended.
const CLEAN_UP: Duration = Duration::from_secs(30);

/// Seconds that a guest may take to boot there.
const START_TIMEOUT: &str = "100";

/// A bundle, and a directory for the state of what runs from it.
pub struct Bundle {
    directory: tempfile::TempDir,
    /// The host's mounts and cgroups before anything ran.
    before: Made,
}

/// A `bulkhead run` under way.
pub struct Run {
    /// The command.
    pub child: Child,
}

/// What a run may make outside its directory.
#[derive(Debug)]
struct Made {
    mounts: BTreeSet<String>,
    cgroups: BTreeSet<PathBuf>,
}

impl Bundle {
    /// One in which `args` run, without a terminal.
    ///
    /// # Errors
    /// When busybox or runc is missing.
    pub fn new(args: &[&str]) -> Result<Self> {
        let bundle = Self {
            directory: tempfile::tempdir()?,
            before: Made::now()?,
        };
        let rootfs = bundle.rootfs();
        for name in ["bin", "dev", "proc", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(name))?;
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox"))
            .context("cannot copy busybox; is busybox-static installed?")?;
        for applet in [
            "sh", "cat", "echo", "sleep", "stty", "true", "false", "uname",
        ] {
            symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        let spec = Command::new("runc")
            .args(["spec", "--bundle"])
            .arg(bundle.path())
            .status()
            .context("cannot run `runc spec`")?;
        ensure!(spec.success(), "`runc spec` failed");
        bundle.edit(|config| {
            config["process"]["terminal"] = json!(false);
            config["process"]["args"] = json!(args);
        })?;
        Ok(bundle)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Its root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    /// Changes its config.json.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn edit(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let path = self.path().join("config.json");
        let mut config = serde_json::from_str(&fs::read_to_string(&path)?)?;
        change(&mut config);
        Ok(fs::write(&path, config.to_string())?)
    }

    /// `bulkhead run` of this bundle with further flags, not started yet.
    ///
    /// # Errors
    /// When the tests were not started by `cargo xtask test`.
    pub fn command(&self, flags: &[&str]) -> Result<Command> {
        let mut command = self.bulkhead(&["run", "--start-timeout", START_TIMEOUT, "--bundle"])?;
        command.arg(self.path()).args(flags).arg("web");
        Ok(command)
    }

    /// `bulkhead` on the state of what runs from this bundle, not started yet.
    ///
    /// # Errors
    /// As [`Bundle::command`].
    pub fn bulkhead(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(bin("bulkhead")?);
        command.arg("--root").arg(self.state()).args(arguments);
        Ok(command)
    }

    /// Starts it with pipes.
    ///
    /// # Errors
    /// As [`Bundle::command`].
    pub fn start(&self, flags: &[&str]) -> Result<Run> {
        let child = self
            .command(flags)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Run { child })
    }

    /// Runs it without input and returns its output and status.
    ///
    /// # Errors
    /// As [`Bundle::command`].
    pub fn run(&self) -> Result<Output> {
        self.run_with(&[])
    }

    /// Runs it with further flags.
    ///
    /// # Errors
    /// As [`Bundle::command`].
    pub fn run_with(&self, flags: &[&str]) -> Result<Output> {
        let mut run = self.start(flags)?;
        drop(run.child.stdin.take());
        run.output()
    }

    /// Fails unless everything that was made for the container is gone, or soon is: who was left
    /// to others when its parent was killed is waited for by them, and what others make meanwhile is
    /// not ours.
    ///
    /// # Errors
    /// When something is left.
    pub fn nothing_is_left(&self) -> Result<()> {
        let entries = fs::read_dir(self.state().join("default"));
        let state: Vec<_> = entries.into_iter().flatten().flatten().collect();
        ensure!(state.is_empty(), "state is left: {state:?}");
        let deadline = Instant::now() + CLEAN_UP;
        loop {
            let vmms = processes("bulkhead-vmm")?;
            let left = Made::now()?.without(&self.before);
            if vmms.is_empty() && left.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "left: {left:?} and the processes {vmms:?}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn state(&self) -> PathBuf {
        self.path().join("state")
    }
}

impl Run {
    /// Sends a signal to the command.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }

    /// Presses Ctrl-C until the command has ended. Once is enough but for the moment between the
    /// program's execution and its setting of a trap.
    ///
    /// # Errors
    /// When it does not end.
    pub fn interrupted(mut self) -> Result<Output> {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "Ctrl-C does not end the command");
            self.signal(Signal::SIGINT)?;
            std::thread::sleep(Duration::from_millis(500));
        }
        self.output()
    }

    /// Waits for a line of the container's output.
    ///
    /// # Errors
    /// When it ends before.
    pub fn wait_for_line(&mut self, wanted: &str) -> Result<()> {
        self.lines_until(wanted).map(drop)
    }

    /// The lines of the container's output up to the one that is wanted.
    ///
    /// # Errors
    /// When it ends before.
    pub fn lines_until(&mut self, wanted: &str) -> Result<Vec<String>> {
        let stdout = self.child.stdout.as_mut().context("no stdout")?;
        let (mut lines, mut line) = (Vec::new(), Vec::new());
        // Byte by byte, so that nothing of what follows is taken.
        let mut byte = [0];
        while stdout.read(&mut byte)? == 1 {
            if byte != *b"\n" {
                line.extend(byte);
                continue;
            }
            let text = String::from_utf8_lossy(&std::mem::take(&mut line)).into_owned();
            if text == wanted {
                return Ok(lines);
            }
            lines.push(text);
        }
        bail!(
            "the output ended without {wanted:?}, after {lines:?}: {}",
            self.stderr()
        )
    }

    /// Writes `bytes` to the container while its output is read.
    ///
    /// # Errors
    /// When the command fails to take them.
    pub fn feed(mut self, bytes: Vec<u8>) -> Result<Output> {
        let mut stdin = self.child.stdin.take().context("no stdin")?;
        let feeder = std::thread::spawn(move || stdin.write_all(&bytes));
        let output = self.output()?;
        ensure!(
            feeder.join().is_ok_and(|fed| fed.is_ok()),
            "not all was taken"
        );
        Ok(output)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn output(mut self) -> Result<Output> {
        let mut stderr = self.child.stderr.take().context("no stderr")?;
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stderr.read_to_end(&mut bytes).map(|_| bytes)
        });
        let mut stdout = Vec::new();
        if let Some(mut pipe) = self.child.stdout.take() {
            pipe.read_to_end(&mut stdout)?;
        }
        let Ok(stderr) = reader.join() else {
            bail!("the reader of stderr failed");
        };
        Ok(Output {
            status: self.child.wait()?,
            stdout,
            stderr: stderr?,
        })
    }

    /// The process of its virtual machine.
    ///
    /// # Errors
    /// When it does not appear.
    pub fn vmm(&self) -> Result<Pid> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let parent = self.child.id();
            for pid in processes("bulkhead-vmm")? {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                if status.contains(&format!("PPid:\t{parent}\n")) {
                    return Ok(pid);
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("no VMM appears")
    }

    fn stderr(&mut self) -> String {
        let _ = self.child.kill();
        let mut text = String::new();
        if let Some(stderr) = self.child.stderr.take() {
            let _ = BufReader::new(stderr).read_line(&mut text);
        }
        text
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Made {
    fn now() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let cgroups = fs::read_dir("/sys/fs/cgroup")?.flatten();
        Ok(Self {
            mounts: mounts.lines().map(str::to_owned).collect(),
            cgroups: cgroups
                .map(|entry| entry.path())
                .filter(|path| path.is_dir())
                .collect(),
        })
    }

    /// What is not in `other`.
    fn without(self, other: &Self) -> Self {
        Self {
            mounts: &self.mounts - &other.mounts,
            cgroups: &self.cgroups - &other.cgroups,
        }
    }

    fn is_empty(&self) -> bool {
        self.mounts.is_empty() && self.cgroups.is_empty()
    }
}

/// The ids of the processes with this name.
fn processes(name: &str) -> Result<Vec<Pid>> {
    let entries = fs::read_dir("/proc")?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let named = |pid: &i32| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        comm.trim() == name && !is_ours_to_reap(*pid)
    };
    Ok(pids.filter(named).map(Pid::from_raw).collect())
}

/// Whether a process has ended and was left to this one, as those are whose parent was killed.
fn is_ours_to_reap(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let mut words = after_name.split(' ');
    (words.next(), words.next()) == (Some("Z"), Some(&*std::process::id().to_string()))
}

/// The memory of a process in KiB, of shared pages its part.
///
/// # Errors
/// When it has ended.
pub fn pss_kib(pid: Pid) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    kib.context("no Pss")?.parse().context("no number")
}

/// Stops the guest's agent dead, from a container [`with_the_guests_cgroups`]: its process 1 is frozen.
pub const FREEZE_THE_AGENT: &str = "cd /sys/fs/cgroup; busybox mkdir dead; \
    echo 1 > dead/cgroup.procs; echo up; echo 1 > dead/cgroup.freeze; sleep 1000";

/// Gives a container the guest's own pid and cgroup namespaces.
pub fn with_the_guests_cgroups(config: &mut Value) {
    if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|one| one["type"] != "pid" && one["type"] != "cgroup");
    }
    for mount in config["mounts"].as_array_mut().into_iter().flatten() {
        if let (true, Some(options)) = (mount["type"] == "cgroup", mount["options"].as_array_mut())
        {
            options.retain(|option| option != "ro");
        }
    }
}
