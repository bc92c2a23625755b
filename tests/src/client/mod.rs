//! Clients: the tools that drive a runtime, as their users drive them.
//!
//! A test is a story told to a client twice, once with runc below it and once with Bulkhead:
//! what holds for the one holds for the other. Where it does not, `docs/compatibility.md` has a row.

pub mod command;
pub mod containerd;
pub mod cri;
pub mod ctr;
pub mod docker;
pub mod images;
pub mod leftovers;
pub mod podman;
pub mod terminal;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::guest::bin;

/// Enough for a busy lab machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How much of a log is shown when a test fails.
const TAIL: usize = 6 << 10;

/// What runs the containers of a story.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// The reference.
    Runc,
    /// Ours.
    Bulkhead,
}

impl Runtime {
    /// Both, the reference first, or the one that `BULKHEAD_RUNTIME` names.
    ///
    /// # Errors
    /// When it names none.
    pub fn all() -> Result<Vec<Self>> {
        let all = [Self::Runc, Self::Bulkhead];
        let Some(wanted) = std::env::var_os("BULKHEAD_RUNTIME") else {
            return Ok(all.to_vec());
        };
        let named: Vec<_> = all.into_iter().filter(|one| wanted == one.name()).collect();
        ensure!(
            !named.is_empty(),
            "BULKHEAD_RUNTIME is {wanted:?}, neither runc nor bulkhead"
        );
        Ok(named)
    }

    /// What clients call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Bulkhead => "bulkhead",
        }
    }

    /// Its command.
    ///
    /// # Errors
    /// When the tests were not started by `cargo xtask test`.
    pub fn program(self) -> Result<PathBuf> {
        match self {
            Self::Runc => Ok("/usr/sbin/runc".into()),
            Self::Bulkhead => bin("bulkhead"),
        }
    }

    /// Whether it puts a pod into a virtual machine.
    pub fn is_ours(self) -> bool {
        self == Self::Bulkhead
    }
}

/// A directory for a client's containers, where overlayfs works.
///
/// # Errors
/// When it cannot be made.
pub fn store() -> Result<tempfile::TempDir> {
    let scratch = Path::new("/scratch");
    let parent = match scratch.is_dir() {
        true => scratch.to_owned(),
        false => std::env::temp_dir(),
    };
    // Short: sockets lie in it.
    let directory = tempfile::Builder::new().prefix("c").tempdir_in(&parent);
    directory.with_context(|| format!("cannot make a directory in {}", parent.display()))
}

/// The ends of all logs below these directories, for the message of a failure.
pub fn logs(directories: &[&Path]) -> String {
    let mut found = Vec::new();
    for directory in directories {
        collect(directory, 0, &mut found);
    }
    let mut text = String::new();
    for path in found {
        let bytes = fs::read(&path).unwrap_or_default();
        if !bytes.is_empty() {
            let tail = &bytes[bytes.len().saturating_sub(TAIL)..];
            let tail = String::from_utf8_lossy(tail);
            text += &format!("\n--- {}\n{}", path.display(), tail.trim_end());
        }
    }
    text
}

fn collect(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    const DEEPEST: usize = 8;
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        // The containers' own files are no logs of anybody's.
        let foreign = ["merged", "diff", "rootfs", "shared", "fs", "volumes"];
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < DEEPEST && !foreign.contains(&&*name) => {
                collect(&path, depth + 1, found);
            }
            Ok(kind) if kind.is_file() && name.ends_with("log") => found.push(path),
            _ => {}
        }
    }
}

/// Asks until the answer is yes.
///
/// # Errors
/// When it is not within [`PATIENCE`], or cannot be had.
pub fn until(what: &str, mut answer: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if answer()? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("in vain was waited for {what}")
}
