//! What containerd's calls do: a task is its word for a container that was made, or an exec in one.
//!
//! The machine begins to boot as soon as the daemon does, while containerd still prepares its
//! first call; whoever needs the pod waits for it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::{Map, Value};
use tokio::{
    sync::{Mutex, OnceCell, SetOnce, broadcast},
    time::{sleep, timeout},
};
use ttrpc::Code;

use super::{
    arguments::Invocation,
    books::{Books, Entry},
    events::{Event, Publisher},
    failure::Failure,
    metrics,
    options::Options,
    proto::{events, task, timestamp},
    stdio::{Kept, Names, Stdin, Streams},
};
use crate::{
    bundle::{Bundle, Role},
    id::ContainerId,
    pod::{
        self, Ending, ExecId, Exit, Input, Mount, NewContainer, Pod, ProcessId, ProcessState, Root,
        Status, Stdio,
    },
    sys,
    text::chain,
};

/// The file in a bundle with the pid of what stands for the container, for the command `delete`.
pub(super) const PID_FILE: &str = "init.pid";

/// How long after the last event memory is given back that only calls need.
const REST: Duration = Duration::from_secs(1);

/// How long the answer to Shutdown may take: containerd waits for three seconds.
const SHUTDOWN: Duration = Duration::from_millis(2500);

/// The tasks of one pod.
#[derive(Debug)]
pub(super) struct Tasks {
    invocation: Invocation,
    bundle: PathBuf,
    pod: OnceCell<Result<Arc<Pod>, Failure>>,
    /// Those of the pod, from its first on.
    happened: Mutex<Option<broadcast::Receiver<pod::Event>>>,
    books: Books,
    publisher: Publisher,
    /// Whether the daemon's end was asked for.
    over: SetOnce<()>,
    /// Whether the machine, and all that was made for it, is gone.
    gone: SetOnce<()>,
}

/// A task's state, and what was said of it when it was made.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) state: ProcessState,
    pub(super) entry: Entry,
}

impl Tasks {
    /// Those of the pod whose first container's bundle this is.
    pub(super) fn new(invocation: Invocation, bundle: PathBuf, publisher: Publisher) -> Self {
        Self {
            invocation,
            bundle,
            pod: OnceCell::new(),
            happened: Mutex::default(),
            books: Books::default(),
            publisher,
            over: SetOnce::new(),
            gone: SetOnce::new(),
        }
    }

    /// Those of a pod that was booted elsewhere.
    #[cfg(test)]
    pub(super) fn use_pod(&self, pod: Arc<Pod>) {
        let set = self.pod.set(Ok(pod));
        assert!(set.is_ok(), "it has one");
    }

    /// The pod; the first who asks boots it.
    pub(super) async fn pod(&self) -> Result<&Arc<Pod>, Failure> {
        let pod = self.pod.get_or_init(|| self.boot()).await;
        pod.as_ref().map_err(Clone::clone)
    }

    async fn boot(&self) -> Result<Arc<Pod>, Failure> {
        if self.over.initialized() {
            return Err(Failure::ending());
        }
        let Invocation { namespace, id, .. } = &self.invocation;
        let booted = super::boot::pod(namespace, id, &self.bundle).await;
        let pod = booted.inspect_err(|failure| {
            tracing::error!(reason = %failure, "the virtual machine does not start");
        })?;
        *self.happened.lock().await = Some(pod.events());
        Ok(pod)
    }

    fn booted(&self) -> Result<&Arc<Pod>, Failure> {
        match self.pod.get() {
            Some(Ok(pod)) => Ok(pod),
            _ => Err(Failure::no_container()),
        }
    }

    /// The pid of what stands for all of them on the host: the machine.
    pub(super) fn pid(&self) -> u32 {
        self.booted().map_or(0, |pod| pod.sandbox().vmm_pid())
    }

    /// Tells containerd of everything that happens in the pod. Dropped, it can be begun again.
    pub(super) async fn tell_all(&self) {
        if self.pod().await.is_err() {
            return;
        }
        let mut happened = self.happened.lock().await;
        let Some(happened) = happened.as_mut() else {
            return;
        };
        let mut rested = false;
        loop {
            let event = tokio::select! {
                biased;
                event = happened.recv() => event,
                () = sleep(REST), if !rested => {
                    sys::give_back();
                    rested = true;
                    continue;
                }
            };
            rested = false;
            match event {
                Ok(event) => self.tell(event),
                Err(broadcast::error::RecvError::Closed) => return,
                Err(broadcast::error::RecvError::Lagged(lost)) => {
                    tracing::error!(lost, "too much happened at once: events are lost");
                }
            }
        }
    }

    /// Logs why the machine ended, with its last lines, unless it never ran.
    pub(super) async fn log_death(&self) {
        let Ok(pod) = self.pod().await else {
            return;
        };
        pod.sandbox().ended().await;
        if let Some(death) = pod.sandbox().failure("running the pod") {
            tracing::warn!("{}", crate::text::chain(&death));
        }
    }

    fn tell(&self, event: pod::Event) {
        let pid = self.pid();
        let event = match event {
            pod::Event::Create { container } => {
                let which = ProcessId::first(container);
                let entry = self.books.entry(&which).unwrap_or_default();
                Event::Create(events::TaskCreate {
                    container_id: which.container.to_string(),
                    bundle: entry.bundle,
                    rootfs: entry.rootfs,
                    io: MessageField::some(io(entry.names)),
                    pid,
                    ..Default::default()
                })
            }
            pod::Event::Start { container } => Event::Start(events::TaskStart {
                container_id: container.to_string(),
                pid,
                ..Default::default()
            }),
            pod::Event::ExecAdded { process } => Event::ExecAdded(events::TaskExecAdded {
                container_id: process.container.to_string(),
                exec_id: name(&process),
                ..Default::default()
            }),
            pod::Event::ExecStarted { process } => Event::ExecStarted(events::TaskExecStarted {
                container_id: process.container.to_string(),
                exec_id: name(&process),
                pid,
                ..Default::default()
            }),
            pod::Event::Exit { process, exit } => Event::Exit(events::TaskExit {
                container_id: process.container.to_string(),
                id: name(&process),
                pid,
                exit_status: exit.status,
                exited_at: timestamp(Some(exit.at)),
                ..Default::default()
            }),
            // Of execs nobody is told.
            pod::Event::Delete { process, .. } if process.exec.is_some() => return,
            pod::Event::Delete { process, exit } => Event::Delete(events::TaskDelete {
                container_id: process.container.to_string(),
                pid,
                exit_status: exit.status,
                exited_at: timestamp(Some(exit.at)),
                ..Default::default()
            }),
            pod::Event::Paused { container } => Event::Paused(events::TaskPaused {
                container_id: container.to_string(),
                ..Default::default()
            }),
            pod::Event::Resumed { container } => Event::Resumed(events::TaskResumed {
                container_id: container.to_string(),
                ..Default::default()
            }),
            pod::Event::Oom { container } => Event::Oom(events::TaskOOM {
                container_id: container.to_string(),
                ..Default::default()
            }),
        };
        self.publisher.publish(event);
    }

    /// Makes a container and returns the pid of what stands for it.
    pub(super) async fn create(&self, request: task::CreateTaskRequest) -> Result<u32, Failure> {
        if !request.checkpoint.is_empty() {
            let message = "a container cannot be restored from a checkpoint";
            return Err(Failure::new(Code::UNIMPLEMENTED, message));
        }
        if let Some(options) = request.options.as_ref() {
            Options::read(options).map_err(|error| Failure::invalid(chain(&error)))?;
        }
        let id = ContainerId::parse(&request.id)?;
        let names = Names {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let entry = Entry {
            bundle: request.bundle,
            rootfs: request.rootfs.iter().map(event_mount).collect(),
            names,
        };
        let turn = self.books.enter(&id, entry.clone())?;
        let which = ProcessId::first(id);
        match self.make(&which, entry, request.rootfs).await {
            Ok(kept) => self.books.keep(&turn, kept),
            Err(failure) => {
                self.books.strike(&turn);
                return Err(failure);
            }
        }
        Ok(self.pid())
    }

    async fn make(
        &self,
        which: &ProcessId,
        entry: Entry,
        rootfs: Vec<task::Mount>,
    ) -> Result<Kept, Failure> {
        let bundle_path = Path::new(&entry.bundle);
        let owner = (&self.invocation.namespace, which.container.as_str());
        let opening = async { Ok(Streams::open(&entry.names, owner).await?) };
        let (pod, streams) = tokio::try_join!(self.pod(), opening)?;
        let bundle = Bundle::load(bundle_path).map_err(pod::Error::from)?;
        let placeholder = *bundle.role() == Role::Sandbox;
        let (stdio, kept) = split(streams);
        let new = NewContainer {
            id: which.container.clone(),
            bundle,
            root: root(rootfs),
            stdio,
            terminal_size: None,
            pid: None,
            placeholder,
        };
        pod.create(new).await?;
        if let Err(error) = fs::write(bundle_path.join(PID_FILE), self.pid().to_string()) {
            tracing::warn!(bundle = entry.bundle, %error, "the pid cannot be written down");
        }
        Ok(kept)
    }

    /// Makes a further process in a container.
    pub(super) async fn exec(&self, request: task::ExecProcessRequest) -> Result<(), Failure> {
        let container = ContainerId::parse(&request.id)?;
        let exec = ExecId::parse(&request.exec_id)?;
        let process = json(request.spec.as_ref(), "spec")?;
        let names = Names {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let turn = self.books.enter_exec(&container, &exec, names.clone())?;
        let which = ProcessId {
            container,
            exec: Some(exec),
        };
        match self.make_exec(&which, &names, process).await {
            Ok(kept) => self.books.keep(&turn, kept),
            Err(failure) => {
                self.books.strike(&turn);
                return Err(failure);
            }
        }
        Ok(())
    }

    async fn make_exec(
        &self,
        which: &ProcessId,
        names: &Names,
        mut process: Map<String, Value>,
    ) -> Result<Kept, Failure> {
        let pod = self.booted()?;
        process.insert("terminal".to_owned(), names.terminal.into());
        let owner = (&self.invocation.namespace, which.container.as_str());
        let (stdio, kept) = split(Streams::open(names, owner).await?);
        pod.exec(which, process, stdio, None).await?;
        Ok(kept)
    }

    /// Executes the process of a task that was made.
    pub(super) async fn start(&self, which: &ProcessId) -> Result<u32, Failure> {
        self.books.entry(which)?;
        let input = self.books.open_stdin(which)?;
        self.booted()?.start_reading(which, input).await?;
        Ok(self.pid())
    }

    /// Waits for a task's end.
    pub(super) async fn wait(&self, which: &ProcessId) -> Result<Exit, Failure> {
        self.books.entry(which)?;
        Ok(self.booted()?.wait(which).await?)
    }

    /// Removes a task that has ended or was never started. containerd also removes one whose making
    /// it waits for no longer: that is removed as soon as it is made.
    pub(super) async fn delete(&self, which: &ProcessId) -> Result<Exit, Failure> {
        let turn = self.books.turn(which).await?;
        let pod = self.booted().inspect_err(|_| self.books.stays(&turn))?;
        let deleted = pod.delete(which, false).await;
        let exit = deleted.inspect_err(|_| self.books.stays(&turn))?;
        let kept = self.books.strike(&turn);
        drop(turn);
        if let Some(logger) = kept.logger {
            // What it was given is written when the client hears of the removal.
            logger.finish().await;
        }
        Ok(exit)
    }

    /// Sends a signal to a task, or to `all` processes of its container.
    pub(super) async fn kill(
        &self,
        which: &ProcessId,
        signal: u32,
        all: bool,
    ) -> Result<(), Failure> {
        let signal = i32::try_from(signal)
            .map_err(|_| Failure::invalid(format!("there is no signal {signal}")))?;
        let told = self.told(which)?;
        if let Status::Stopped(_) = told.state.status {
            return Err(Failure::finished());
        }
        match self.booted()?.kill(which, signal, all).await {
            Ok(()) => Ok(()),
            Err(error) => match Failure::from(&error) {
                // It has ended in the meantime.
                failure if failure.is_state() || failure.is_absence() => Err(Failure::finished()),
                failure => Err(failure),
            },
        }
    }

    /// What is known of a task.
    pub(super) fn told(&self, which: &ProcessId) -> Result<Told, Failure> {
        let entry = self.books.entry(which)?;
        let state = self.booted()?.state(which)?;
        Ok(Told { state, entry })
    }

    /// The pids that stand for a container's tasks on the host, with the names of execs: for each
    /// it is the machine. That of the container is told until it is deleted: a containerd that is
    /// started again takes a shim without for one that was never used, and forgets how it ended.
    pub(super) fn pids(
        &self,
        container: &ContainerId,
    ) -> Result<Vec<(u32, Option<ExecId>)>, Failure> {
        let runs = |which: &ProcessId| {
            let told = self.told(which);
            told.is_ok_and(|told| !matches!(told.state.status, Status::Stopped(_)))
        };
        let first = ProcessId::first(container.clone());
        self.told(&first)?;
        let mut pids = vec![(self.pid(), None)];
        for exec in self.books.execs(container) {
            let which = ProcessId {
                exec: Some(exec.clone()),
                ..first.clone()
            };
            if runs(&which) {
                pids.push((self.pid(), Some(exec)));
            }
        }
        Ok(pids)
    }

    /// Freezes a container.
    pub(super) async fn pause(&self, container: &ContainerId) -> Result<(), Failure> {
        self.books.entry(&ProcessId::first(container.clone()))?;
        Ok(self.booted()?.pause(container).await?)
    }

    /// Thaws a container.
    pub(super) async fn resume(&self, container: &ContainerId) -> Result<(), Failure> {
        self.books.entry(&ProcessId::first(container.clone()))?;
        Ok(self.booted()?.resume(container).await?)
    }

    /// Sets a container's limits anew.
    pub(super) async fn update(&self, request: task::UpdateTaskRequest) -> Result<(), Failure> {
        let container = ContainerId::parse(&request.id)?;
        self.books.entry(&ProcessId::first(container.clone()))?;
        let resources = json(request.resources.as_ref(), "resources")?;
        let resources = Value::Object(resources);
        Ok(self.booted()?.update(&container, &resources).await?)
    }

    /// A container's counters.
    pub(super) async fn stats(&self, container: &ContainerId) -> Result<Any, Failure> {
        self.books.entry(&ProcessId::first(container.clone()))?;
        let stats = self.booted()?.stats(container).await?;
        Ok(metrics::metrics(&stats))
    }

    /// Sets the size of a task's terminal.
    pub(super) async fn resize(&self, which: &ProcessId, size: (u32, u32)) -> Result<(), Failure> {
        self.books.entry(which)?;
        let side = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX);
        let size = (side(size.0), side(size.1));
        Ok(self.booted()?.resize(which, size).await?)
    }

    /// Lets a task's input end, once the client has let go of it and it was read.
    pub(super) fn close_stdin(&self, which: &ProcessId) -> Result<(), Failure> {
        self.books.close_stdin(which)
    }

    /// Asks for the daemon's end, unless it still has tasks; `now` ends it with them. Who was
    /// answered may use its names again: as long as containerd waits for it, the answer waits until
    /// they are free.
    pub(super) async fn shut_down(&self, now: bool) {
        if now || self.books.is_idle() {
            // It may have been asked for before.
            let _ = self.over.set(());
            let _ = timeout(SHUTDOWN, self.gone.wait()).await;
        }
    }

    /// Waits until the end was asked for.
    pub(super) async fn over(&self) {
        self.over.wait().await;
    }

    /// Ends the machine, and tells containerd of everything that ended with it. Nobody else must
    /// be telling any more.
    pub(super) async fn end(&self, patience: Duration) {
        // From now on nobody boots one.
        let _ = self.over.set(());
        let pod = self.pod.get_or_init(|| async { Err(Failure::ending()) });
        if let Ok(pod) = pod.await {
            pod.shutdown().await;
        }
        let _ = self.gone.set(());
        if let Some(happened) = self.happened.lock().await.as_mut() {
            while let Ok(event) = happened.try_recv() {
                self.tell(event);
            }
        }
        self.publisher.flush(patience).await;
    }
}

/// An exec's name, or its container's.
fn name(which: &ProcessId) -> String {
    let name = which.exec.as_ref().unwrap_or(&which.container);
    name.to_string()
}

fn io(names: Names) -> events::TaskIO {
    events::TaskIO {
        stdin: names.stdin,
        stdout: names.stdout,
        stderr: names.stderr,
        terminal: names.terminal,
        ..Default::default()
    }
}

fn event_mount(mount: &task::Mount) -> events::Mount {
    events::Mount {
        type_: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
        ..Default::default()
    }
}

fn root(mounts: Vec<task::Mount>) -> Root {
    if mounts.is_empty() {
        return Root::Bundle;
    }
    let mounts = mounts.into_iter().map(|mount| Mount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    });
    Root::Mounts(mounts.collect())
}

fn split(streams: Streams) -> (Stdio, Kept) {
    let stdio = Stdio {
        stdin: match streams.kept.stdin {
            Stdin::Null => Input::Nothing,
            _ => Input::AtStart,
        },
        stdout: streams.stdout,
        stderr: streams.stderr,
        ending: Ending::Ended,
    };
    (stdio, streams.kept)
}

/// An object of the runtime specification, which travels as JSON in an Any.
fn json(any: Option<&Any>, field: &str) -> Result<Map<String, Value>, Failure> {
    let any = any.ok_or_else(|| Failure::invalid(format!("{field} is missing")))?;
    serde_json::from_slice(&any.value)
        .map_err(|error| Failure::invalid(format!("{field} is no JSON object: {error}")))
}
