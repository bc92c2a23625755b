//! The containers of this guest and what is done with them.

mod one;
mod process;
mod stdio;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sched::CloneFlags;
use one::{Container, Inside};
pub use one::{LifeState, State};
use process::Process;
pub use process::Started;
pub use stdio::StreamIds;

use crate::{
    cgroup::{self, Cgroup, Stats},
    devices::Guard,
    events::Events,
    id::{ContainerId, ExecId},
    launch::{
        self, FailureKind, Join, Launch, NamespaceError, Namespaces, NewContainer, Place, Running,
    },
    log,
    mappings::Mappings,
    pod::Pod,
    processes::{self, Details},
    reaper::{Exit, Reaper},
    rootfs::{self, Granted, Scratch, Users},
    seccomp,
    spec::{self, Spec},
    stream::{self, Streams},
    sys,
};

pub(crate) use crate::rootfs::{Layer, Layers, Source, Upper};

/// Why a request about a container failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No container has the id.
    #[error("there is no container {0}")]
    NoContainer(ContainerId),
    /// No exec of the container has the id.
    #[error("container {container} has no exec {exec}")]
    NoExec {
        /// The container.
        container: ContainerId,
        /// The exec.
        exec: ExecId,
    },
    /// A container has the id already.
    #[error("the container id {0} is in use; delete that container or choose another id")]
    ContainerExists(ContainerId),
    /// An exec of the container has the id already.
    #[error("the exec id {exec} is in use in container {container}; choose another")]
    ExecExists {
        /// The container.
        container: ContainerId,
        /// The exec.
        exec: ExecId,
    },
    /// More containers or execs than anyone needs.
    #[error("there are {0} of them already, which is the most; delete some")]
    TooMany(usize),
    /// Only a running process can do it.
    #[error("the process has ended with status {0}")]
    Ended(u32),
    /// Only a process that was not started can be.
    #[error("the process was started before")]
    StartedBefore,
    /// It must be stopped first.
    #[error("the process is running; stop it first or delete by force")]
    Running,
    /// It must be started first.
    #[error("container {0} is not running")]
    NotRunning(ContainerId),
    /// Nothing starts in a frozen container.
    #[error("container {0} is paused; resume it first")]
    Paused(ContainerId),
    /// There is nowhere to execute anything.
    #[error("container {0} is the pod's placeholder and has no root to execute a program in")]
    Placeholder(ContainerId),
    /// An update that changes rules about devices.
    #[error(
        "linux.resources.devices differs from the container's and cannot be changed; leave it out"
    )]
    DeviceRules,
    /// The pod.
    #[error(transparent)]
    Pod(#[from] launch::PodError),
    /// No such signal.
    #[error("{0} is no signal; signals are 1 to 64")]
    Signal(u32),
    /// It has no terminal.
    #[error("the process has no terminal")]
    NoTerminal,
    /// A size that no terminal has.
    #[error("a terminal of {width} by {height} is too large; each is at most 65535")]
    TerminalSize {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// The configuration.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// The configuration's namespaces.
    #[error(transparent)]
    Namespaces(#[from] launch::NamespaceError),
    /// The configuration's filter of system calls.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
    /// The configuration, found on the way to the process.
    #[error(transparent)]
    Launch(#[from] launch::Error),
    /// The file tree.
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// A stream.
    #[error(transparent)]
    Stream(#[from] stream::Error),
    /// The program is not there.
    #[error("{0}")]
    ProgramMissing(String),
    /// The program cannot be run.
    #[error("{0}")]
    ProgramRefused(String),
    /// The process could not be prepared.
    #[error("{0}")]
    Process(String),
    /// A system call of the agent's.
    #[error("cannot {doing}")]
    Step {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn doing(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Step { doing, source }
}

/// The most containers at a time, and the most execs of one.
const MOST: usize = 1024;

/// What a container is made from.
pub(crate) struct Create {
    /// Its name.
    pub(crate) id: ContainerId,
    /// Its bundle's path on the host.
    pub(crate) bundle: String,
    /// Its configuration.
    pub(crate) spec: Spec,
    /// Its first process, unless it is a placeholder.
    pub(crate) first: Option<First>,
}

/// What a container's first process is made from besides the configuration.
pub(crate) struct First {
    /// Where the root comes from.
    pub(crate) source: Source,
    /// Its streams.
    pub(crate) streams: StreamIds,
}

/// All containers of the guest.
#[derive(Debug)]
pub struct Containers {
    all: Mutex<BTreeMap<ContainerId, Arc<Container>>>,
    /// Ids of containers that are being made.
    reserved: Mutex<BTreeSet<ContainerId>>,
    streams: Arc<Streams>,
    reaper: Arc<Reaper>,
    scratch: Scratch,
    /// What they share.
    pub pod: Pod,
    /// What the host learns unasked.
    pub events: Arc<Events>,
}

impl Containers {
    /// None yet. `directory`, of a tmpfs, is where roots are put together.
    ///
    /// # Errors
    /// When nothing can be made in `directory`.
    pub fn new(streams: Arc<Streams>, reaper: Arc<Reaper>, directory: &Path) -> io::Result<Self> {
        Ok(Self {
            all: Mutex::default(),
            reserved: Mutex::default(),
            streams,
            pod: Pod::new(reaper.clone()),
            reaper,
            scratch: Scratch::make(directory)?,
            events: Arc::default(),
        })
    }

    /// Makes a container whose first process waits for its start; answers its id.
    pub(crate) async fn create(&self, create: Create) -> Result<u32, Error> {
        let reservation = self.reserve(&create.id)?;
        let container = match &create.first {
            Some(first) => self.make(&create, first).await?,
            None => self.make_placeholder(&create)?,
        };
        let pid = container.first.pid();
        lock(&self.all).insert(create.id, container);
        drop(reservation);
        Ok(pid)
    }

    fn make_placeholder(&self, create: &Create) -> Result<Arc<Container>, Error> {
        let linux = &create.spec.linux;
        let inside = Inside {
            seccomp: None,
            // For the containers that join the user namespace it stands for.
            mappings: Mappings::new(&linux.uid_mappings, &linux.gid_mappings),
            kinds: CloneFlags::empty(),
        };
        let cgroup = new_cgroup(create)?;
        self.pod.configure(&create.spec)?;
        let first = Process::placeholder();
        Ok(Container::new(create, first, inside, cgroup, &self.events))
    }

    async fn make(&self, create: &Create, first: &First) -> Result<Arc<Container>, Error> {
        let linux = &create.spec.linux;
        check_hooks(&create.spec)?;
        let namespaces = Namespaces::parse(linux, |namespace| self.find_namespace(namespace))?;
        let seccomp = linux
            .seccomp
            .as_ref()
            .map(seccomp::Filter::compile)
            .transpose()?;
        self.pod
            .provide_shm(&create.spec)
            .map_err(doing("make the pod's /dev/shm"))?;
        let cgroup = new_cgroup(create)?;
        let made = self
            .make_first(create, first, &namespaces, seccomp.as_ref(), &cgroup)
            .await;
        match made {
            Ok(first) => {
                let inside = Inside {
                    seccomp,
                    mappings: namespaces.mappings().cloned(),
                    kinds: namespaces.of_further_processes(),
                };
                Ok(Container::new(create, first, inside, cgroup, &self.events))
            }
            Err(error) => {
                if let Err(error) = cgroup.remove().await {
                    log!("after a container that could not be made: {error}");
                }
                Err(error)
            }
        }
    }

    /// A namespace that is shared with the pod or another container.
    fn find_namespace(&self, namespace: protocol::Namespace<'_>) -> Result<Join, NamespaceError> {
        let opened = |opened: io::Result<std::os::fd::OwnedFd>| {
            opened
                .map(Join::Other)
                .map_err(|source| NamespaceError::Open {
                    path: namespace.to_string(),
                    source,
                })
        };
        let pods = |kind: &str| match kind {
            "network" | "ipc" | "uts" => Ok(Join::Guests),
            "pid" => opened(self.pod.pid_namespace()),
            _ => Err(NamespaceError::NotOfKind {
                path: namespace.to_string(),
                kind: kind.to_owned(),
            }),
        };
        let (id, kind) = match namespace {
            protocol::Namespace::Pod(kind) => return pods(kind),
            protocol::Namespace::Container { id, kind } => (id, kind),
        };
        let gone = || NamespaceError::NoContainer(id.to_owned());
        let container = ContainerId::parse(id)
            .ok()
            .and_then(|id| self.get(&id).ok())
            .filter(|container| container.first.is_running())
            .ok_or_else(gone)?;
        let file = match (container.first.pid(), kind) {
            (0, "user") => {
                let users = container.mappings.clone().ok_or_else(gone)?;
                let made = container
                    .users(&users)
                    .map_err(|source| NamespaceError::Open {
                        path: namespace.to_string(),
                        source,
                    })?;
                return Ok(Join::Users(made, users));
            }
            (0, kind) => return pods(kind),
            (_, "network") => "net",
            // Its own are what it has when it executes its program.
            (_, "time") => "time_for_children",
            (_, "pid" | "ipc" | "uts" | "user" | "cgroup") => kind,
            _ => {
                return Err(NamespaceError::NotOfKind {
                    path: namespace.to_string(),
                    kind: kind.to_owned(),
                });
            }
        };
        // The id is its for as long as nobody has collected its end, which nobody does meanwhile.
        let path = format!("/proc/{}/ns/{file}", container.first.pid());
        match opened(File::open(path).map(Into::into))? {
            Join::Other(fd) if kind == "user" => {
                let users = container.mappings.clone().ok_or_else(gone)?;
                Ok(Join::Users(fd, users))
            }
            join => Ok(join),
        }
    }

    async fn make_first(
        &self,
        create: &Create,
        first: &First,
        namespaces: &Namespaces,
        seccomp: Option<&seccomp::Filter>,
        cgroup: &Cgroup,
    ) -> Result<Process, Error> {
        let spec = &create.spec;
        let linux = &spec.linux;
        let process = spec
            .process
            .as_ref()
            .ok_or(spec::Error::Missing("process"))?;
        let owner = owner(process, namespaces.mappings())?;
        let users = namespaces.mappings().map(|ids| Users {
            ids,
            shared: namespaces.guests(),
        });
        let granted = Granted::take(spec, &first.source, &self.scratch, users.as_ref())?;
        let stdio = stdio::open(&self.streams, &first.streams, process.terminal, owner).await?;
        let launch = Launch {
            place: Place::New(NewContainer {
                id: create.id.as_str(),
                bundle: &create.bundle,
                spec,
                source: &first.source,
                scratch: &self.scratch,
                granted: &granted,
                cgroup: cgroup.path(),
                namespaces,
            }),
            process,
            domain: launch::domain(linux)?,
            seccomp,
            cgroup: cgroup.fd(),
            stdio: stdio.childs(),
        };
        let child = launch::launch(&launch)?;
        let exit = self.reaper.watch(child.pid);
        let first = Process::prepared(child, exit, stdio).await?;
        if Guard::of(spec) == Guard::Program {
            // Not before: to mount a root from a block device is a use of the device.
            cgroup.restrict_devices(&linux.resources.devices)?;
        }
        if !namespaces.makes(CloneFlags::CLONE_NEWPID) {
            first.take_along(cgroup.killer());
        }
        Ok(first)
    }

    /// Makes a further process in a container, which waits for its start; answers its id.
    pub(crate) async fn exec(
        &self,
        id: &ContainerId,
        exec: ExecId,
        process: &spec::Process,
        streams: &StreamIds,
    ) -> Result<u32, Error> {
        let container = self.get(id)?;
        container.check_free(id, &exec)?;
        if !container.first.is_running() {
            return Err(Error::NotRunning(id.clone()));
        }
        container.check_not_frozen(id)?;
        let first = container
            .first
            .pidfd()
            .ok_or_else(|| Error::Placeholder(id.clone()))?;
        container.guard_devices(process)?;
        let owner = owner(process, container.mappings.as_ref())?;
        let stdio = stdio::open(&self.streams, streams, process.terminal, owner).await?;
        let launch = Launch {
            place: Place::Inside(Running {
                first,
                kinds: container.kinds,
            }),
            process,
            domain: container.domain,
            seccomp: container.seccomp.as_ref(),
            cgroup: container.cgroup.fd(),
            stdio: stdio.childs(),
        };
        let child = launch::launch(&launch)?;
        let exit = self.reaper.watch(child.pid);
        let prepared = Process::prepared(child, exit, stdio).await?;
        let pid = prepared.pid();
        // Another request may have taken the name meanwhile.
        container.check_free(id, &exec)?;
        lock(&container.execs).insert(exec, Arc::new(prepared));
        Ok(pid)
    }

    /// Executes the program of a process that waits for it.
    pub(crate) async fn start(
        &self,
        id: &ContainerId,
        exec: Option<&ExecId>,
    ) -> Result<Started, Error> {
        let container = self.get(id)?;
        let process = container.process(id, exec)?;
        container.check_not_frozen(id)?;
        process.start().await
    }

    /// Sends a signal to one process.
    pub(crate) fn signal(
        &self,
        id: &ContainerId,
        exec: Option<&ExecId>,
        signal: u32,
    ) -> Result<(), Error> {
        let process = self.process(id, exec)?;
        process.signal(signal_number(signal)?)?;
        self.end_pod_with(&process);
        Ok(())
    }

    /// The end of the pod's placeholder ends what it stands for.
    fn end_pod_with(&self, process: &Process) {
        if process.pid() == 0 && !process.is_running() {
            self.pod.end();
        }
    }

    /// Sends a signal to every process of a container.
    pub(crate) fn signal_all(&self, id: &ContainerId, signal: u32) -> Result<(), Error> {
        let signal = signal_number(signal)?;
        let container = self.get(id)?;
        if container.first.pid() == 0 || !container.first.was_started() {
            // It has no other process.
            container.first.signal(signal)?;
            self.end_pod_with(&container.first);
            return Ok(());
        }
        if signal == libc::SIGKILL {
            return Ok(container.cgroup.kill()?);
        }
        for pid in container.cgroup.processes(MOST_LISTED) {
            // It may have ended since it was listed.
            let _ = sys::kill(pid, signal);
        }
        Ok(())
    }

    /// Waits for the end of a process; says also whether the container ran out of memory.
    pub(crate) async fn wait(
        &self,
        id: &ContainerId,
        exec: Option<&ExecId>,
    ) -> Result<(Exit, bool), Error> {
        let container = self.get(id)?;
        let exit = container.process(id, exec)?.wait().await;
        // The event comes before the end that it caused.
        Ok((exit, container.note_oom_kills(&self.events) > 0))
    }

    /// Where a process is in its life.
    pub(crate) fn state(&self, id: &ContainerId, exec: Option<&ExecId>) -> Result<State, Error> {
        let container = self.get(id)?;
        let process = container.process(id, exec)?;
        Ok(container.state(&process))
    }

    /// Sets the size of a process's terminal.
    pub(crate) fn resize(
        &self,
        id: &ContainerId,
        exec: Option<&ExecId>,
        width: u32,
        height: u32,
    ) -> Result<(), Error> {
        match (u16::try_from(width), u16::try_from(height)) {
            (Ok(columns), Ok(rows)) => self.process(id, exec)?.resize(columns, rows),
            _ => Err(Error::TerminalSize { width, height }),
        }
    }

    /// Closes a process's standard input behind what was sent.
    pub(crate) fn close_stdin(&self, id: &ContainerId, exec: Option<&ExecId>) -> Result<(), Error> {
        self.process(id, exec)?.close_stdin();
        Ok(())
    }

    /// Removes a container that has stopped or was never started, or, by force, any.
    pub(crate) async fn delete(&self, id: &ContainerId, force: bool) -> Result<(), Error> {
        let container = self.get(id)?;
        if container.first.is_running() && container.first.was_started() && !force {
            return Err(Error::Running);
        }
        if container.first.pid() == 0 {
            // It may have ended already.
            let _ = container.first.signal(libc::SIGKILL);
            self.end_pod_with(&container.first);
        }
        container.cgroup.remove().await?;
        let mut all = lock(&self.all);
        // Another request may have been first, and the name another container's since.
        if all
            .get(id)
            .is_some_and(|found| Arc::ptr_eq(found, &container))
        {
            all.remove(id);
        }
        Ok(())
    }

    /// Removes an exec, likewise.
    pub(crate) async fn delete_exec(
        &self,
        id: &ContainerId,
        exec: &ExecId,
        force: bool,
    ) -> Result<(), Error> {
        let container = self.get(id)?;
        let process = container.process(id, Some(exec))?;
        if process.is_running() {
            if process.was_started() && !force {
                return Err(Error::Running);
            }
            // It may have ended just now.
            let _ = process.signal(libc::SIGKILL);
            process.wait().await;
        }
        lock(&container.execs).remove(exec);
        Ok(())
    }

    /// Reads a container's counters.
    pub(crate) fn stats(&self, id: &ContainerId) -> Result<Stats, Error> {
        Ok(self.get(id)?.cgroup.stats())
    }

    /// Sets a container's limits anew.
    pub(crate) fn update(
        &self,
        id: &ContainerId,
        resources: &spec::Resources,
    ) -> Result<(), Error> {
        self.get(id)?.update(resources)
    }

    /// Lists a container's processes.
    pub(crate) fn processes(&self, id: &ContainerId) -> Result<Vec<u32>, Error> {
        Ok(self.get(id)?.cgroup.processes(MOST_LISTED))
    }

    /// What is known of processes that [`Self::processes`] listed.
    pub(crate) fn details(pids: &[u32]) -> Vec<Details> {
        processes::details(pids)
    }

    /// Freezes or thaws a container.
    pub(crate) async fn pause(&self, id: &ContainerId, paused: bool) -> Result<(), Error> {
        Ok(self.get(id)?.cgroup.freeze(paused).await?)
    }

    /// Ends all containers; what fails is logged.
    pub(crate) async fn end_all(&self) {
        let all: Vec<_> = lock(&self.all).values().cloned().collect();
        for container in &all {
            if let Err(error) = container.cgroup.kill() {
                log!("cannot end a container: {error}");
            }
        }
        for container in all.iter().filter(|container| container.first.pid() != 0) {
            container.first.wait().await;
        }
    }

    fn get(&self, id: &ContainerId) -> Result<Arc<Container>, Error> {
        let found = lock(&self.all).get(id).cloned();
        found.ok_or_else(|| Error::NoContainer(id.clone()))
    }

    fn process(&self, id: &ContainerId, exec: Option<&ExecId>) -> Result<Arc<Process>, Error> {
        self.get(id)?.process(id, exec)
    }

    fn reserve(&self, id: &ContainerId) -> Result<Reservation<'_>, Error> {
        let all = lock(&self.all);
        let mut reserved = lock(&self.reserved);
        if all.len() + reserved.len() >= MOST {
            return Err(Error::TooMany(MOST));
        }
        if all.contains_key(id) || !reserved.insert(id.clone()) {
            return Err(Error::ContainerExists(id.clone()));
        }
        Ok(Reservation {
            of: self,
            id: id.clone(),
        })
    }
}

/// The most processes that are listed.
pub(crate) const MOST_LISTED: usize = 32_768;

/// An id that nobody else can take while its container is being made.
struct Reservation<'a> {
    of: &'a Containers,
    id: ContainerId,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        lock(&self.of.reserved).remove(&self.id);
    }
}

/// The programs of these hooks are the guest's, which has none but those that the host shares.
fn check_hooks(spec: &Spec) -> Result<(), Error> {
    let missing = spec
        .hooks
        .create_container
        .iter()
        .position(|hook| !Path::new(&hook.path).is_file());
    match missing {
        Some(place) => Err(Error::Spec(spec::Error::Unsupported {
            field: format!("hooks.createContainer[{place}].path"),
            reason: "the program is not in the guest, where it would run; use hooks.startContainer, whose programs are the container's, or hooks.createRuntime, which the host runs",
        })),
        None => Ok(()),
    }
}

fn new_cgroup(create: &Create) -> Result<Cgroup, Error> {
    let linux = &create.spec.linux;
    Ok(Cgroup::create(
        linux.cgroups_path.as_deref(),
        create.id.as_str(),
        &linux.resources,
    )?)
}

/// The guest's id of the user that `process` runs as.
fn owner(process: &spec::Process, mappings: Option<&Mappings>) -> Result<u32, Error> {
    let uid = process.user.uid;
    mappings
        .map_or(Some(uid), |mappings| mappings.user(uid))
        .ok_or_else(|| {
            Error::Spec(spec::Error::Value {
                field: "process.user.uid".into(),
                value: uid.to_string(),
                reason: "linux.uidMappings does not map it",
            })
        })
}

fn signal_number(signal: u32) -> Result<i32, Error> {
    match i32::try_from(signal) {
        Ok(number @ 1..=64) => Ok(number),
        _ => Err(Error::Signal(signal)),
    }
}

/// What a child reported instead of being ready or executed.
fn failure(kind: FailureKind, text: String) -> Error {
    match kind {
        FailureKind::ProgramMissing => Error::ProgramMissing(text),
        FailureKind::ProgramRefused => Error::ProgramRefused(text),
        FailureKind::Other => Error::Process(text),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
