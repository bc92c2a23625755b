//! Where things that need KVM run: on this host if its KVM can run guests, else in the lab.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::project::Project;

/// A place where `/dev/kvm` runs guests.
pub(crate) enum Place {
    /// This host, or the lab machine that we are already in.
    Here,
    /// A lab machine (`tests/lab`), to be started.
    Lab {
        /// The script that starts one.
        script: PathBuf,
    },
}

impl Place {
    /// Tries this host's KVM with the installed `bulkhead check`.
    ///
    /// `BULKHEAD_LAB=1` asks for the lab without trying.
    pub(crate) fn find(project: &Project) -> Result<Self> {
        let asked = env::var_os("BULKHEAD_LAB").is_some_and(|value| value == "1");
        let inside = env::var_os("LAB").is_some_and(|value| value == "1");
        if inside || (!asked && host_runs_guests(&project.bin().join("bulkhead"))?) {
            return Ok(Self::Here);
        }
        Ok(Self::Lab {
            script: project.root.join("tests/lab/lab"),
        })
    }

    /// Says in one line that `what` runs in the lab, if it does.
    pub(crate) fn announce(&self, what: &str) {
        if let Self::Lab { .. } = self {
            println!("xtask: this host's KVM cannot run guests, so {what} run in the lab machine");
        }
    }

    /// A command that runs `program` at this place, with `options` for the lab machine.
    pub(crate) fn command(&self, options: &[&str], program: impl AsRef<OsStr>) -> Command {
        match self {
            Self::Here => Command::new(program),
            Self::Lab { script } => {
                let mut command = Command::new(script);
                command.args(options).arg("--").arg(program);
                command
            }
        }
    }
}

fn host_runs_guests(bulkhead: &Path) -> Result<bool> {
    let status = Command::new(bulkhead)
        .args(["check", "--quiet"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", bulkhead.display()))?;
    Ok(status.success())
}
