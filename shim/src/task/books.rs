//! What containerd's clients said of containers and execs, kept to be told again: the pod itself
//! has no use for it.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::OwnedMutexGuard;

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
    /// Nothing while it is being made.
    kept: Option<Kept>,
    /// Held by whoever makes or removes it.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Whether somebody removes it, or waits for that.
    leaves: bool,
}

/// The right to make or to remove a process, which one at a time has. Whatever is entered under the
/// process's name later is another's.
#[derive(Debug)]
pub(super) struct Turn {
    which: ProcessId,
    guard: OwnedMutexGuard<()>,
}

/// What is told of a process.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Entry {
    pub(super) bundle: String,
    pub(super) rootfs: Vec<events::Mount>,
    pub(super) names: Names,
}

impl Books {
    /// Enters a container that is being made, unless there is one of its name.
    pub(super) fn enter(&self, id: &ContainerId, entry: Entry) -> Result<Turn, Failure> {
        let mut containers = self.lock();
        if containers.contains_key(id) {
            let message = format!("container {id}: already exists");
            return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, message));
        }
        let (first, turn) = Streams::new(ProcessId::first(id.clone()), entry.names);
        let container = Container {
            bundle: entry.bundle,
            rootfs: entry.rootfs,
            first,
            execs: HashMap::new(),
        };
        containers.insert(id.clone(), container);
        Ok(turn)
    }

    /// Enters an exec of a container that is being made, unless there is one of its name.
    pub(super) fn enter_exec(
        &self,
        id: &ContainerId,
        exec: &ExecId,
        names: Names,
    ) -> Result<Turn, Failure> {
        let mut containers = self.lock();
        let container = containers.get_mut(id).ok_or_else(Failure::no_container)?;
        if container.execs.contains_key(exec) {
            let message = format!("id {exec}: already exists");
            return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, message));
        }
        let which = ProcessId {
            container: id.clone(),
            exec: Some(exec.clone()),
        };
        let (streams, turn) = Streams::new(which, names);
        container.execs.insert(exec.clone(), streams);
        Ok(turn)
    }

    /// The right to remove a process, once nobody else has it: one that is being made is made first.
    pub(super) async fn turn(&self, which: &ProcessId) -> Result<Turn, Failure> {
        let turn = {
            let mut containers = self.lock();
            let streams = find(&mut containers, which)?;
            streams.leaves = true;
            streams.turn.clone()
        };
        let turn = Turn {
            which: which.clone(),
            guard: turn.lock_owned().await,
        };
        match turn.streams(&mut self.lock()) {
            Some(_) => Ok(turn),
            None => Err(absent(which)),
        }
    }

    /// Keeps what belongs to a process that was made until it is removed.
    pub(super) fn keep(&self, turn: &Turn, kept: Kept) {
        if let Some(streams) = turn.streams(&mut self.lock()) {
            streams.kept = Some(kept);
        }
    }

    /// Lets a process stay that cannot be removed.
    pub(super) fn stays(&self, turn: &Turn) {
        if let Some(streams) = turn.streams(&mut self.lock()) {
            streams.leaves = false;
        }
    }

    /// Lets go of the pipe of a process's input.
    pub(super) fn close_stdin(&self, which: &ProcessId) -> Result<(), Failure> {
        let mut containers = self.lock();
        if let Some(kept) = &mut find(&mut containers, which)?.kept {
            kept.stdin.close();
        }
        Ok(())
    }

    /// Opens the pipe of a process's input, which it needs from its start on.
    pub(super) fn open_stdin(&self, which: &ProcessId) -> Result<Option<OwnedFd>, Failure> {
        let mut containers = self.lock();
        match &mut find(&mut containers, which)?.kept {
            Some(kept) => Ok(kept.stdin.open()?),
            None => Ok(None),
        }
    }

    /// What is known of a process.
    pub(super) fn entry(&self, which: &ProcessId) -> Result<Entry, Failure> {
        let mut containers = self.lock();
        let names = find(&mut containers, which)?.names.clone();
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
    pub(super) fn strike(&self, turn: &Turn) -> Kept {
        let mut containers = self.lock();
        if turn.streams(&mut containers).is_none() {
            return Kept::default();
        }
        let ProcessId { container, exec } = &turn.which;
        let struck = match exec {
            None => containers
                .remove(container)
                .map(|container| container.first),
            Some(exec) => containers
                .get_mut(container)
                .and_then(|container| container.execs.remove(exec)),
        };
        struck.and_then(|streams| streams.kept).unwrap_or_default()
    }

    /// Whether there is no container but such as somebody removes.
    pub(super) fn is_idle(&self) -> bool {
        let containers = self.lock();
        containers.values().all(|container| container.first.leaves)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ContainerId, Container>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Streams {
    /// Those of a process that is being made.
    fn new(which: ProcessId, names: Names) -> (Self, Turn) {
        let streams = Self {
            names,
            ..Self::default()
        };
        let guard = streams.turn.clone().try_lock_owned();
        let guard = guard.expect("nobody else knows it");
        (streams, Turn { which, guard })
    }
}

impl Turn {
    /// The entry that it is the right to, if that was not struck.
    fn streams<'a>(
        &self,
        containers: &'a mut HashMap<ContainerId, Container>,
    ) -> Option<&'a mut Streams> {
        let streams = find(containers, &self.which).ok()?;
        Arc::ptr_eq(&streams.turn, OwnedMutexGuard::mutex(&self.guard)).then_some(streams)
    }
}

fn find<'a>(
    containers: &'a mut HashMap<ContainerId, Container>,
    which: &ProcessId,
) -> Result<&'a mut Streams, Failure> {
    let container = containers
        .get_mut(&which.container)
        .ok_or_else(Failure::no_container)?;
    match &which.exec {
        None => Ok(&mut container.first),
        Some(exec) => container.execs.get_mut(exec).ok_or_else(|| absent(which)),
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
    use std::time::Duration;

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
        let _made = books.enter(&id("web"), entry).expect("entered");
        let names = Names {
            stdout: "/run/out".to_owned(),
            ..Names::default()
        };
        let made = books.enter_exec(&id("web"), &id("e1"), names);
        books.keep(&made.expect("entered"), Kept::default());
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

    #[tokio::test]
    async fn what_is_struck_is_gone_with_its_execs() {
        let books = books();
        let absent = |which| books.entry(&which).expect_err("absent").to_string();
        assert_eq!(absent(exec("e2")), "process does not exist e2: not found");
        let first = ProcessId::first(id("web"));
        books.strike(&books.turn(&first).await.expect("there"));
        assert!(books.is_idle());
        assert_eq!(absent(exec("e1")), "container not created: not found");
    }

    #[tokio::test]
    async fn who_waits_for_a_removal_does_not_remove_the_next_of_that_name() {
        let books = books();
        let first = ProcessId::first(id("web"));
        let turn = books.turn(&first).await.expect("there");
        let second = books.turn(&first);
        tokio::pin!(second);
        assert!(
            tokio::time::timeout(Duration::ZERO, &mut second)
                .await
                .is_err()
        );
        books.strike(&turn);
        drop(turn);
        let next = books.enter(&id("web"), Entry::default()).expect("entered");
        assert!(second.await.is_err());
        assert!(books.entry(&first).is_ok());
        // Nor does one whose own entry was struck strike that one.
        let late = books.enter_exec(&id("web"), &id("e1"), Names::default());
        let late = late.expect("entered");
        books.strike(&next);
        let _next = books.enter(&id("web"), Entry::default());
        let again = books.enter_exec(&id("web"), &id("e1"), Names::default());
        again.expect("entered");
        books.strike(&late);
        assert!(books.entry(&exec("e1")).is_ok());
    }

    #[tokio::test]
    async fn one_that_is_being_made_counts_no_more_when_it_is_to_be_removed() {
        let books = Books::default();
        let making = books.enter(&id("web"), Entry::default()).expect("entered");
        assert!(!books.is_idle());
        let first = ProcessId::first(id("web"));
        let removing = books.turn(&first);
        tokio::pin!(removing);
        assert!(
            tokio::time::timeout(Duration::ZERO, &mut removing)
                .await
                .is_err()
        );
        assert!(books.is_idle());
        books.keep(&making, Kept::default());
        drop(making);
        let removing = removing.await.expect("made");
        assert!(books.is_idle());
        books.stays(&removing);
        assert!(!books.is_idle());
    }
}
