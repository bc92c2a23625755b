//! Where things are: the sources, what is built, and what is kept between builds.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The directories of this clone and of its user.
pub(crate) struct Project {
    /// The clone's root directory.
    pub(crate) root: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
    /// What is kept between builds and shared between clones.
    pub(crate) cache: PathBuf,
}

impl Project {
    /// Finds the directories from where this program was built and from the environment.
    pub(crate) fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask was built outside a clone")?
            .to_owned();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        let cache = match env::var_os("XDG_CACHE_HOME") {
            Some(dir) if !dir.is_empty() => PathBuf::from(dir),
            // As in the lab's script, for who has no home: a job of cron, say.
            _ => Path::new(&env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache"),
        };
        Ok(Self {
            root,
            target,
            cache: cache.join("bulkhead"),
        })
    }

    /// The tree that `build` fills: `bin` and `share/bulkhead`, as an installation has them.
    pub(crate) fn prefix(&self) -> PathBuf {
        self.target.join("bulkhead")
    }

    /// Where the programs are installed for a run from this clone.
    pub(crate) fn bin(&self) -> PathBuf {
        self.prefix().join("bin")
    }

    /// Where the guest kernel and image are installed for a run from this clone.
    pub(crate) fn share(&self) -> PathBuf {
        self.prefix().join("share/bulkhead")
    }
}

/// Puts a copy of `from` at `to`, replacing what is there in one step, unless it is the same.
pub(crate) fn install(from: &Path, to: &Path) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let dir = to
        .parent()
        .with_context(|| format!("{} is no file name", to.display()))?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let new = to.with_extension("new");
    fs::copy(from, &new).with_context(|| format!("cannot write {}", new.display()))?;
    fs::rename(&new, to).with_context(|| format!("cannot replace {}", to.display()))
}
