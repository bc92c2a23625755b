//! A container's cgroup, version 2: where it is, what limits it has, what it
//! used.

mod devices;
mod limits;
mod stats;

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
    time::Duration,
};

pub use stats::{DeviceIo, HugePages, Pressure, Stall, Stats};
use tokio::io::Interest;

use crate::{
    log,
    spec::{DeviceRule, Resources},
    sys,
};

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// Why a cgroup is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path that leads elsewhere.
    #[error("linux.cgroupsPath is {0:?}: it must name a directory below the root, without . or ..")]
    Path(String),
    /// The container's cgroup is there already.
    #[error(
        "the cgroup {0} is in use; delete the container it belongs to or name another in linux.cgroupsPath"
    )]
    Exists(PathBuf),
    /// A value out of its range.
    #[error("{field} is {value:?}: {reason}")]
    Value {
        /// The property's path.
        field: String,
        /// What it holds.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A limit asks for a controller that the guest's kernel does not have.
    #[error("cannot set {file} to {value:?} in the cgroup {cgroup}")]
    Set {
        /// The cgroup's file.
        file: String,
        /// What was written.
        value: String,
        /// The cgroup.
        cgroup: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A step.
    #[error("cannot {doing} the cgroup {cgroup}")]
    Step {
        /// What was being done.
        doing: &'static str,
        /// The cgroup.
        cgroup: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A limit that the container exceeds already.
    #[error(
        "linux.resources.memory.limit is {limit}, and {usage} bytes are in use: leave out linux.resources.memory.checkBeforeUpdate to have the kernel take them away"
    )]
    InUse {
        /// The limit.
        limit: i64,
        /// What is in use.
        usage: u64,
    },
    /// Its processes did not end or freeze.
    #[error("the processes of the cgroup {cgroup} did not {what} within {} s", PATIENCE.as_secs())]
    Stuck {
        /// What was waited for.
        what: &'static str,
        /// The cgroup.
        cgroup: PathBuf,
    },
}

/// How long the kernel may take to kill or freeze.
const PATIENCE: Duration = Duration::from_secs(10);

/// A container's cgroup; removed, with all that runs in it, when dropped.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    fd: OwnedFd,
}

impl Cgroup {
    /// Makes the cgroup of the container `id` and sets its limits.
    ///
    /// # Errors
    /// When the path is none, is in use, or a limit cannot be set.
    pub fn create(
        cgroups_path: Option<&str>,
        id: &str,
        resources: &Resources,
    ) -> Result<Self, Error> {
        let below = relative(cgroups_path.unwrap_or_default(), id)?;
        let writes = limits::writes(resources)?;
        let path = make(Path::new(ROOT), &below)?;
        let step = |doing: &'static str| {
            let cgroup = path.clone();
            move |source| Error::Step {
                doing,
                cgroup,
                source,
            }
        };
        let fd = File::open(&path).map_err(step("open"))?.into();
        let cgroup = Self { path, fd };
        for (file, value) in writes {
            cgroup.set(&file, &value)?;
        }
        Ok(cgroup)
    }

    /// Sets limits anew; what `resources` leaves out stays.
    ///
    /// # Errors
    /// When one cannot be set: then those before it are set back.
    pub fn update(&self, resources: &Resources) -> Result<(), Error> {
        let resources = self.completed(resources);
        let memory = &resources.memory;
        if let Some(limit) = memory.limit.filter(|limit| *limit > 0)
            && memory.check_before_update == Some(true)
        {
            let usage = self.stats().memory.current;
            if usage > limit.unsigned_abs() {
                return Err(Error::InUse { limit, usage });
            }
        }
        let mut earlier = Vec::new();
        for (file, value) in limits::writes(&resources)? {
            let before = fs::read_to_string(self.path.join(&file)).unwrap_or_default();
            if let Err(error) = self.set(&file, &value) {
                self.set_back(&earlier);
                return Err(error);
            }
            earlier.push((file, before));
        }
        Ok(())
    }

    /// `resources` with the values of now where one that is given needs another that is not.
    fn completed(&self, resources: &Resources) -> Resources {
        let mut resources = resources.clone();
        let read = |file: &str| fs::read_to_string(self.path.join(file)).unwrap_or_default();
        if resources.cpu.period.is_some() && resources.cpu.quota.is_none() {
            let now = read("cpu.max");
            resources.cpu.quota = now.split(' ').next().and_then(|quota| quota.parse().ok());
        }
        if resources.memory.swap.is_some() && resources.memory.limit.is_none() {
            resources.memory.limit = read("memory.max").trim().parse().ok();
        }
        resources
    }

    /// Writes back what files held, the last first. Those with a line for each device take one
    /// line at a time.
    fn set_back(&self, earlier: &[(String, String)]) {
        for (file, before) in earlier.iter().rev() {
            for line in before.lines() {
                if let Err(error) = self.write(file, line) {
                    log!("after an update that failed: {error}");
                }
            }
        }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory, opened.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// From now on its processes may use the devices that `rules` say, and those that every
    /// container has.
    ///
    /// # Errors
    /// When a rule is none, or the kernel does not take the program.
    pub fn restrict_devices(&self, rules: &[DeviceRule]) -> Result<(), Error> {
        let program = devices::program(rules)?;
        sys::attach_device_program(self.fd(), &program).map_err(|source| Error::Step {
            doing: "apply linux.resources.devices to",
            cgroup: self.path.clone(),
            source,
        })
    }

    /// Reads its counters.
    pub fn stats(&self) -> Stats {
        Stats::read(&self.path)
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        stats::field(&self.path, "memory.events", "oom_kill").unwrap_or(0)
    }

    /// The ids of its processes and of those below it, at most `most`.
    pub fn processes(&self, most: usize) -> Vec<u32> {
        let mut pids = Vec::new();
        walk(&self.path, &mut |directory| {
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        });
        pids.truncate(most);
        pids
    }

    /// Kills all its processes and those below it; they may still be ending.
    ///
    /// # Errors
    /// When the kernel refuses. A cgroup that is gone has none.
    pub fn kill(&self) -> Result<(), Error> {
        match self.write("cgroup.kill", "1") {
            Err(Error::Set { source, .. }) if is_gone(&source) => Ok(()),
            other => other,
        }
    }

    /// Whether it is frozen, or about to be.
    pub fn is_frozen(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.freeze")).is_ok_and(|text| text.trim() == "1")
    }

    /// Calls `changed` whenever the kernel says that something happened to its memory, for ever;
    /// where the cgroup has no memory controller, never.
    pub(crate) fn watch_memory(
        &self,
        mut changed: impl FnMut() + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let events = File::open(self.path.join("memory.events"))
            .and_then(|file| sys::watch(file.into(), Interest::PRIORITY));
        async move {
            let Ok(events) = events else {
                return;
            };
            while let Ok(mut guard) = events.ready(Interest::PRIORITY).await {
                // Cleared before the file is read, so that no change between is lost.
                guard.clear_ready();
                changed();
            }
        }
    }

    /// What kills all its processes later.
    pub(crate) fn killer(&self) -> impl FnOnce() + Send + 'static {
        let file = self.path.join("cgroup.kill");
        move || {
            // A cgroup that was removed meanwhile has nobody left in it.
            let _ = fs::write(file, "1");
        }
    }

    /// Freezes or thaws its processes, and waits until they are.
    ///
    /// # Errors
    /// When they do not freeze in time.
    pub async fn freeze(&self, frozen: bool) -> Result<(), Error> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        self.event("frozen", value, "freeze or thaw").await
    }

    /// Kills what is left in it, waits for the end and removes it.
    ///
    /// # Errors
    /// When processes do not end in time, or the directory cannot be removed.
    pub async fn remove(&self) -> Result<(), Error> {
        self.kill()?;
        if !self.path.exists() {
            // Somebody else removed it at the same time.
            return Ok(());
        }
        self.event("populated", "0", "end").await?;
        remove(&self.path).map_err(|source| Error::Step {
            doing: "remove",
            cgroup: self.path.clone(),
            source,
        })
    }

    /// Sets a limit. A kernel without swap has no file for it, and needs none to use no swap; one
    /// that does not count reserved huge pages counts those in use.
    fn set(&self, file: &str, value: &str) -> Result<(), Error> {
        let may_be_missing = file == "memory.swap.max" || file.ends_with(".rsvd.max");
        match self.write(file, value) {
            Err(Error::Set { source, .. })
                if may_be_missing && source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            other => other,
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<(), Error> {
        fs::write(self.path.join(file), value).map_err(|source| Error::Set {
            file: file.to_owned(),
            value: value.to_owned(),
            cgroup: self.path.clone(),
            source,
        })
    }

    /// Waits until `name` of cgroup.events is `value`; the kernel tells of every change.
    async fn event(&self, name: &str, value: &str, what: &'static str) -> Result<(), Error> {
        let wait = async {
            let file = File::open(self.path.join("cgroup.events"))?;
            let events = sys::watch(file.into(), Interest::PRIORITY)?;
            loop {
                let mut guard = events.ready(Interest::PRIORITY).await?;
                // Cleared before the file is read, so that no change between is lost.
                guard.clear_ready();
                match stats::field_text(&self.path, "cgroup.events", name) {
                    Some(text) if text == value => return io::Result::Ok(()),
                    Some(_) => {}
                    // Removed meanwhile.
                    None => return Err(io::ErrorKind::NotFound.into()),
                }
            }
        };
        if stats::field_text(&self.path, "cgroup.events", name).as_deref() == Some(value) {
            return Ok(());
        }
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if is_gone(&error) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Error::Stuck {
                what,
                cgroup: self.path.clone(),
            }),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if self.path.exists() {
            let _ = self.kill();
            let _ = remove(&self.path);
        }
    }
}

/// The place of a cgroup below the root. systemd's `slice:prefix:name` becomes a directory of
/// that name: no systemd runs in the guest.
fn relative(cgroups_path: &str, id: &str) -> Result<PathBuf, Error> {
    let text = match cgroups_path.splitn(3, ':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] => format!("{slice}/{prefix}-{name}.scope"),
        _ if cgroups_path.is_empty() => id.to_owned(),
        _ => cgroups_path.to_owned(),
    };
    let path = Path::new(&text);
    let mut below = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => below.push(name),
            Component::RootDir => {}
            _ => return Err(Error::Path(cgroups_path.to_owned())),
        }
    }
    if below.as_os_str().is_empty() {
        return Err(Error::Path(cgroups_path.to_owned()));
    }
    Ok(below)
}

/// Makes the directories of `below` under `root`, each with the controllers of the one above.
fn make(root: &Path, below: &Path) -> Result<PathBuf, Error> {
    let mut path = root.to_path_buf();
    let depth = below.components().count();
    for (level, name) in below.components().enumerate() {
        delegate(&path);
        path.push(name);
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if level + 1 == depth {
                    replace(&path)?;
                }
            }
            Err(source) => {
                return Err(Error::Step {
                    doing: "make",
                    cgroup: path,
                    source,
                });
            }
        }
    }
    Ok(path)
}

/// Makes the cgroup `path` anew. One that was ever killed is of no use: kernels have been seen
/// to kill at once what is born into it.
fn replace(path: &Path) -> Result<(), Error> {
    if !is_empty(path) {
        return Err(Error::Exists(path.to_owned()));
    }
    remove(path)
        .and_then(|()| fs::create_dir(path))
        .map_err(|source| Error::Step {
            doing: "replace",
            cgroup: path.to_owned(),
            source,
        })
}

/// Whether nothing runs in the cgroup `path`.
fn is_empty(path: &Path) -> bool {
    stats::field_text(path, "cgroup.events", "populated").as_deref() == Some("0")
}

/// Hands every controller that `path` has on to the cgroups below it. A controller that cannot
/// be handed on shows when a limit of it is set.
fn delegate(path: &Path) {
    let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
    let handed = read("cgroup.subtree_control");
    let wanted: Vec<_> = read("cgroup.controllers")
        .split_whitespace()
        .filter(|controller| !handed.split_whitespace().any(|known| known == *controller))
        .map(|controller| format!("+{controller}"))
        .collect();
    if wanted.is_empty() {
        return;
    }
    let control = path.join("cgroup.subtree_control");
    if fs::write(&control, wanted.join(" ")).is_err() {
        for controller in wanted {
            let _ = fs::write(&control, controller);
        }
    }
}

/// Removes the cgroup at `path` and those that its processes made below it.
fn remove(path: &Path) -> io::Result<()> {
    let mut directories = Vec::new();
    walk(path, &mut |directory| {
        directories.push(directory.to_owned())
    });
    directories
        .iter()
        .rev()
        .try_for_each(|directory| match fs::remove_dir(directory) {
            Err(error) if is_gone(&error) => Ok(()),
            other => other,
        })
}

/// Whether an error says that the cgroup was removed.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Calls `visit` with `path` and every directory below it, parents first.
fn walk(path: &Path, visit: &mut impl FnMut(&Path)) {
    let mut ahead = vec![path.to_owned()];
    while let Some(directory) = ahead.pop() {
        visit(&directory);
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        ahead.extend(
            entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_path_is_taken_below_the_root() {
        assert_eq!(relative("/pod/web", "id").unwrap(), Path::new("pod/web"));
        assert_eq!(relative("", "id").unwrap(), Path::new("id"));
    }

    #[test]
    fn systemds_notation_becomes_a_directory() {
        assert_eq!(
            relative("user.slice:libpod:1", "id").unwrap(),
            Path::new("user.slice/libpod-1.scope")
        );
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for path in ["/", "..", "a/../b", "/../x"] {
            assert!(relative(path, "id").is_err(), "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_path_leads_out_of_the_hierarchy(path in ".*") {
            if let Ok(below) = relative(&path, "id") {
                prop_assert!(below.components().all(|c| matches!(c, Component::Normal(_))));
            }
        }
    }
}
