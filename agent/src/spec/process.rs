//! `process`: what is executed and as whom.

use serde::Deserialize;

use super::{Error, List};

/// `process`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Process {
    /// Whether it has a terminal.
    pub terminal: bool,
    /// The terminal's first size.
    pub console_size: Option<ConsoleSize>,
    /// The working directory.
    pub cwd: String,
    /// The environment, `NAME=value`.
    pub env: List<String>,
    /// The program and its arguments.
    pub args: List<String>,
    /// Limits of resources, setrlimit(2).
    pub rlimits: List<Rlimit>,
    /// Capabilities; none of them where absent.
    pub capabilities: Option<Capabilities>,
    /// Whether no execve may gain privileges.
    pub no_new_privileges: bool,
    /// Ignored: the guest's kernel has no AppArmor; the virtual machine is the boundary.
    pub apparmor_profile: Option<String>,
    /// How soon the kernel ends it for want of memory, -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// Ignored: the guest's kernel has no SELinux; the virtual machine is the boundary.
    pub selinux_label: Option<String>,
    /// Who it runs as.
    pub user: User,
    /// How it shares CPUs with others.
    pub scheduler: Option<Scheduler>,
    /// How it shares block devices with others.
    pub io_priority: Option<IoPriority>,
    /// The CPUs of a process that is added to a container; no matter for the first.
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<ExecCpuAffinity>,
}

/// `process.scheduler`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Scheduler {
    /// `SCHED_...`.
    pub policy: String,
    /// The nice value.
    pub nice: Option<i32>,
    /// The real-time priority.
    pub priority: Option<i32>,
    /// `SCHED_FLAG_...`.
    pub flags: List<String>,
    /// Nanoseconds of SCHED_DEADLINE.
    pub runtime: Option<u64>,
    /// Nanoseconds of SCHED_DEADLINE.
    pub deadline: Option<u64>,
    /// Nanoseconds of SCHED_DEADLINE.
    pub period: Option<u64>,
}

/// `process.ioPriority`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct IoPriority {
    /// `IOPRIO_CLASS_...`.
    pub class: String,
    /// The level in it, 0 to 7.
    pub priority: i32,
}

/// `process.execCPUAffinity`: lists such as `0-3,7`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct ExecCpuAffinity {
    /// While it is made.
    pub initial: Option<String>,
    /// When it executes its program.
    #[serde(rename = "final")]
    pub last: Option<String>,
}

/// `process.consoleSize`.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

/// `process.user`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct User {
    /// The user's id.
    pub uid: u32,
    /// The group's id.
    pub gid: u32,
    /// The file mode creation mask.
    pub umask: Option<u32>,
    /// Further groups.
    pub additional_gids: List<u32>,
}

/// One of `process.rlimits`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Rlimit {
    /// `RLIMIT_...`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The limit that counts.
    pub soft: u64,
    /// How far the process may raise it.
    pub hard: u64,
}

/// `process.capabilities`: five sets of `CAP_...`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// What any program it executes can ever have.
    pub bounding: List<String>,
    /// What it has now.
    pub effective: List<String>,
    /// What passes through execve of files that inherit it.
    pub inheritable: List<String>,
    /// What it can make effective.
    pub permitted: List<String>,
    /// What passes through execve of any file.
    pub ambient: List<String>,
}

impl Process {
    /// Reads and checks the `process` of an exec.
    ///
    /// # Errors
    /// As [`Spec::parse`](super::Spec::parse).
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        if json.len() > super::MAX_BYTES {
            return Err(Error::TooLong(json.len()));
        }
        let process: Self = serde_json::from_slice(json)?;
        process.check()?;
        Ok(process)
    }

    /// Fails for what cannot be executed whatever the container.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.args.is_empty() {
            return Err(Error::Missing("process.args"));
        }
        if !self.cwd.starts_with('/') {
            return Err(Error::Value {
                field: "process.cwd".into(),
                value: self.cwd.clone(),
                reason: "it must be an absolute path",
            });
        }
        for (field, strings) in [("process.args", &self.args), ("process.env", &self.env)] {
            if let Some(bad) = strings.iter().find(|text| text.contains('\0')) {
                return Err(Error::Value {
                    field: field.into(),
                    value: bad.clone(),
                    reason: "it contains a zero byte",
                });
            }
        }
        Ok(())
    }
}
