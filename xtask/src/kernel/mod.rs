//! The guest kernel: built once for each set of inputs, then taken from the cache.
//!
//! The inputs are the fragments' options (not their comments), the patches, the build script, the
//! source package and the compiler; their hash names the cache entry. A build is checked twice:
//! every requested option must have survived Kconfig, and the result must be there. See
//! `guest-kernel/README.md`.

mod fragment;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::process::{output, run};
use crate::project::Project;
use fragment::Fragments;

/// Debian's package with the kernel's source.
const SOURCE_PACKAGE: &str = "linux-source-6.12";

/// A kernel in the cache.
pub(crate) struct Kernel {
    dir: PathBuf,
}

impl Kernel {
    /// The uncompressed, stripped kernel.
    pub(crate) fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The same kernel compressed, in the form that distributions ship.
    pub(crate) fn bzimage(&self) -> PathBuf {
        self.dir.join("bzImage")
    }
}

/// Returns the kernel of the current inputs, building it if it is not in the cache.
pub(crate) fn build(project: &Project) -> Result<Kernel> {
    let source = Source::read(&project.root.join("guest-kernel"))?;
    let name = format!("kernel-{}", source.hash()?);
    let kernel = Kernel {
        dir: project.cache.join(&name),
    };
    let lock = lock(&project.cache, &name)?;
    if !kernel.vmlinux().exists() {
        eprintln!("xtask: building the guest kernel (15 minutes on two cores, once)");
        let work = project.cache.join(format!("{name}.work"));
        compile(&source, &work)?;
        store(&work, &kernel.dir)?;
    }
    drop(lock);
    Ok(kernel)
}

/// What of `guest-kernel` a kernel is made from.
struct Source {
    script: PathBuf,
    /// Applied by the script, in this order.
    patches: Vec<PathBuf>,
    fragments: Vec<PathBuf>,
    options: Fragments,
}

impl Source {
    fn read(dir: &Path) -> Result<Self> {
        let fragments = list(&dir.join("fragments"))?;
        let mut options = Fragments::default();
        for path in &fragments {
            options
                .add(&read(path)?)
                .with_context(|| format!("in {}", path.display()))?;
        }
        Ok(Self {
            script: dir.join("build.sh"),
            patches: list(&dir.join("patches"))?,
            fragments,
            options,
        })
    }

    /// The name of everything that decides the kernel's bytes.
    fn hash(&self) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(self.options.to_string());
        hash.update(read(&self.script)?);
        for patch in &self.patches {
            hash.update(read(patch)?);
        }
        hash.update(source_version()?);
        for tool in ["gcc", "ld"] {
            hash.update(output(Command::new(tool).arg("--version"))?);
        }
        let digest = hash.finalize();
        Ok(digest
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect())
    }
}

/// The files of a directory, sorted.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .with_context(|| format!("cannot list {}", dir.display()))?;
    files.sort();
    Ok(files)
}

fn source_version() -> Result<String> {
    output(Command::new("dpkg-query").args(["-W", "-f", "${Version}", SOURCE_PACKAGE]))
        .with_context(|| format!("{SOURCE_PACKAGE} is not installed: run `make setup`"))
}

/// Holds off other builds of the same kernel until it is dropped.
fn lock(cache: &Path, name: &str) -> Result<File> {
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let path = cache.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Builds `work/vmlinux`, `work/bzImage` and `work/out/{.config,System.map}` in an empty `work`.
fn compile(source: &Source, work: &Path) -> Result<()> {
    if work.exists() {
        fs::remove_dir_all(work).with_context(|| format!("cannot empty {}", work.display()))?;
    }
    run(Command::new(&source.script)
        .arg("configure")
        .arg(work)
        .args(&source.fragments))?;
    check_config(&source.options, &work.join("out/.config"))?;
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    run(Command::new(&source.script)
        .arg("compile")
        .arg(work)
        .arg(jobs.to_string()))
}

/// Fails with a list of the options that are not what a fragment asked for.
fn check_config(options: &Fragments, config: &Path) -> Result<()> {
    let lost = options.lost(&read(config)?);
    if !lost.is_empty() {
        bail!(
            "the kernel's configuration lost {} options: {}",
            lost.len(),
            lost.join(", ")
        );
    }
    Ok(())
}

/// Moves what is worth keeping into the cache entry, which appears whole or not at all.
fn store(work: &Path, entry: &Path) -> Result<()> {
    let new = entry.with_extension("new");
    if new.exists() {
        fs::remove_dir_all(&new).with_context(|| format!("cannot empty {}", new.display()))?;
    }
    fs::create_dir(&new).with_context(|| format!("cannot create {}", new.display()))?;
    for (from, to) in [
        ("vmlinux", "vmlinux"),
        ("bzImage", "bzImage"),
        ("out/.config", ".config"),
        ("out/System.map", "System.map"),
    ] {
        let from = work.join(from);
        fs::rename(&from, new.join(to))
            .with_context(|| format!("cannot keep {}", from.display()))?;
    }
    fs::rename(&new, entry).with_context(|| format!("cannot create {}", entry.display()))?;
    fs::remove_dir_all(work).with_context(|| format!("cannot remove {}", work.display()))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_patch_opens_with_its_reason_and_its_licence() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel");
        let source = Source::read(&dir).unwrap();
        assert!(!source.patches.is_empty());
        for patch in source.patches {
            let text = read(&patch).unwrap();
            let (reason, _) = text.split_once("\n--- a/").unwrap();
            assert!(reason.lines().count() > 4, "{}", patch.display());
            assert!(reason.contains("\nLicence: GPL-2.0"), "{}", patch.display());
        }
    }
}
