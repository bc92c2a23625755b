//! A pod: a sandbox with its containers, owned by one process.
//!
//! It is what the faces of Bulkhead have in common: the OCI commands reach it
//! by the control socket, containerd by its Task service. Everything it says of
//! a process it says from its own knowledge; the guest is asked for what only
//! the guest knows, with a deadline.
//!
//! ```text
//!   Pod::start ─► Sandbox (machine, shared tree, state directory)
//!   Pod::create ─► Place (root file system, volumes) ─► agent ─► Process: Created
//!   start_process · wait · kill · delete · exec · pause · update · stats …
//! ```

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use protocol::agent::{
    CloseStdinRequest, ConfigureGuestResponse, ContainerStatsRequest, ContainerStatsResponse,
    CreateContainerRequest, DeleteContainerRequest, ExecProcessRequest, ListProcessesRequest,
    ListProcessesResponse, NextEventsRequest, PauseContainerRequest, ResizeTerminalRequest,
    SignalProcessRequest, StartProcessRequest, UpdateContainerRequest,
};
use serde_json::{Map, Value};
use tokio::{
    sync::{OnceCell, broadcast},
    task::JoinSet,
};

mod error;
mod event;
mod process;
mod root;

pub use error::{Error, Kind};
pub use event::Event;
pub use process::{Ending, ExecId, Exit, Input, ProcessId, Status, Stdio};
pub use root::{Mount, Root, Upper};

use self::process::{Process, watch};
use crate::{
    bundle::{self, Bundle, Places, Source},
    cgroup::{CgroupPlan, HostCgroup},
    container::Wiring,
    hooks::{HostHooks, Moment},
    id::ContainerId,
    sandbox::{self, Place, Sandbox, Trace, no_limit},
};

/// What a pod is started from.
pub use crate::sandbox::Plan as PodPlan;

/// How long a SIGKILL may take to be taken by the agent, before the machine is ended instead.
const KILL: Duration = Duration::from_secs(10);

/// Events that are kept for a listener that is slow.
const EVENTS: usize = 1024;

/// SIGKILL.
const SIGKILL: i32 = 9;

/// A running pod. Dropping it ends the machine and removes what was made for it.
#[derive(Debug)]
pub struct Pod {
    sandbox: Arc<Sandbox>,
    configured: OnceCell<ConfigureGuestResponse>,
    /// The container whose hooks have run and whose cgroup was made before the machine.
    prepared: Option<ContainerId>,
    containers: Mutex<HashMap<ContainerId, Slot>>,
    events: broadcast::Sender<Event>,
    tasks: Mutex<JoinSet<()>>,
}

/// A container's entry.
#[derive(Debug)]
enum Slot {
    /// It is being made.
    Reserved,
    Made(Container),
}

/// A container.
#[derive(Debug)]
struct Container {
    first: Arc<Process>,
    execs: HashMap<ExecId, ExecSlot>,
    hooks: Arc<HostHooks>,
    cgroup: Option<HostCgroup>,
    /// Its files. Dropped last.
    _place: Place,
}

#[derive(Debug)]
enum ExecSlot {
    Reserved,
    Made(Arc<Process>),
}

/// A container to be made.
#[derive(Debug)]
pub struct NewContainer {
    /// Its name.
    pub id: ContainerId,
    /// Its configuration.
    pub bundle: Bundle,
    /// Where its root file system comes from.
    pub root: Root,
    /// Its first process's streams.
    pub stdio: Stdio,
    /// Columns and rows of its terminal.
    pub terminal_size: Option<(u16, u16)>,
    /// The host's process that stands for it; by default the VMM.
    pub pid: Option<u32>,
    /// Whether it only stands for the pod: then nothing of it runs in the guest.
    pub placeholder: bool,
}

/// What is known of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessState {
    /// Where it is in its life.
    pub status: Status,
    /// The host's process that stands for it.
    pub pid: u32,
    /// Whether it has a terminal.
    pub terminal: bool,
}

impl Pod {
    /// Boots the machine and waits until its agent answers.
    ///
    /// # Errors
    /// When a step fails; everything before it is undone.
    pub async fn start(plan: PodPlan, trace: &Trace) -> Result<Arc<Self>, Error> {
        let surroundings = &plan.surroundings;
        let prepared = surroundings.hooks.is_some() || surroundings.cgroup.is_some();
        let prepared = prepared.then(|| plan.id.clone());
        let sandbox = Sandbox::start(plan, trace).await?;
        Ok(Arc::new(Self {
            prepared,
            sandbox: Arc::new(sandbox),
            configured: OnceCell::new(),
            containers: Mutex::default(),
            events: broadcast::channel(EVENTS).0,
            tasks: Mutex::default(),
        }))
    }

    /// Sets the guest up, once. The first container does it by the way.
    ///
    /// # Errors
    /// When the agent refuses or the machine ends.
    pub async fn configure(&self) -> Result<&ConfigureGuestResponse, Error> {
        let configured = self.configured.get_or_try_init(|| async {
            let guest = self.sandbox.configure().await?;
            tracing::debug!(
                kernel = crate::text::printable(&guest.kernel_release, 80),
                agent = crate::text::printable(&guest.agent_version, 80),
                "the guest is ready"
            );
            self.spawn(oom_events(self.sandbox.clone(), self.events.clone()));
            Ok::<_, Error>(guest)
        });
        configured.await
    }

    /// Makes a container, up to the execution of its process.
    ///
    /// # Errors
    /// When the name is taken, something cannot be mounted, or the agent refuses.
    pub async fn create(&self, new: NewContainer) -> Result<(), Error> {
        self.create_in(new, None).await
    }

    /// As [`Pod::create`], in a cgroup of the host.
    ///
    /// # Errors
    /// As [`Pod::create`], or when a hook fails.
    pub async fn create_in(
        &self,
        new: NewContainer,
        cgroup: Option<CgroupPlan>,
    ) -> Result<(), Error> {
        let _span = self.sandbox.trace().span("container created");
        let reserved = self.reserve(&new.id)?;
        let pid = new.pid.unwrap_or(self.sandbox.vmm_pid());
        let hooks = HostHooks::new(&new.id, &new.bundle, pid);
        let mut own_cgroup = None;
        if self.prepared.as_ref() != Some(&new.id) {
            own_cgroup = self.sandbox.further_cgroup(cgroup, new.pid)?;
            hooks.run(Moment::Create).await?;
        }
        let mut place = self.sandbox.place()?;
        let places = put(&mut place, &new).await?;
        let terminal = new.bundle.terminal();
        let ending = new.stdio.ending;
        let wiring = match new.placeholder {
            true => Wiring::none(),
            false => new.stdio.wire(terminal).map_err(Error::Streams)?,
        };
        let spec = new.bundle.for_guest(&places, new.terminal_size);
        let mut request = CreateContainerRequest {
            container_id: new.id.to_string(),
            spec: spec.to_json(),
            placeholder: new.placeholder,
            ..Default::default()
        };
        if !new.placeholder {
            request.root = Some(new.root.for_guest(places.root)).into();
            request.streams = Some(wiring.names()).into();
        }
        // The agent does one after the other, and waits for the streams that the request names:
        // all may be under way at once.
        let creation = async {
            let creation = self.sandbox.call("creating the container", async |agent| {
                agent.create_container(no_limit(), &request).await
            });
            creation.await.map_err(Error::unexecutable)
        };
        let opening = async { Ok(wiring.open(&self.sandbox).await?) };
        let (_, streams, _) = tokio::try_join!(self.configure(), opening, creation)?;
        let id = ProcessId::first(new.id.clone());
        let process = Process::new(id, pid, terminal, (streams, ending));
        reserved.keep(Container {
            first: process.clone(),
            execs: HashMap::new(),
            hooks: Arc::new(hooks),
            cgroup: own_cgroup,
            _place: place,
        });
        self.tell(Event::Create { container: new.id });
        self.attend(process);
        Ok(())
    }

    /// Makes a further process in a running container, up to its execution. `process` is the
    /// specification's `process` object.
    ///
    /// # Errors
    /// When the container does not run, the name is taken, or the agent refuses.
    pub async fn exec(
        &self,
        which: &ProcessId,
        mut process: Map<String, Value>,
        stdio: Stdio,
        pid: Option<u32>,
    ) -> Result<(), Error> {
        let reserved = self.reserve_exec(which)?;
        let terminal = process.get("terminal").and_then(Value::as_bool) == Some(true);
        // Known before its program asks: later changes come one by one.
        let size = if terminal { stdio.size() } else { None };
        bundle::process_for_guest(&mut process, size);
        let ending = stdio.ending;
        let wiring = stdio.wire(terminal).map_err(Error::Streams)?;
        let request = ExecProcessRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            process: Value::Object(process).to_string().into_bytes(),
            streams: Some(wiring.names()).into(),
            ..Default::default()
        };
        let creation = async {
            let creation = self.sandbox.call("making a process", async |agent| {
                agent.exec_process(no_limit(), &request).await
            });
            creation.await.map_err(Error::unexecutable)
        };
        let opening = async { Ok(wiring.open(&self.sandbox).await?) };
        let (streams, _) = tokio::try_join!(opening, creation)?;
        let pid = pid.unwrap_or(self.sandbox.vmm_pid());
        let process = Process::new(which.clone(), pid, terminal, (streams, ending));
        reserved.keep(process.clone())?;
        self.tell(Event::ExecAdded {
            process: which.clone(),
        });
        self.attend(process);
        Ok(())
    }

    /// Executes a process that was made.
    ///
    /// # Errors
    /// When it was started before, cannot be executed, or the machine ends.
    pub async fn start_process(&self, which: &ProcessId) -> Result<(), Error> {
        self.start_reading(which, None).await
    }

    /// As [`Pod::start_process`], with the input of one that was made with [`Input::AtStart`].
    ///
    /// # Errors
    /// As [`Pod::start_process`].
    pub async fn start_reading(
        &self,
        which: &ProcessId,
        input: Option<OwnedFd>,
    ) -> Result<(), Error> {
        let process = self.process(which)?;
        let _turn = process.starting.lock().await;
        match process.status() {
            Status::Created => {}
            Status::Running | Status::Paused => {
                return Err(Error::state("cannot start an already running container"));
            }
            Status::Stopped(_) => {
                return Err(Error::state("cannot start a container that has stopped"));
            }
        }
        let trace = self.sandbox.trace();
        let begin_ns = trace.now_ns();
        let request = StartProcessRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            ..Default::default()
        };
        process.relay(input).map_err(Error::Streams)?;
        let started = self.sandbox.call("starting the container", async |agent| {
            agent.start_process(no_limit(), &request).await
        });
        let started = started.await.map_err(Error::unexecutable)?;
        if which.exec.is_none() {
            let executed_ns = self.sandbox.guest_ns(started.boot_ns);
            let executed_ns = executed_ns.clamp(begin_ns, trace.now_ns());
            trace.add("process executed", begin_ns, executed_ns);
        }
        process.becomes(Status::Running);
        self.tell(match which.exec {
            None => Event::Start {
                container: which.container.clone(),
            },
            Some(_) => Event::ExecStarted {
                process: which.clone(),
            },
        });
        if let (None, Some(hooks)) = (&which.exec, self.hooks(&which.container))
            && let Err(error) = hooks.run(Moment::Started).await
        {
            // As the specification demands: it is an error, and the end of the container.
            self.kill(which, SIGKILL, true).await?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Waits for the end of a process and of its output. It may not have been started yet.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn wait(&self, which: &ProcessId) -> Result<Exit, Error> {
        let process = self.process(which)?;
        Ok(process.ended().await)
    }

    /// Sends a signal to a process, or to `all` processes of a container.
    ///
    /// # Errors
    /// When the process has ended, or the agent refuses.
    pub async fn kill(&self, which: &ProcessId, signal: i32, all: bool) -> Result<(), Error> {
        let process = self.process(which)?;
        if let Status::Stopped(_) = process.status() {
            return Err(Error::state("container not running"));
        }
        if process.draining.load(Ordering::Relaxed) {
            process.killed.notify_one();
            return Ok(());
        }
        let request = SignalProcessRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            signal: signal.unsigned_abs(),
            all,
            ..Default::default()
        };
        if signal != SIGKILL {
            let sent = self
                .sandbox
                .call("signalling the container", async |agent| {
                    agent.signal_process(no_limit(), &request).await
                });
            return Ok(sent.await.map(drop)?);
        }
        process.killed.notify_one();
        let sent = self
            .sandbox
            .call_within(KILL, "killing the container", async |agent| {
                agent.signal_process(no_limit(), &request).await
            });
        match sent.await {
            Ok(_) => Ok(()),
            // It has ended in the meantime.
            Err(sandbox::Error::Death { .. }) => Ok(()),
            Err(error @ sandbox::Error::Refused { .. }) => Err(error.into()),
            // Whatever is wrong with the guest, this ends it.
            Err(error) => {
                tracing::warn!(%error, "the guest does not take a SIGKILL: its machine is ended");
                self.sandbox.kill();
                Ok(())
            }
        }
    }

    /// Removes a container or exec that does not run; with `force` what still runs is killed.
    ///
    /// # Errors
    /// When it runs, or the agent refuses.
    pub async fn delete(&self, which: &ProcessId, force: bool) -> Result<Exit, Error> {
        let exit = self.stopped(which, force).await?;
        let request = DeleteContainerRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            force: true,
            ..Default::default()
        };
        let deleted = self.sandbox.call("removing the container", async |agent| {
            agent.delete_container(no_limit(), &request).await
        });
        if let Err(error) = deleted.await {
            // What is left of it in the guest goes with the guest.
            tracing::debug!(process = %which, %error, "the guest did not remove a process");
        }
        if let Ok(process) = self.process(which) {
            process.written().await;
        }
        self.remove(which, exit).await;
        Ok(exit)
    }

    /// Removes the last container together with the pod: the guest is not told, it is ended.
    ///
    /// # Errors
    /// When the container runs and is not to be killed.
    pub async fn delete_last(&self, container: &ContainerId, force: bool) -> Result<Exit, Error> {
        let which = ProcessId::first(container.clone());
        let exit = self.stopped(&which, force).await?;
        self.remove(&which, exit).await;
        self.shutdown().await;
        Ok(exit)
    }

    /// Whether no process of the pod is alive.
    pub fn is_idle(&self) -> bool {
        self.containers().values().all(|slot| match slot {
            Slot::Reserved => false,
            Slot::Made(container) => matches!(container.first.status(), Status::Stopped(_)),
        })
    }

    /// How the process ended; with `force` it is made to.
    async fn stopped(&self, which: &ProcessId, force: bool) -> Result<Exit, Error> {
        let process = self.process(which)?;
        match process.status() {
            Status::Stopped(exit) => Ok(exit),
            Status::Running | Status::Paused if !force => Err(Error::state(format!(
                "cannot delete container {} that is not stopped: {}",
                which.container,
                process.status().word()
            ))),
            _ => self.killed(which, &process).await,
        }
    }

    async fn remove(&self, which: &ProcessId, exit: Exit) {
        if let Ok(process) = self.process(which) {
            process.close();
        }
        let hooks = match which.exec {
            None => self.hooks(&which.container),
            Some(_) => None,
        };
        if !self.forget(which) {
            return;
        }
        self.tell(Event::Delete {
            process: which.clone(),
            exit,
        });
        if let Some(hooks) = hooks
            && let Err(error) = hooks.run(Moment::Stopped).await
        {
            // As the specification demands: it is told, and everything goes on.
            tracing::warn!(container = %which, error = crate::text::chain(&error), "a poststop hook failed");
        }
    }

    fn hooks(&self, container: &ContainerId) -> Option<Arc<HostHooks>> {
        match self.containers().get(container) {
            Some(Slot::Made(container)) => Some(container.hooks.clone()),
            _ => None,
        }
    }

    /// Freezes all processes of a container.
    ///
    /// # Errors
    /// When it does not run, or the agent refuses.
    pub async fn pause(&self, container: &ContainerId) -> Result<(), Error> {
        self.freeze(container, true).await
    }

    /// Thaws all processes of a container.
    ///
    /// # Errors
    /// When it is not frozen, or the agent refuses.
    pub async fn resume(&self, container: &ContainerId) -> Result<(), Error> {
        self.freeze(container, false).await
    }

    /// Sets limits of a container anew: `resources` is the specification's object as JSON.
    ///
    /// # Errors
    /// When it has ended, or the agent refuses.
    pub async fn update(&self, container: &ContainerId, resources: &Value) -> Result<(), Error> {
        self.alive(container)?;
        let request = UpdateContainerRequest {
            container_id: container.to_string(),
            resources: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let updated = self.sandbox.call("updating the container", async |agent| {
            agent.update_container(no_limit(), &request).await
        });
        updated.await?;
        match self.containers().get(container) {
            Some(Slot::Made(Container {
                cgroup: Some(cgroup),
                ..
            })) => cgroup.limit(resources),
            _ if self.prepared.as_ref() == Some(container) => self.sandbox.limit(resources),
            _ => {}
        }
        Ok(())
    }

    /// The counters of a container.
    ///
    /// # Errors
    /// When it has ended, or the agent refuses.
    pub async fn stats(&self, container: &ContainerId) -> Result<ContainerStatsResponse, Error> {
        self.alive(container)?;
        let request = ContainerStatsRequest {
            container_id: container.to_string(),
            ..Default::default()
        };
        let stats = self.sandbox.call("reading counters", async |agent| {
            agent.container_stats(no_limit(), &request).await
        });
        Ok(stats.await?)
    }

    /// The processes of a container, as the guest knows them.
    ///
    /// # Errors
    /// When it has ended, or the agent refuses.
    pub async fn processes(&self, container: &ContainerId) -> Result<ListProcessesResponse, Error> {
        self.alive(container)?;
        let request = ListProcessesRequest {
            container_id: container.to_string(),
            details: true,
            ..Default::default()
        };
        let processes = self.sandbox.call("listing processes", async |agent| {
            agent.list_processes(no_limit(), &request).await
        });
        Ok(processes.await?)
    }

    /// The host's processes that stand for a container and its execs which have not ended.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn pids(&self, container: &ContainerId) -> Result<Vec<u32>, Error> {
        let containers = self.containers();
        let Some(Slot::Made(container)) = containers.get(container) else {
            return Err(Error::no_container());
        };
        let execs = container.execs.values().filter_map(|exec| match exec {
            ExecSlot::Made(process) => Some(process),
            ExecSlot::Reserved => None,
        });
        let alive = std::iter::once(&container.first)
            .chain(execs)
            .filter(|process| !matches!(process.status(), Status::Stopped(_)));
        let mut pids: Vec<u32> = alive.map(|process| process.pid).collect();
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Tells a process's terminal its size in columns and rows.
    ///
    /// # Errors
    /// When the process has ended, or the agent refuses.
    pub async fn resize(&self, which: &ProcessId, size: (u16, u16)) -> Result<(), Error> {
        if let Status::Stopped(_) = self.process(which)?.status() {
            return Err(Error::state("container not running"));
        }
        let request = ResizeTerminalRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            width: size.0.into(),
            height: size.1.into(),
            ..Default::default()
        };
        let resized = self.sandbox.call("resizing the terminal", async |agent| {
            agent.resize_terminal(no_limit(), &request).await
        });
        Ok(resized.await.map(drop)?)
    }

    /// Ends a process's input.
    ///
    /// # Errors
    /// When the agent refuses.
    pub async fn close_stdin(&self, which: &ProcessId) -> Result<(), Error> {
        let process = self.process(which)?;
        process.close_stdin();
        if let Status::Stopped(_) = process.status() {
            return Ok(());
        }
        let request = CloseStdinRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            ..Default::default()
        };
        let closed = self.sandbox.call("closing an input", async |agent| {
            agent.close_stdin(no_limit(), &request).await
        });
        Ok(closed.await.map(drop)?)
    }

    /// What is known of a process, without asking the guest.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn state(&self, which: &ProcessId) -> Result<ProcessState, Error> {
        let process = self.process(which)?;
        Ok(ProcessState {
            status: process.status(),
            pid: process.pid,
            terminal: process.terminal,
        })
    }

    /// The names of its containers.
    pub fn containers_of(&self) -> Vec<ContainerId> {
        self.containers().keys().cloned().collect()
    }

    /// What happens from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// The machine.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Ends the machine and removes what was made for the pod. All waits end.
    pub async fn shutdown(&self) {
        self.sandbox.kill();
        self.sandbox.ended().await;
        let mut tasks = std::mem::take(&mut *self.tasks());
        while tasks.join_next().await.is_some() {}
        self.containers().clear();
        self.sandbox.end();
    }

    async fn freeze(&self, container: &ContainerId, paused: bool) -> Result<(), Error> {
        let process = self.process(&ProcessId::first(container.clone()))?;
        match (process.status(), paused) {
            (Status::Running, true) | (Status::Paused, false) => {}
            (_, true) => return Err(Error::state("container not running")),
            (_, false) => return Err(Error::state("container not paused")),
        }
        let request = PauseContainerRequest {
            container_id: container.to_string(),
            paused,
            ..Default::default()
        };
        let frozen = self.sandbox.call("freezing the container", async |agent| {
            agent.pause_container(no_limit(), &request).await
        });
        frozen.await?;
        let container = container.clone();
        let (status, event) = match paused {
            true => (Status::Paused, Event::Paused { container }),
            false => (Status::Running, Event::Resumed { container }),
        };
        if process.becomes(status) {
            self.tell(event);
        }
        Ok(())
    }

    /// Kills a process and waits for its end.
    async fn killed(&self, which: &ProcessId, process: &Process) -> Result<Exit, Error> {
        let all = which.exec.is_none();
        if let (Err(error), Status::Created | Status::Running | Status::Paused) =
            (self.kill(which, SIGKILL, all).await, process.status())
        {
            tracing::debug!(process = %which, %error, "a process cannot be killed");
            if all {
                // It is to be removed, whatever the guest thinks of it.
                self.sandbox.kill();
            }
        }
        let ended = tokio::time::timeout(KILL, process.ended());
        match ended.await {
            Ok(exit) => Ok(exit),
            Err(_) if all => {
                tracing::warn!(process = %which, "a killed container does not end: its machine is ended");
                self.sandbox.kill();
                Ok(process.ended().await)
            }
            Err(_) => Err(Error::state(format!("{which} does not end"))),
        }
    }

    /// The container's first process, if it has not ended.
    fn alive(&self, container: &ContainerId) -> Result<Arc<Process>, Error> {
        let process = self.process(&ProcessId::first(container.clone()))?;
        match process.status() {
            Status::Stopped(_) => Err(Error::state("container not running")),
            _ => Ok(process),
        }
    }

    fn process(&self, which: &ProcessId) -> Result<Arc<Process>, Error> {
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
    fn forget(&self, which: &ProcessId) -> bool {
        let mut containers = self.containers();
        match &which.exec {
            None => containers.remove(&which.container).is_some(),
            Some(exec) => match containers.get_mut(&which.container) {
                Some(Slot::Made(container)) => container.execs.remove(exec).is_some(),
                _ => false,
            },
        }
    }

    fn reserve(&self, id: &ContainerId) -> Result<Reserved<'_>, Error> {
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

    fn reserve_exec(&self, which: &ProcessId) -> Result<ReservedExec<'_>, Error> {
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

    fn attend(&self, process: Arc<Process>) {
        self.spawn(watch(process, self.sandbox.clone(), self.events.clone()));
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks();
        // Those that are over.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    fn tell(&self, event: Event) {
        // Without listeners nobody needs to know.
        let _ = self.events.send(event);
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<ContainerId, Slot>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn tasks(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.sandbox.end();
    }
}

/// A name that is taken. Dropping it gives it back.
struct Reserved<'a> {
    pod: &'a Pod,
    id: ContainerId,
}

impl Reserved<'_> {
    fn keep(self, container: Container) {
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
struct ReservedExec<'a> {
    pod: &'a Pod,
    which: ProcessId,
}

impl ReservedExec<'_> {
    fn keep(self, process: Arc<Process>) -> Result<(), Error> {
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

impl Stdio {
    fn wire(&self, terminal: bool) -> std::io::Result<Wiring> {
        use std::os::fd::AsFd as _;
        let stdin = match &self.stdin {
            Input::From(fd) => Some(fd.as_fd()),
            Input::Nothing | Input::AtStart => None,
        };
        let [stdout, stderr] =
            [&self.stdout, &self.stderr].map(|fd| fd.as_ref().map(|fd| fd.as_fd()));
        let wiring = Wiring::of(stdin, stdout, if terminal { None } else { stderr })?;
        Ok(match self.stdin {
            Input::AtStart => wiring.with_later_input(),
            Input::Nothing | Input::From(_) => wiring,
        })
    }
}

/// Puts the container's files where the guest sees them.
async fn put(place: &mut Place, new: &NewContainer) -> Result<Places, Error> {
    let mut places = Places::default();
    if new.placeholder {
        return Ok(places);
    }
    places.root = new.root.put(place, &new.bundle).await?;
    for volume in new.bundle.volumes() {
        if let Source::Shared { file, given } = &volume.source {
            let path = place
                .volume(file, volume.index, *given)
                .map_err(sandbox::Error::from)?;
            places.volumes.push((volume.index, path));
        }
    }
    Ok(places)
}

/// Tells of every container in which a process was killed for want of memory.
async fn oom_events(sandbox: Arc<Sandbox>, events: broadcast::Sender<Event>) {
    let mut after = 0;
    loop {
        let request = NextEventsRequest {
            after,
            ..Default::default()
        };
        let next = sandbox.wait("waiting for events", async |agent| {
            agent.next_events(no_limit(), &request).await
        });
        let next = match next.await {
            Ok(next) => next,
            Err(error) => {
                tracing::debug!(%error, "no more events of the guest");
                return;
            }
        };
        let last = next.events.last().map_or(0, |event| event.number);
        // An agent that tells nothing new would be asked for ever.
        if last <= after {
            tracing::warn!("the agent's events do not go forward");
            return;
        }
        after = last;
        for event in next.events.iter().filter(|event| event.has_out_of_memory()) {
            if let Ok(container) = ContainerId::parse(&event.container_id) {
                let _ = events.send(Event::Oom { container });
            }
        }
    }
}
