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
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read},
    net::IpAddr,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use protocol::agent::{
    ConfigureGuestResponse, CreateContainerRequest, ExecProcessRequest, NextEventsRequest,
    StartProcessRequest,
};
use serde_json::{Map, Value};
use tokio::{
    sync::{OnceCell, broadcast},
    task::JoinSet,
};

mod disks;
mod ending;
mod entries;
mod error;
mod event;
mod process;
mod root;
mod running;

pub use error::{Error, Kind};
pub use event::Event;
pub use process::{Ending, ExecId, Exit, Input, ProcessId, Status, Stdio};
pub use root::{Mount, Root, Upper};

use self::{
    disks::Disks,
    ending::SIGKILL,
    entries::{Container, Entries, Slot},
    process::{Process, watch},
};
use crate::{
    bundle::{self, Bundle, Places, Source},
    cgroup::{Admission, CgroupPlan, HostCgroup},
    container::Wiring,
    hooks::{HostHooks, Moment},
    id::ContainerId,
    network::on_loopback,
    sandbox::{self, Place, Sandbox, Trace, no_limit},
};

/// What a pod is started from.
pub use crate::sandbox::Plan as PodPlan;

/// Events that are kept for a listener that is slow.
const EVENTS: usize = 1024;

/// How long the guest is not asked for events after some came.
const OOM_PAUSE: Duration = Duration::from_secs(1);

/// Where a container reads which name servers it has, and the most that is read of it, in bytes.
const RESOLV_CONF: &str = "/etc/resolv.conf";
const RESOLV_CONF_MAX: u64 = 64 << 10;

/// A running pod. Dropping it ends the machine and removes what was made for it.
#[derive(Debug)]
pub struct Pod {
    sandbox: Arc<Sandbox>,
    configured: OnceCell<ConfigureGuestResponse>,
    /// The container whose hooks have run before the machine was made.
    hooked: Option<ContainerId>,
    /// The container in whose cgroup the machine is.
    grouped: Option<ContainerId>,
    containers: Arc<Entries>,
    events: broadcast::Sender<Event>,
    tasks: Mutex<JoinSet<()>>,
}

/// What the agent made, with its files.
struct MadeContainer {
    process: Arc<Process>,
    place: Place,
}

/// What there is of a container before it has an entry.
struct Prepared {
    made: MadeContainer,
    hooks: HostHooks,
    disks: Disks,
    resolv_conf: Option<PathBuf>,
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
        let hooked = surroundings.hooks.as_ref().map(|_| plan.id.clone());
        let grouped = surroundings.cgroup.as_ref().map(|_| plan.id.clone());
        let sandbox = Sandbox::start(plan, trace).await?;
        let pod = Self {
            hooked,
            grouped,
            sandbox: Arc::new(sandbox),
            configured: OnceCell::new(),
            containers: Arc::default(),
            events: broadcast::channel(EVENTS).0,
            tasks: Mutex::default(),
        };
        let sandbox = pod.sandbox.clone();
        pod.spawn(async move { sandbox.look_after_agent().await });
        Ok(Arc::new(pod))
    }

    /// Sets the guest up, once; with a /dev/shm of this size for its containers. The first container
    /// does it by the way.
    ///
    /// # Errors
    /// When the agent refuses or the machine ends.
    pub async fn configure(
        &self,
        shm_bytes: Option<u64>,
    ) -> Result<&ConfigureGuestResponse, Error> {
        let configured = self.configured.get_or_try_init(|| async {
            let guest = self.sandbox.configure(shm_bytes).await?;
            tracing::debug!(
                kernel = crate::text::printable(&guest.kernel_release, 80),
                agent = crate::text::printable(&guest.agent_version, 80),
                "the guest is ready"
            );
            self.spawn(oom_events(
                self.sandbox.clone(),
                self.containers.clone(),
                self.events.clone(),
            ));
            let sandbox = self.sandbox.clone();
            let containers = self.containers.clone();
            self.spawn(async move {
                // Whoever connects it to a network may write down a name server of that, too.
                let serve = || sandbox.serve_resolvers(&all_resolvers(&containers));
                sandbox.keep_following_network(serve).await;
            });
            Ok::<_, Error>(guest)
        });
        configured.await
    }

    /// Makes a container, up to the execution of its process.
    ///
    /// # Errors
    /// When the name is taken, the machine is too small for a member of its pod, something cannot be
    /// mounted, or the agent refuses.
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
        let bundle = &new.bundle;
        bundle::fits(bundle.spec(), bundle.role(), self.sandbox.size().memory_mib)?;
        let _span = self.sandbox.trace().span("container created");
        let reserved = self.reserve(&new.id)?;
        let mut own_cgroup = None;
        if self.grouped.as_ref() != Some(&new.id) {
            own_cgroup = self.sandbox.further_cgroup(cgroup)?;
        }
        let container = new.id.clone();
        match self.prepare(new, own_cgroup.as_ref()).await {
            Ok(prepared) => {
                let MadeContainer { process, place } = prepared.made;
                reserved.keep(Container {
                    first: process.clone(),
                    execs: HashMap::new(),
                    hooks: Arc::new(prepared.hooks),
                    cgroup: own_cgroup,
                    disks: Arc::new(prepared.disks),
                    resolv_conf: prepared.resolv_conf,
                    _place: place,
                });
                self.tell(Event::Create { container });
                self.attend(process);
                Ok(())
            }
            Err(error) => {
                if let Some(cgroup) = own_cgroup {
                    // The other containers go on meanwhile.
                    cgroup.undo().await;
                }
                Err(error)
            }
        }
    }

    /// All of a container's making that its cgroup outlives.
    async fn prepare(
        &self,
        new: NewContainer,
        cgroup: Option<&HostCgroup>,
    ) -> Result<Prepared, Error> {
        let pid = new.pid.unwrap_or(self.sandbox.vmm_pid());
        let hooks = HostHooks::new(&new.id, &new.bundle, pid);
        let mut admission = match (cgroup, new.pid) {
            (Some(cgroup), Some(pid)) => cgroup.admit(pid),
            _ => Admission::default(),
        };
        if self.hooked.as_ref() != Some(&new.id) {
            if hooks.has(Moment::Create) {
                // They may look where the process is.
                admission.done().await;
            }
            hooks.run(Moment::Create).await?;
            // Whatever they made in the pod's network is there now.
            self.sandbox.plug_in().await?;
        }
        let disks = self.plug(&new).await?;
        let resolv_conf = new.bundle.mounted_at(RESOLV_CONF);
        let made = self.make(new, pid, &disks).await;
        admission.done().await;
        match made {
            Ok(made) => Ok(Prepared {
                made,
                hooks,
                disks,
                resolv_conf,
            }),
            Err(error) => {
                self.unplug(&disks).await;
                Err(error)
            }
        }
    }

    /// Puts a container's files to their places and lets the agent make it. `pid` is that of the
    /// host's process that stands for it.
    async fn make(
        &self,
        new: NewContainer,
        pid: u32,
        disks: &Disks,
    ) -> Result<MadeContainer, Error> {
        let mut place = self.sandbox.place()?;
        let places = put(&mut place, &new, disks).await?;
        let terminal = new.bundle.terminal();
        let ending = new.stdio.ending;
        let wiring = match new.placeholder {
            true => Wiring::none(),
            false => new.stdio.wire(terminal).map_err(Error::Streams)?,
        };
        let shm_bytes = new.bundle.shm_bytes();
        let spec = new.bundle.for_guest(&places, new.terminal_size);
        let mut request = CreateContainerRequest {
            container_id: new.id.to_string(),
            spec: spec.to_json(),
            placeholder: new.placeholder,
            devices: disks.for_guest(),
            ..Default::default()
        };
        if !new.placeholder {
            request.root = Some(new.root.for_guest(places.root, disks.root)).into();
            request.streams = Some(wiring.names()).into();
        }
        // The agent does one after the other, and waits for the streams that the request names:
        // all may be under way at once.
        let creation = async {
            let doing = "creating the container";
            let creation = self.sandbox.call_at_start(doing, async |agent| {
                agent.create_container(no_limit(), &request).await
            });
            creation.await.map_err(Error::unexecutable)
        };
        let opening = async { Ok(wiring.open(&self.sandbox).await?) };
        let (_, streams, _) = tokio::try_join!(self.configure(shm_bytes), opening, creation)?;
        let id = ProcessId::first(new.id);
        let process = Process::new(id, pid, terminal, (streams, ending));
        Ok(MadeContainer { process, place })
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
        if which.exec.is_none() {
            // Some clients finish the network between a container's making and its start.
            self.sandbox.follow_network().await?;
            self.sandbox
                .serve_resolvers(&all_resolvers(&self.containers));
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
            if let Err(error) = self.kill(which, SIGKILL, true).await {
                // It has ended already, mostly.
                tracing::debug!(process = %which, %error, "it is not killed after a hook failed");
            }
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
        entries::names(&self.containers)
    }

    /// What happens from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// The machine.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
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

    fn tasks(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.sandbox.end();
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

/// The text of a file, at most its first `most` bytes. It may be something else by now, that is not
/// waited for.
fn read_text(path: &Path, most: u64) -> io::Result<String> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let mut text = String::new();
    if file.metadata()?.is_file() {
        file.take(most).read_to_string(&mut text)?;
    }
    Ok(text)
}

/// Puts the container's files where the guest sees them.
async fn put(place: &mut Place, new: &NewContainer, disks: &Disks) -> Result<Places, Error> {
    let mut places = Places::default();
    if new.placeholder {
        return Ok(places);
    }
    match disks.root {
        Some(_) => {
            places.root = "/".to_owned();
            places.root_read_only = new.root.is_read_only();
        }
        None => places.root = new.root.put(place, &new.bundle).await?,
    }
    let slots = disks.volumes.iter();
    places
        .volumes
        .extend(slots.map(|(index, slot)| (*index, slot.to_string())));
    for volume in new.bundle.volumes() {
        if let Source::Shared { file, given } = &volume.source {
            let path = place.volume(file, *given).map_err(sandbox::Error::from)?;
            places.volumes.push((volume.index, path));
        }
    }
    Ok(places)
}

/// The name servers that containers are told of and that are on a loopback. Clients write the files
/// when the network is there.
fn all_resolvers(containers: &Entries) -> Vec<IpAddr> {
    let paths: Vec<PathBuf> = {
        let containers = containers.lock().unwrap_or_else(PoisonError::into_inner);
        let path = |slot: &Slot| match slot {
            Slot::Made(container) => container.resolv_conf.clone(),
            Slot::Reserved => None,
        };
        containers.values().filter_map(path).collect()
    };
    let texts = paths
        .iter()
        .filter_map(|path| read_text(path, RESOLV_CONF_MAX).ok());
    texts.flat_map(|text| on_loopback(&text)).collect()
}

/// Tells of every container in which a process was killed for want of memory. The guest may say
/// anything of any container, as often as it likes: it is heard of those of the pod, of each once
/// an answer, and asked again after a pause.
async fn oom_events(
    sandbox: Arc<Sandbox>,
    containers: Arc<Entries>,
    events: broadcast::Sender<Event>,
) {
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
        let told = next.events.iter().filter(|event| event.has_out_of_memory());
        let told: HashSet<&str> = told.map(|event| event.container_id.as_str()).collect();
        let ours = entries::names(&containers).into_iter();
        for container in ours.filter(|container| told.contains(container.as_str())) {
            // Without listeners nobody needs to know.
            let _ = events.send(Event::Oom { container });
        }
        tokio::time::sleep(OOM_PAUSE).await;
    }
}
