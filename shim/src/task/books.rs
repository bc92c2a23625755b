//! What containerd's clients said of containers and execs, kept to be told again: the pod itself
//! has no use for it.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    failure::Failure,
    proto::events,
    stdio::{Kept, Names},
};
use crate::{
    id::ContainerId,
    pod::{ExecId, ProcessId},
};

/// The containers of a pod.
#[derive(Debug, Default)]
pub(super) struct Books(Mutex<HashMap<ContainerId, Container>>);

#[derive(Debug)]
struct Container {
    bundle: String,
    rootfs: Vec<events::Mount>,
    first: Streams,
    execs: HashMap<ExecId, Streams>,
}

#[derive(Debug, Default)]
struct Streams {
    names: Names,
    kept: Kept,
}

/// What is told of a process.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Entry {
    pub(super) bundle: String,
    pub(super) rootfs: Vec<events::Mount>,
    pub(super) names: Names,
}

impl Books {
    /// Enters a container, unless there is one of its name.
    pub(super) fn enter(&self, id: &ContainerId, entry: Entry) -> Result<(), Failure> {
        let mut containers = self.lock();
        if containers.contains_key(id) {
            let message = format!("container {id}: already exists");
            return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, message));
        }
        let container = Container {
            bundle: entry.bundle,
            rootfs: entry.rootfs,
            first: Streams {
                names: entry.names,
                kept: Kept::default(),
            },
            execs: HashMap::new(),
        };
        containers.insert(id.clone(), container);
        Ok(())
    }

    /// Enters an exec of a container, unless there is one of its name.
    pub(super) fn enter_exec(
        &self,
        container: &ContainerId,
        exec: &ExecId,
        names: Names,
    ) -> Result<(), Failure> {
        let mut containers = self.lock();
        let container = containers
            .get_mut(container)
            .ok_or_else(Failure::no_container)?;
        if container.execs.contains_key(exec) {
            let message = format!("id {exec}: already exists");
            return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, message));
        }
        let streams = Streams {
            names,
            kept: Kept::default(),
        };
        container.execs.insert(exec.clone(), streams);
        Ok(())
    }

    /// Keeps what belongs to a process until it is removed.
    pub(super) fn keep(&self, which: &ProcessId, kept: Kept) {
        if let Some(streams) = streams(&mut self.lock(), which) {
            streams.kept = kept;
        }
    }

    /// Lets go of the pipe of a process's input.
    pub(super) fn close_stdin(&self, which: &ProcessId) -> Result<(), Failure> {
        let mut containers = self.lock();
        let streams = streams(&mut containers, which).ok_or_else(|| absent(which))?;
        streams.kept.stdin.close();
        Ok(())
    }

    /// Opens the pipe of a process's input, which it needs from its start on.
    pub(super) fn open_stdin(&self, which: &ProcessId) -> Result<Option<OwnedFd>, Failure> {
        let mut containers = self.lock();
        let streams = streams(&mut containers, which).ok_or_else(|| absent(which))?;
        Ok(streams.kept.stdin.open()?)
    }

    /// What is known of a process.
    pub(super) fn entry(&self, which: &ProcessId) -> Result<Entry, Failure> {
        let mut containers = self.lock();
        if !containers.contains_key(&which.container) {
            return Err(Failure::no_container());
        }
        let streams = streams(&mut containers, which).ok_or_else(|| absent(which))?;
        let names = streams.names.clone();
        let container = containers
            .get(&which.container)
            .ok_or_else(Failure::no_container)?;
        Ok(Entry {
            bundle: container.bundle.clone(),
            rootfs: container.rootfs.clone(),
            names,
        })
    }

    /// The execs of a container.
    pub(super) fn execs(&self, container: &ContainerId) -> Vec<ExecId> {
        let containers = self.lock();
        let container = containers.get(container);
        container.map_or(Vec::new(), |container| {
            container.execs.keys().cloned().collect()
        })
    }

    /// Takes a process out and returns what was kept for it.
    pub(super) fn strike(&self, which: &ProcessId) -> Kept {
        let mut containers = self.lock();
        let struck = match &which.exec {
            None => containers
                .remove(&which.container)
                .map(|container| container.first),
            Some(exec) => containers
                .get_mut(&which.container)
                .and_then(|container| container.execs.remove(exec)),
        };
        struck.unwrap_or_default().kept
    }

    /// Whether there is no container.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ContainerId, Container>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn streams<'a>(
    containers: &'a mut HashMap<ContainerId, Container>,
    which: &ProcessId,
) -> Option<&'a mut Streams> {
    let container = containers.get_mut(&which.container)?;
    match &which.exec {
        None => Some(&mut container.first),
        Some(exec) => container.execs.get_mut(exec),
    }
}

fn absent(which: &ProcessId) -> Failure {
    match &which.exec {
        Some(exec) => Failure::no_exec(exec.as_str()),
        None => Failure::no_container(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> ContainerId {
        ContainerId::parse(name).expect("a name")
    }

    fn exec(name: &str) -> ProcessId {
        ProcessId {
            container: id("web"),
            exec: Some(id(name)),
        }
    }

    fn books() -> Books {
        let books = Books::default();
        let entry = Entry {
            bundle: "/b".to_owned(),
            ..Entry::default()
        };
        books.enter(&id("web"), entry).expect("entered");
        let names = Names {
            stdout: "/run/out".to_owned(),
            ..Names::default()
        };
        books
            .enter_exec(&id("web"), &id("e1"), names)
            .expect("entered");
        books
    }

    #[test]
    fn a_name_is_entered_once() {
        let books = books();
        let again = books.enter(&id("web"), Entry::default());
        assert_eq!(
            again.expect_err("refused").to_string(),
            "container web: already exists"
        );
        let again = books.enter_exec(&id("web"), &id("e1"), Names::default());
        assert_eq!(
            again.expect_err("refused").to_string(),
            "id e1: already exists"
        );
    }

    #[test]
    fn an_exec_is_told_with_its_own_streams_and_its_containers_bundle() {
        let entry = books().entry(&exec("e1")).expect("there");
        assert_eq!(entry.bundle, "/b");
        assert_eq!(entry.names.stdout, "/run/out");
    }

    #[test]
    fn what_is_struck_is_gone_with_its_execs() {
        let books = books();
        let absent = |which| books.entry(&which).expect_err("absent").to_string();
        assert_eq!(absent(exec("e2")), "process does not exist e2: not found");
        books.strike(&ProcessId::first(id("web")));
        assert!(books.is_empty());
        assert_eq!(absent(exec("e1")), "container not created: not found");
    }
}
