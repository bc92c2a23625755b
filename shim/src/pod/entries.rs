//! Who is in a pod: containers and execs by their names.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    Pod,
    disks::Disks,
    error::Error,
    process::{ExecId, Process, ProcessId, Status},
};
use crate::{cgroup::HostCgroup, hooks::HostHooks, id::ContainerId, sandbox::Place};

/// A pod's containers by their names.
pub(super) type Entries = Mutex<HashMap<ContainerId, Slot>>;

/// A container's entry.
#[derive(Debug)]
pub(super) enum Slot {
    /// It is being made.
    Reserved,
    Made(Container),
}

impl Slot {
    /// Removes what was made for it at the host, while other tasks go on.
    pub(super) async fn end(self) {
        if let Self::Made(Container {
            cgroup: Some(cgroup),
            ..
        }) = self
        {
            cgroup.end().await;
        }
    }
}

/// A container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) first: Arc<Process>,
    pub(super) execs: HashMap<ExecId, ExecSlot>,
    pub(super) hooks: Arc<HostHooks>,
    pub(super) cgroup: Option<HostCgroup>,
    pub(super) disks: Arc<Disks>,
    /// The host's file that it has as /etc/resolv.conf.
    pub(super) resolv_conf: Option<PathBuf>,
    /// Its files. Dropped last.
    pub(super) _place: Place,
}

#[derive(Debug)]
pub(super) enum ExecSlot {
    Reserved,
    Made(Arc<Process>),
}

/// What has no entry any more.
pub(super) enum Forgotten {
    Container(Slot),
    Exec,
}

/// A name that is taken. Dropping it gives it back.
pub(super) struct Reserved<'a> {
    pod: &'a Pod,
    id: ContainerId,
}

impl Reserved<'_> {
    pub(super) fn keep(self, container: Container) {
        let mut containers = self.pod.containers();
        containers.insert(self.id.clone(), Slot::Made(container));
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut containers = self.pod.containers();
        if matches!(containers.get(&self.id), Some(Slot::Reserved)) {
            containers.remove(&self.id);
        }
    }
}

/// An exec's name that is taken. Dropping it gives it back.
pub(super) struct ReservedExec<'a> {
    pod: &'a Pod,
    which: ProcessId,
}

impl ReservedExec<'_> {
    pub(super) fn keep(self, process: Arc<Process>) -> Result<(), Error> {
        let mut containers = self.pod.containers();
        let (Some(Slot::Made(container)), Some(exec)) =
            (containers.get_mut(&self.which.container), &self.which.exec)
        else {
            return Err(Error::no_container());
        };
        container
            .execs
            .insert(exec.clone(), ExecSlot::Made(process));
        Ok(())
    }
}

impl Drop for ReservedExec<'_> {
    fn drop(&mut self) {
        let mut containers = self.pod.containers();
        if let (Some(Slot::Made(container)), Some(exec)) =
            (containers.get_mut(&self.which.container), &self.which.exec)
            && matches!(container.execs.get(exec), Some(ExecSlot::Reserved))
        {
            container.execs.remove(exec);
        }
    }
}

impl Pod {
    pub(super) fn hooks(&self, container: &ContainerId) -> Option<Arc<HostHooks>> {
        match self.containers().get(container) {
            Some(Slot::Made(container)) => Some(container.hooks.clone()),
            _ => None,
        }
    }

    pub(super) fn disks(&self, container: &ContainerId) -> Option<Arc<Disks>> {
        match self.containers().get(container) {
            Some(Slot::Made(container)) => Some(container.disks.clone()),
            _ => None,
        }
    }

    /// The container's first process, if it has not ended.
    pub(super) fn alive(&self, container: &ContainerId) -> Result<Arc<Process>, Error> {
        let process = self.process(&ProcessId::first(container.clone()))?;
        match process.status() {
            Status::Stopped(_) => Err(Error::state("container not running")),
            _ => Ok(process),
        }
    }

    pub(super) fn process(&self, which: &ProcessId) -> Result<Arc<Process>, Error> {
        let containers = self.containers();
        let Some(Slot::Made(container)) = containers.get(&which.container) else {
            return Err(Error::no_container());
        };
        let Some(exec) = &which.exec else {
            return Ok(container.first.clone());
        };
        match container.execs.get(exec) {
            Some(ExecSlot::Made(process)) => Ok(process.clone()),
            _ => Err(Error::NotFound {
                what: format!("exec {exec}"),
            }),
        }
    }

    /// Takes it out of the books; its files are let go of.
    pub(super) fn forget(&self, which: &ProcessId) -> Option<Forgotten> {
        let mut containers = self.containers();
        match &which.exec {
            None => containers
                .remove(&which.container)
                .map(Forgotten::Container),
            Some(exec) => match containers.get_mut(&which.container) {
                Some(Slot::Made(container)) => {
                    container.execs.remove(exec).map(|_| Forgotten::Exec)
                }
                _ => None,
            },
        }
    }

    pub(super) fn reserve(&self, id: &ContainerId) -> Result<Reserved<'_>, Error> {
        let mut containers = self.containers();
        if containers.contains_key(id) {
            return Err(Error::Exists { what: "container" });
        }
        containers.insert(id.clone(), Slot::Reserved);
        Ok(Reserved {
            pod: self,
            id: id.clone(),
        })
    }

    pub(super) fn reserve_exec(&self, which: &ProcessId) -> Result<ReservedExec<'_>, Error> {
        let Some(exec) = &which.exec else {
            return Err(Error::Invalid {
                message: "an exec needs a name".to_owned(),
            });
        };
        let mut containers = self.containers();
        let Some(Slot::Made(container)) = containers.get_mut(&which.container) else {
            return Err(Error::no_container());
        };
        match container.first.status() {
            Status::Stopped(_) => {
                return Err(Error::state("cannot exec in a stopped container"));
            }
            Status::Paused => {
                return Err(Error::state(
                    "cannot exec in a paused container (use --ignore-paused to override)",
                ));
            }
            Status::Created | Status::Running => {}
        }
        if container.execs.contains_key(exec) {
            return Err(Error::Exists { what: "exec" });
        }
        container.execs.insert(exec.clone(), ExecSlot::Reserved);
        Ok(ReservedExec {
            pod: self,
            which: which.clone(),
        })
    }

    pub(super) fn containers(&self) -> MutexGuard<'_, HashMap<ContainerId, Slot>> {
        lock(&self.containers)
    }
}

/// The names of all.
pub(super) fn names(entries: &Entries) -> Vec<ContainerId> {
    lock(entries).keys().cloned().collect()
}

fn lock(entries: &Entries) -> MutexGuard<'_, HashMap<ContainerId, Slot>> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}
