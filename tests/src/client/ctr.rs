//! Stories told to ctr, containerd's own client.

use std::fs;

use anyhow::{Context, Result};
use nix::unistd::Pid;

use super::{
    Runtime,
    command::Done,
    containerd::{Containerd, Programs},
    images::BUSYBOX,
    leftovers::Leftovers,
};

/// A containerd with the image, and what the host had before.
pub struct Story {
    /// What it is told to.
    pub containerd: Containerd,
    /// What its containers run by.
    pub runtime: &'static str,
    before: Leftovers,
}

impl Story {
    /// Begins one.
    ///
    /// # Errors
    /// When containerd cannot be started.
    pub fn begin(runtime: Runtime, programs: Programs) -> Result<Self> {
        let containerd = Containerd::start_from(programs)?;
        containerd.import("default", &[BUSYBOX])?;
        let runtime = match runtime {
            Runtime::Runc => "io.containerd.runc.v2",
            Runtime::Bulkhead => "io.containerd.bulkhead.v2",
        };
        Ok(Self {
            containerd,
            runtime,
            before: Leftovers::now()?,
        })
    }

    /// Runs a command of ctr.
    ///
    /// # Errors
    /// When it does not end.
    pub fn ctr(&self, args: &[&str]) -> Result<Done> {
        self.containerd.ctr(args)
    }

    /// Runs a command of ctr that succeeds, and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn text(&self, args: &[&str]) -> Result<String> {
        Ok(self.ctr(args)?.text()?.to_owned())
    }

    /// The arguments of `ctr run` for this runtime.
    pub fn run<'a>(&self, flags: &[&'a str], id: &'a str, command: &[&'a str]) -> Vec<&'a str>
    where
        Self: 'a,
    {
        let fixed = ["run", "--runtime", self.runtime];
        [&fixed[..], flags, &[BUSYBOX, id], command].concat()
    }

    /// What `ctr tasks ls` says of a task.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn status(&self, id: &str) -> Result<String> {
        let list = self.text(&["tasks", "ls"])?;
        let line = list
            .lines()
            .find(|line| line.starts_with(&format!("{id} ")));
        let status = line.and_then(|line| line.split_whitespace().nth(2));
        Ok(status.unwrap_or("ABSENT").to_owned())
    }

    /// The pid of a task on the host.
    ///
    /// # Errors
    /// When there is no such task.
    pub fn pid(&self, id: &str) -> Result<Pid> {
        let list = self.text(&["tasks", "ls"])?;
        let line = list
            .lines()
            .find(|line| line.starts_with(&format!("{id} ")));
        let pid = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(Pid::from_raw(pid.context("no such task")?.parse()?))
    }

    /// The pid of the shim that serves a task.
    ///
    /// # Errors
    /// When there is no such task.
    pub fn shim(&self, id: &str) -> Result<Pid> {
        let machine = self.pid(id)?;
        let status = fs::read_to_string(format!("/proc/{machine}/status"))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        Ok(Pid::from_raw(parent.context("no parent")?.trim().parse()?))
    }

    /// Removes a task that has ended with this status, which ctr tells in words.
    ///
    /// # Errors
    /// When it is not, or with another status.
    pub fn removed(&self, id: &str, status: u32) -> Result<()> {
        let told = format!("non-zero exit code {status}");
        self.ctr(&["tasks", "delete", id])?.tells(&told).map(drop)
    }

    /// Fails unless the host is as it was, or becomes so.
    ///
    /// # Errors
    /// With what is left.
    pub fn nothing_is_left(&self) -> Result<()> {
        self.before
            .are_all()
            .with_context(|| self.containerd.logs())
    }

    /// Ends with a host as it was; runc leaves the namespace's cgroup.
    ///
    /// # Errors
    /// With what is left.
    pub fn end(self) -> Result<()> {
        match self.runtime {
            "io.containerd.bulkhead.v2" => self.nothing_is_left(),
            _ => Ok(()),
        }
    }

    /// Fails with the logs.
    ///
    /// # Errors
    /// As `result`.
    pub fn tell<T>(&self, result: Result<T>) -> Result<T> {
        result.with_context(|| self.containerd.logs())
    }
}
