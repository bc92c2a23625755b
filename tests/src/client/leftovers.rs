//! What containers may leave on a host: looked at before and after.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Clean-up goes on after a client's command has ended.
const PATIENCE: Duration = Duration::from_secs(30);

const CGROUPS: &str = "/sys/fs/cgroup";

/// The cgroups that clients make once and keep.
const KEPT: [&str; 8] = [
    "default",
    "podman_probe",
    "libpod_parent",
    "libpod_parent/conmon",
    "docker",
    "k8s.io",
    "kubepods",
    "buildah",
];

/// What is there.
#[derive(Debug, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// What is there now.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn now() -> Result<Self> {
        let mut all = BTreeSet::new();
        // Numbers differ from mount to mount at the same place; the place and what lies there count.
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            let words: Vec<_> = line.split(' ').collect();
            if let [_, _, _, root, place, ..] = words[..] {
                // The first who makes a named network namespace makes it, and nobody removes it.
                if place != "/run/netns" {
                    all.insert(format!("mount of {root} at {place}"));
                }
            }
        }
        cgroups(Path::new(CGROUPS), &mut all);
        processes(&mut all)?;
        for directory in [
            "/run/bulkhead",
            "/run/containerd/bulkhead",
            "/run/netns",
            "/run/runc",
        ] {
            below(Path::new(directory), &mut all);
        }
        Ok(Self(all))
    }

    /// Fails unless the host becomes as it was.
    ///
    /// # Errors
    /// With what is left.
    pub fn are_all(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = Self::now()?;
            let left: Vec<_> = now.0.difference(&self.0).collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("left: {left:#?}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn cgroups(directory: &Path, all: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let kept = KEPT
                .iter()
                .any(|kept| path == Path::new(CGROUPS).join(kept));
            if !kept {
                all.insert(format!("cgroup {}", path.display()));
            }
            cgroups(&path, all);
        }
    }
}

/// The processes of runtimes, ours and the clients'.
fn processes(all: &mut BTreeSet<String>) -> Result<()> {
    let programs = ["bulkhead", "conmon", "runc", "containerd-shim"];
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // Its program's file: names are the processes' own to choose.
        let Ok(program) = fs::read_link(entry.path().join("exe")) else {
            continue;
        };
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        if programs.iter().any(|program| name.starts_with(program)) {
            all.insert(format!("process {pid} {name}"));
        }
    }
    Ok(())
}

/// Files and directories, two levels of them: a container's, below that of its namespace.
fn below(directory: &Path, all: &mut BTreeSet<String>) {
    let entries = |path: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    for outer in entries(directory) {
        if !outer.is_dir() {
            all.insert(format!("file {}", outer.display()));
        }
        for inner in entries(&outer) {
            all.insert(format!("file {}", inner.display()));
        }
    }
}
