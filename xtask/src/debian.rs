//! Debian root file systems, made by mmdebstrap once and kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::run;

/// The root file system `name` with `packages` beside the essential ones.
pub(crate) fn root(cache: &Path, name: &str, packages: &str) -> Result<PathBuf> {
    let root = cache.join(name);
    if root.exists() {
        return Ok(root);
    }
    println!("xtask: making a Debian root file system with mmdebstrap, once");
    let new = cache.join(format!("{name}.new"));
    if new.exists() {
        fs::remove_dir_all(&new).with_context(|| format!("cannot empty {}", new.display()))?;
    }
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase"])
        .arg(format!("--include={packages}"))
        .arg("bookworm")
        .arg(&new))?;
    fs::rename(&new, &root).with_context(|| format!("cannot create {}", root.display()))?;
    Ok(root)
}
