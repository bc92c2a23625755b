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
const END: Duration = Duration::from_secs(15);

/// How long they may take to end of their own accord when they were told how.
const KIND: Duration = Duration::from_secs(10);

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

/// A cgroup that was made. Dropping it kills what runs in it and removes it.
#[derive(Debug)]
pub struct HostCgroup(PathBuf);

/// A process on its way into a cgroup.
///
/// The kernel lets every processor pass a quiet point before it moves one (`synchronize_rcu` below
/// `cgroup_procs_write`): ten milliseconds in which nobody works. Whatever does not change cgroups
/// can be done meanwhile.
#[derive(Debug, Default)]
#[must_use = "the process is not in its cgroup before `done` returns"]
pub struct Admission(Option<tokio::task::JoinHandle<()>>);

impl Admission {
    /// Waits until it is there.
    pub async fn done(&mut self) {
        if let Some(moving) = self.0.take() {
            // It ends by itself, and panics nowhere.
            let _ = moving.await;
        }
    }
}

/// The layout of `linux.cgroupsPath`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A path.
    Path,
    /// `slice:prefix:name`, as systemd lays its cgroups out.
    Systemd,
}

impl Layout {
    /// The one that the configuration's path has: those of systemd do not begin with a slash.
    pub fn seen_in(spec: &Spec) -> Self {
        let path = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().as_ref());
        let path = path.map(|path| path.to_string_lossy());
        match path {
            Some(path) if systemd_path(&path).is_some() => Self::Systemd,
            _ => Self::Path,
        }
    }
}

impl CgroupPlan {
    /// As it is, without limits: those of a pod are in the cgroup above.
    pub fn unlimited(self) -> Self {
        let resources = Value::Null;
        Self { resources, ..self }
    }

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
            let cgroup = cgroup.display();
            match file.starts_with("cpuset.") {
                true => {
                    tracing::warn!(%cgroup, file, value, %error, "the machine is not confined to these");
                }
                false => {
                    tracing::debug!(%cgroup, file, value, %error, "a limit holds in the guest alone");
                }
            }
        }
    }

    /// Puts the process that stands for the container into its place, while the caller goes on.
    pub fn admit(&self, pid: u32) -> Admission {
        let processes = self.0.join("container/cgroup.procs");
        let moving = tokio::task::spawn_blocking(move || {
            if let Err(error) = fs::write(&processes, pid.to_string()) {
                let path = processes.display();
                tracing::debug!(%path, pid, %error, "the process stays in the cgroup that it is in");
            }
        });
        Admission(Some(moving))
    }

    /// The VMM's cgroup, opened.
    ///
    /// # Errors
    /// When it is gone.
    pub fn vmm(&self) -> io::Result<OwnedFd> {
        fs::File::open(self.0.join("vmm")).map(OwnedFd::from)
    }
}

impl HostCgroup {
    /// Removes it at an ordinary end, while other tasks go on: one of them tells the process that
    /// stands for the container how to exit.
    pub async fn end(self) {
        self.remove_after(KIND).await;
    }

    /// Kills what runs in it and removes it, while other tasks go on: what it was made for failed,
    /// and what is in it may wait for whoever calls this.
    pub async fn undo(self) {
        self.remove_after(Duration::ZERO).await;
    }

    async fn remove_after(mut self, kind: Duration) {
        let mut removal = Removal::of(&self.0, kind);
        loop {
            match removal.attempt() {
                Ok(None) => break,
                Ok(Some(wait)) => tokio::time::sleep(wait).await,
                Err(error) => {
                    told(&self.0, &error);
                    break;
                }
            }
        }
        self.0 = PathBuf::new();
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty()
            && let Err(error) = remove(&self.0)
        {
            told(&self.0, &error);
        }
    }
}

fn told(place: &Path, error: &io::Error) {
    tracing::warn!(path = %place.display(), %error, "a cgroup stays behind");
}

/// Whether processes of a container, or its machine, are in the cgroup at `place`.
pub fn is_taken(place: &Path) -> bool {
    ["vmm", "container"].iter().any(|child| {
        let processes = fs::read(place.join(child).join("cgroup.procs"));
        processes.is_ok_and(|processes| !processes.is_empty())
    })
}

/// Kills what runs in a cgroup that we made, and removes it; also one of which only the directory
/// above was made.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(place: &Path) -> io::Result<()> {
    let mut removal = Removal::of(place, Duration::ZERO);
    while let Some(wait) = removal.attempt()? {
        std::thread::sleep(wait);
    }
    Ok(())
}

/// A cgroup on its way out.
struct Removal<'a> {
    place: &'a Path,
    begin: Instant,
    /// How long those that are in it may take to end of their own accord.
    kind: Duration,
    wait: Duration,
}

impl<'a> Removal<'a> {
    fn of(place: &'a Path, kind: Duration) -> Self {
        Self {
            place,
            begin: Instant::now(),
            kind,
            wait: Duration::from_millis(1),
        }
    }

    /// Removes it if nobody is in it any more, and otherwise returns when to come again.
    fn attempt(&mut self) -> io::Result<Option<Duration>> {
        let removed = ["vmm", "container", ""]
            .iter()
            .try_for_each(|child| gone(&self.place.join(child)));
        match removed {
            Ok(()) => {}
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && self.begin.elapsed() < END =>
            {
                if self.begin.elapsed() >= self.kind {
                    // Each time: one may have been on its way into it. An older kernel has no such
                    // file; then their parents' ends must do.
                    let _ = fs::write(self.place.join("cgroup.kill"), "1");
                }
                // The kernel tells of their end by a file, which is too much for what takes no time.
                let wait = self.wait;
                self.wait = (wait * 2).min(Duration::from_millis(50));
                return Ok(Some(wait));
            }
            Err(error) => return Err(error),
        }
        // Ours, too, if nobody else is in it.
        if let Some(parent) = self.place.parent()
            && parent == Path::new(ROOT).join("bulkhead")
        {
            let _ = fs::remove_dir(parent);
        }
        Ok(None)
    }
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
    if text.contains('/') {
        return None;
    }
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
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
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
        assert_eq!(systemd_path("/a:b/c:d:e"), None);
    }

    #[test]
    fn the_form_of_the_path_tells_its_layout() {
        let layout = |path: Option<&str>| {
            let mut config = json!({"ociVersion": "1.0.2", "linux": {}});
            if let Some(path) = path {
                config["linux"]["cgroupsPath"] = json!(path);
            }
            Layout::seen_in(&serde_json::from_value(config).expect("a spec"))
        };
        let systemd = "kubepods-besteffort-pod1.slice:cri-containerd:ab";
        assert_eq!(layout(Some(systemd)), Layout::Systemd);
        for path in [
            None,
            Some(""),
            Some("/k8s.io/ab"),
            Some("/a:b:c"),
            Some("a"),
        ] {
            assert_eq!(layout(path), Layout::Path, "{path:?}");
        }
    }

    /// A directory that cannot be removed, as that of a cgroup that has processes.
    fn taken() -> tempfile::TempDir {
        let place = tempfile::tempdir().expect("a directory");
        let child = place.path().join("container");
        fs::create_dir(&child).expect("made");
        let (none, flags) = (None::<&str>, MsFlags::empty());
        mount(none, &child, Some("tmpfs"), flags, none).expect("mounted");
        place
    }

    /// Whether the kernel is told at once to kill what is in a cgroup whose removal begins.
    fn is_killed_at_once(kind: Duration) -> bool {
        let place = taken();
        let attempt = Removal::of(place.path(), kind).attempt();
        assert!(attempt.expect("not yet").is_some());
        umount2(&place.path().join("container"), MntFlags::MNT_DETACH).expect("unmounted");
        place.path().join("cgroup.kill").exists()
    }

    #[test]
    fn those_that_were_told_to_end_may_and_those_of_a_failed_start_are_killed_at_once() {
        assert!(!is_killed_at_once(KIND));
        assert!(is_killed_at_once(Duration::ZERO));
    }

    #[test]
    fn the_cgroup_of_a_failed_start_is_not_waited_for() {
        let place = taken();
        let path = place.path().to_owned();
        let begin = Instant::now();
        let kernel = std::thread::spawn(move || {
            while !path.join("cgroup.kill").exists() {
                std::thread::sleep(Duration::from_millis(1));
            }
            umount2(&path.join("container"), MntFlags::MNT_DETACH).expect("unmounted");
        });
        drop(HostCgroup(place.path().to_owned()));
        kernel.join().expect("joined");
        assert!(begin.elapsed() < KIND / 2, "{:?}", begin.elapsed());
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
