//! A container's cgroup on the host.
//!
//! ```text
//!   <cgroupsPath>/             the container's limits and what a machine needs besides
//!     vmm/                     the VMM's process
//!     container/               the process that stands for the container: its limits exactly
//! ```
//!
//! The limits are enforced in the guest, where the processes are. Here they
//! bound what the machine can take of the host, and tell those who look. Where
//! the host has no cgroup v2, or does not let us, there is none.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use oci_spec::runtime::Spec;
use serde_json::Value;

use crate::id::ContainerId;

/// Where the host's cgroups are.
const ROOT: &str = "/sys/fs/cgroup";

/// What a machine takes beside the container's memory: the guest's own, and the VMM's.
const OVERHEAD_BYTES: i64 = 128 << 20;

/// How long the processes of a cgroup may take to end when they are killed.
const END: Duration = Duration::from_secs(5);

/// How long they may take to end of their own accord.
const KIND: Duration = Duration::from_millis(100);

/// The controllers that limits are of.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "memory", "pids", "io"];

/// A cgroup that is to be made.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CgroupPlan {
    /// Below the root of all cgroups.
    path: PathBuf,
    /// The specification's `linux.resources`.
    resources: Value,
}

/// A cgroup that was made. Dropping it ends what runs in it and removes it.
#[derive(Debug)]
pub struct HostCgroup(PathBuf);

/// The layout of `linux.cgroupsPath`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A path.
    Path,
    /// `slice:prefix:name`, as systemd lays its cgroups out.
    Systemd,
}

impl CgroupPlan {
    /// The one that `spec` asks for, by default `/bulkhead/<id>`.
    pub fn of(spec: &Spec, id: &ContainerId, layout: Layout) -> Self {
        let linux = spec.linux().as_ref();
        let asked = linux.and_then(|linux| linux.cgroups_path().as_ref());
        let asked = asked.map(|path| path.to_string_lossy().into_owned());
        let path = match (asked.as_deref(), layout) {
            (None | Some(""), _) => format!("bulkhead/{id}"),
            (Some(path), Layout::Systemd) => systemd_path(path).unwrap_or(path.to_owned()),
            (Some(path), Layout::Path) => path.to_owned(),
        };
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        Self {
            path: plain(Path::new(&path)),
            resources: serde_json::to_value(resources).unwrap_or_default(),
        }
    }

    /// Where it will be on this host, if cgroups can be made here.
    pub fn place(&self) -> Option<PathBuf> {
        let here = statfs(ROOT).is_ok_and(|status| status.filesystem_type() == CGROUP2_SUPER_MAGIC);
        here.then(|| Path::new(ROOT).join(&self.path))
    }

    /// Makes it. What the host does not permit is told once and left.
    pub fn make(&self) -> Option<HostCgroup> {
        let place = self.place()?;
        match HostCgroup::make(&place, &self.resources) {
            Ok(cgroup) => Some(cgroup),
            Err(error) => {
                tracing::warn!(path = %place.display(), %error, "the host's cgroup cannot be made: limits hold in the guest alone");
                None
            }
        }
    }
}

impl HostCgroup {
    fn make(place: &Path, resources: &Value) -> io::Result<Self> {
        // Another may just be removing the directory above.
        let mut made = delegated(place);
        if made
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        {
            made = delegated(place);
        }
        made?;
        let this = Self(place.to_owned());
        enable(place);
        for child in ["vmm", "container"] {
            match fs::create_dir(place.join(child)) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        this.limit(resources);
        Ok(this)
    }

    /// Sets limits; those that are not named stay.
    pub fn limit(&self, resources: &Value) {
        for (file, value) in limits(resources, 0) {
            self.write(&self.0.join("container"), &file, &value);
        }
        for (file, value) in limits(resources, OVERHEAD_BYTES) {
            // The machine's processes are not the container's.
            if file != "pids.max" {
                self.write(&self.0, &file, &value);
            }
        }
    }

    fn write(&self, cgroup: &Path, file: &str, value: &str) {
        if let Err(error) = fs::write(cgroup.join(file), value) {
            tracing::debug!(cgroup = %cgroup.display(), file, value, %error, "a limit holds in the guest alone");
        }
    }

    /// Puts the process that stands for the container into its place.
    pub fn admit(&self, pid: u32) {
        self.write(&self.0.join("container"), "cgroup.procs", &pid.to_string());
    }

    /// The VMM's cgroup, opened.
    ///
    /// # Errors
    /// When it is gone.
    pub fn vmm(&self) -> io::Result<OwnedFd> {
        fs::File::open(self.0.join("vmm")).map(OwnedFd::from)
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a cgroup stays behind");
        }
    }
}

/// Ends what runs in a cgroup that we made, and removes it.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(place: &Path) -> io::Result<()> {
    if !place.exists() {
        return Ok(());
    }
    let begin = Instant::now();
    let mut wait = Duration::from_millis(1);
    loop {
        let removed = ["vmm", "container", ""]
            .iter()
            .try_for_each(|child| gone(&place.join(child)));
        match removed {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && begin.elapsed() < END => {
                // Those that were told to end may do so first.
                if begin.elapsed() > KIND {
                    // An older kernel has no such file; then their parents' ends must do.
                    let _ = fs::write(place.join("cgroup.kill"), "1");
                }
                // The kernel tells of their end by a file, which is too much for what takes no time.
                std::thread::sleep(wait);
                wait = (wait * 2).min(Duration::from_millis(50));
            }
            Err(error) => return Err(error),
        }
    }
    // Ours, too, if nobody else is in it.
    if let Some(parent) = place.parent()
        && parent == Path::new(ROOT).join("bulkhead")
    {
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

fn gone(cgroup: &Path) -> io::Result<()> {
    match fs::remove_dir(cgroup) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Makes the directories down to `place`, each with the controllers that its parent has.
fn delegated(place: &Path) -> io::Result<()> {
    let below = place.strip_prefix(ROOT).unwrap_or(place);
    let mut at = PathBuf::from(ROOT);
    for name in below {
        enable(&at);
        at.push(name);
        match fs::create_dir(&at) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Lets the children of a cgroup be limited, as far as it may be itself.
fn enable(cgroup: &Path) {
    for controller in CONTROLLERS {
        // One that the host has not, or that is taken, limits nothing here.
        let _ = fs::write(
            cgroup.join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
}

/// Files and values of the limits in `resources`, memory with `more` bytes.
fn limits(resources: &Value, more: i64) -> Vec<(String, String)> {
    let number = |pointer: &str| resources.pointer(pointer).and_then(Value::as_i64);
    let text = |pointer: &str| resources.pointer(pointer).and_then(Value::as_str);
    let mut limits: Vec<(String, String)> = Vec::new();
    let mut set = |file: &str, value: String| limits.push((file.to_owned(), value));
    let bytes = |value: i64| match value {
        ..0 => "max".to_owned(),
        value => value.saturating_add(more).to_string(),
    };
    let memory = number("/memory/limit").filter(|limit| *limit != 0);
    if let Some(limit) = memory {
        set("memory.max", bytes(limit));
    }
    if let Some(reservation) = number("/memory/reservation").filter(|bytes| *bytes > 0) {
        set("memory.low", reservation.to_string());
    }
    match (number("/memory/swap").filter(|swap| *swap != 0), memory) {
        (Some(..0), _) => set("memory.swap.max", "max".to_owned()),
        (Some(swap), Some(limit)) if limit > 0 => {
            set(
                "memory.swap.max",
                swap.saturating_sub(limit).max(0).to_string(),
            );
        }
        _ => {}
    }
    let period = number("/cpu/period")
        .filter(|period| *period > 0)
        .unwrap_or(100_000);
    match number("/cpu/quota") {
        Some(quota @ 1..) => set("cpu.max", format!("{quota} {period}")),
        Some(i64::MIN..=-1) => set("cpu.max", format!("max {period}")),
        _ => {}
    }
    if let Some(shares) = number("/cpu/shares").filter(|shares| *shares > 0) {
        // From 2 to 262144 onto 1 to 10000.
        let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
        set("cpu.weight", weight.to_string());
    }
    for (pointer, file) in [("/cpu/cpus", "cpuset.cpus"), ("/cpu/mems", "cpuset.mems")] {
        if let Some(list) = text(pointer).filter(|list| !list.is_empty()) {
            set(file, list.to_owned());
        }
    }
    match number("/pids/limit") {
        Some(limit @ 1..) => set("pids.max", limit.to_string()),
        Some(i64::MIN..=-1) => set("pids.max", "max".to_owned()),
        _ => {}
    }
    limits
}

/// Where systemd has the scope `slice:prefix:name`.
fn systemd_path(text: &str) -> Option<String> {
    let mut parts = text.splitn(3, ':');
    let (slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
    let slice = match slice {
        "" => "system.slice",
        slice => slice,
    };
    let stem = slice.strip_suffix(".slice")?;
    let mut path = String::new();
    // a-b.slice lies in a.slice.
    let words: Vec<&str> = stem.split('-').collect();
    if stem != "-" {
        for end in 1..=words.len() {
            path += &format!("{}.slice/", words[..end].join("-"));
        }
    }
    let unit = match (prefix, name.ends_with(".slice")) {
        (_, true) => name.to_owned(),
        ("", false) => format!("{name}.scope"),
        (prefix, false) => format!("{prefix}-{name}.scope"),
    };
    Some(path + &unit)
}

/// The plain names of a path alone: no way up, no root.
fn plain(path: &Path) -> PathBuf {
    let names = path.components().filter_map(|component| match component {
        std::path::Component::Normal(name) => Some(name),
        _ => None,
    });
    names.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_are_the_files_of_cgroup_v2() {
        let resources = json!({
            "memory": {"limit": 1000, "swap": 1500},
            "cpu": {"quota": 50_000, "shares": 1024, "cpus": "0-1"},
            "pids": {"limit": 10}
        });
        let limits = limits(&resources, 0);
        let expected = [
            ("memory.max", "1000"),
            ("memory.swap.max", "500"),
            ("cpu.max", "50000 100000"),
            ("cpu.weight", "39"),
            ("cpuset.cpus", "0-1"),
            ("pids.max", "10"),
        ];
        let expected = expected.map(|(file, value)| (file.to_owned(), value.to_owned()));
        assert_eq!(limits, expected);
    }

    #[test]
    fn no_limit_is_max_and_what_is_not_named_is_not_touched() {
        let resources = json!({"memory": {"limit": -1}, "pids": {"limit": -1}});
        let limits = limits(&resources, 5);
        assert_eq!(limits.len(), 2);
        assert!(limits.iter().all(|(_, value)| value == "max"), "{limits:?}");
    }

    #[test]
    fn scopes_lie_in_their_slices() {
        let path = |text| systemd_path(text).expect("a path");
        assert_eq!(path("system.slice:runc:1"), "system.slice/runc-1.scope");
        assert_eq!(
            path("user-1000.slice:libpod:a"),
            "user.slice/user-1000.slice/libpod-a.scope"
        );
        assert_eq!(path(":cri:x"), "system.slice/cri-x.scope");
        assert_eq!(systemd_path("/a/b"), None);
    }

    proptest! {
        #[test]
        fn no_path_leads_out_of_the_cgroups(path in "[a-z./:]{0,20}") {
            let plain = plain(Path::new(&path));
            prop_assert!(!plain.is_absolute());
            prop_assert!(plain.components().all(|part| part.as_os_str() != ".."));
        }
    }
}
