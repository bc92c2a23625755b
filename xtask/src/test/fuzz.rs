//! That the fuzz targets compile. They are workspaces of their own, since running them needs a
//! nightly compiler, so nothing else would notice one that fell behind.
//!
//! The unit tests see to those of guests' bytes and of images; those of the shim, whose
//! dependencies take longer than all else together, have to wait for `make check`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::process::{cargo, run};
use crate::project::Project;

/// Those that compile in a few seconds.
const QUICK: [&str; 2] = ["rootfs-builder", "vmm"];

/// Checks the targets of the crates that are quick about it.
pub(super) fn compile_quick(project: &Project) -> Result<()> {
    let manifests = manifests(project)?;
    let of = |name: &str| project.root.join(name).join("fuzz/Cargo.toml");
    for quick in QUICK.map(of) {
        ensure!(manifests.contains(&quick), "{} is missing", quick.display());
        compile(project, &quick)?;
    }
    Ok(())
}

/// Checks every target of every crate.
pub(crate) fn compile_all(project: &Project) -> Result<()> {
    manifests(project)?
        .iter()
        .try_for_each(|manifest| compile(project, manifest))
}

/// Nothing is linked.
fn compile(project: &Project, manifest: &Path) -> Result<()> {
    run(cargo()
        .current_dir(&project.root)
        .args(["check", "--quiet", "--bins", "--manifest-path"])
        .arg(manifest)
        .env("CARGO_TARGET_DIR", project.target.join("fuzz"))
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        // Else libFuzzer itself is compiled, for nothing. It is never looked for.
        .env("CUSTOM_LIBFUZZER_PATH", "/nonexistent/libfuzzer.a"))
}

/// One in each crate that has targets.
fn manifests(project: &Project) -> Result<Vec<PathBuf>> {
    let root = &project.root;
    let entries = fs::read_dir(root).with_context(|| format!("cannot list {}", root.display()))?;
    let mut manifests = Vec::new();
    for entry in entries {
        let manifest = entry?.path().join("fuzz/Cargo.toml");
        if manifest.exists() {
            manifests.push(manifest);
        }
    }
    manifests.sort();
    ensure!(
        !manifests.is_empty(),
        "no crate in {} has fuzz targets",
        root.display()
    );
    Ok(manifests)
}
