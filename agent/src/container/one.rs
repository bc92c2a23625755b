//! One container: its processes, its cgroup, and what further processes need to
//! know of it.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, Weak},
};

use nix::sched::CloneFlags;
use tokio::task::AbortHandle;

use super::{Create, Error, MOST, Process, lock};
use crate::{
    cgroup::Cgroup,
    devices::{self, Guard},
    events::{Events, What},
    id::{ContainerId, ExecId},
    launch,
    mappings::Mappings,
    reaper::Exit,
    seccomp, spec,
};

/// A container.
#[derive(Debug)]
pub(super) struct Container {
    id: ContainerId,
    pub(super) first: Arc<Process>,
    pub(super) execs: Mutex<BTreeMap<ExecId, Arc<Process>>>,
    pub(super) seccomp: Option<seccomp::Filter>,
    pub(super) domain: Option<u64>,
    pub(super) kinds: CloneFlags,
    device_rules: Vec<spec::DeviceRule>,
    device_guard: Mutex<Guard>,
    pub(super) mappings: Option<Mappings>,
    pub(super) cgroup: Cgroup,
    /// The user namespace that a placeholder stands for.
    users: Mutex<Option<OwnedFd>>,
    /// How many kills for want of memory the host knows of.
    oom_kills: Mutex<u64>,
    watcher: Mutex<Option<Watcher>>,
}

/// What surrounds the processes of a container.
#[derive(Debug)]
pub(super) struct Inside {
    /// The system calls that they may make.
    pub(super) seccomp: Option<seccomp::Filter>,
    /// The ids of its user namespace.
    pub(super) mappings: Option<Mappings>,
    /// The kinds of namespaces that further processes join.
    pub(super) kinds: CloneFlags,
}

/// A task that ends with its container.
#[derive(Debug)]
struct Watcher(AbortHandle);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A process's life as the host asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Where it is.
    pub life: LifeState,
    /// Its id; 0 for a placeholder.
    pub pid: u32,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
    /// Whether the container ran out of memory.
    pub oom_killed: bool,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LifeState {
    /// It waits for its start.
    Created,
    /// It was started.
    Running,
    /// It runs, frozen.
    Paused,
    /// It has ended.
    Stopped,
}

impl Container {
    /// A container of `first`, which is watched from now on.
    pub(super) fn new(
        create: &Create,
        first: Process,
        inside: Inside,
        cgroup: Cgroup,
        events: &Arc<Events>,
    ) -> Arc<Self> {
        let container = Arc::new(Self {
            id: create.id.clone(),
            first: Arc::new(first),
            execs: Mutex::default(),
            seccomp: inside.seccomp,
            kinds: inside.kinds,
            // Of a container that was made it is one.
            domain: launch::domain(&create.spec.linux).ok().flatten(),
            device_rules: create.spec.linux.resources.devices.0.clone(),
            device_guard: Mutex::new(Guard::of(&create.spec)),
            mappings: inside.mappings,
            cgroup,
            users: Mutex::default(),
            oom_kills: Mutex::default(),
            watcher: Mutex::default(),
        });
        let watched: Weak<Self> = Arc::downgrade(&container);
        let events = events.clone();
        let watch = container.cgroup.watch_memory(move || {
            if let Some(container) = watched.upgrade() {
                container.note_oom_kills(&events);
            }
        });
        let watcher = Watcher(tokio::spawn(watch).abort_handle());
        *lock(&container.watcher) = Some(watcher);
        container
    }

    /// The exec, or the first process.
    pub(super) fn process(
        &self,
        id: &ContainerId,
        exec: Option<&ExecId>,
    ) -> Result<Arc<Process>, Error> {
        let Some(exec) = exec else {
            return Ok(self.first.clone());
        };
        let found = lock(&self.execs).get(exec).cloned();
        found.ok_or_else(|| Error::NoExec {
            container: id.clone(),
            exec: exec.clone(),
        })
    }

    /// The user namespace that a placeholder of the ids `ids` stands for, made when it is needed.
    pub(super) fn users(&self, ids: &Mappings) -> io::Result<OwnedFd> {
        let mut users = lock(&self.users);
        let made = match users.take() {
            Some(made) => made,
            None => ids.namespace()?,
        };
        users.insert(made).try_clone()
    }

    /// Where `process`, one of the container's, is in its life.
    pub(super) fn state(&self, process: &Process) -> State {
        let exit = process.exit();
        let life = match exit {
            Some(_) => LifeState::Stopped,
            None if !process.was_started() => LifeState::Created,
            None if self.cgroup.is_frozen() => LifeState::Paused,
            None => LifeState::Running,
        };
        State {
            life,
            pid: process.pid(),
            exit,
            oom_killed: self.cgroup.oom_kills() > 0,
        }
    }

    /// Tells the host of kills that it does not know of yet; answers how many there were ever.
    pub(super) fn note_oom_kills(&self, events: &Events) -> u64 {
        let kills = self.cgroup.oom_kills();
        let mut known = lock(&self.oom_kills);
        if kills > *known {
            *known = kills;
            events.add(self.id.clone(), What::OutOfMemory(kills));
        }
        *known
    }

    /// Sets limits anew. The rules about devices stay: some clients send them along as they are.
    pub(super) fn update(&self, resources: &spec::Resources) -> Result<(), Error> {
        if !resources.devices.is_empty() && *resources.devices != self.device_rules {
            return Err(Error::DeviceRules);
        }
        Ok(self.cgroup.update(resources)?)
    }

    /// A further process may be able to make device files where the first one was not.
    pub(super) fn guard_devices(&self, process: &spec::Process) -> Result<(), Error> {
        let mut guard = lock(&self.device_guard);
        if *guard == Guard::Mounts && devices::can_make_devices(process) {
            self.cgroup.restrict_devices(&self.device_rules)?;
            *guard = Guard::Program;
        }
        Ok(())
    }

    /// In a frozen container nothing would get ready.
    pub(super) fn check_not_frozen(&self, id: &ContainerId) -> Result<(), Error> {
        if self.cgroup.is_frozen() {
            return Err(Error::Paused(id.clone()));
        }
        Ok(())
    }

    pub(super) fn check_free(&self, id: &ContainerId, exec: &ExecId) -> Result<(), Error> {
        let execs = lock(&self.execs);
        if execs.len() >= MOST {
            return Err(Error::TooMany(MOST));
        }
        if execs.contains_key(exec) {
            return Err(Error::ExecExists {
                container: id.clone(),
                exec: exec.clone(),
            });
        }
        Ok(())
    }
}
