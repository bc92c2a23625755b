//! One pod, one virtual machine.
//!
//! [`Sandbox::start`] is the recipe, read from top to bottom. Whatever a step
//! makes belongs to a value that undoes it when dropped, so that an error, a
//! signal or a deadline anywhere leaves nothing behind: no process, no file.
//!
//! ```text
//!   state directory ─ resources ─ console, vsock, ready ─ VMM ─ hello ─ agent
//!                                                          └────── dies ──► Error
//! ```

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use protocol::{
    Hello, HelloError, StreamId,
    agent::{ConfigureGuestRequest, ConfigureGuestResponse, Empty, SharedDirectory},
    agent_ttrpc::AgentClient,
};
use tokio::{io::AsyncReadExt, net::UnixStream, sync::Notify, time::timeout};

mod agent;
mod attachment;
pub mod console;
mod disks;
mod frames;
mod machine;
mod plugging;
mod pulse;
mod resources;
mod shared;
mod state;
mod trace;
mod vmm;

pub use console::Console;
pub use machine::{MAX_CPUS, MIN_MEMORY_MIB, Media, Size, cmdline};
pub use pulse::Pace;
pub(crate) use pulse::Signs;
pub use resources::{Error as ResourceError, Files, Resources, open_directory, open_kvm};
pub use shared::{Error as SharedError, GUARDS, Given, Place, ReadOnly, SharedTree};
pub use state::{Error as StateError, Made, Owner, StateDir};
pub use trace::{Record, Span, Trace};
pub use vmm::Death;

use self::{
    attachment::Attachments,
    plugging::Wires,
    vmm::{Verdict, Vmm},
};
use crate::{
    cgroup::{self, Admission, CgroupPlan, HostCgroup},
    cni,
    hooks::{self, HostHooks, Moment},
    id::{ContainerId, Namespace},
    network::{self, Card, Network},
    sys,
    text::printable,
};

/// How long one call to a running agent may take.
const CALL: Duration = Duration::from_secs(30);

/// How much longer for each CPU: the guest brings them online one by one, each with all others
/// halted for a moment, and whatever comes meanwhile waits for that.
const CALL_FOR_CPU: Duration = Duration::from_secs(2);

/// How long after the end of a connection the end of the VMM is waited for.
const DEATH: Duration = Duration::from_secs(5);

/// The lines of the guest's console in an error.
const CONSOLE_LINES: usize = 8;

/// Bytes of entropy given to a guest.
const ENTROPY: usize = 64;

/// What a sandbox is started from.
#[derive(Debug)]
pub struct Plan {
    /// The directory of all sandboxes, mostly `/run/bulkhead`.
    pub state_root: PathBuf,
    /// The group it belongs to.
    pub namespace: Namespace,
    /// Its name.
    pub id: ContainerId,
    /// The files it is made from.
    pub files: Files,
    /// How large it is.
    pub size: Size,
    /// What for.
    pub purpose: Purpose,
    /// Files of the host that it has as memory and as disks.
    pub media: Media,
    /// What of the host it is put into.
    pub surroundings: Surroundings,
    /// The guest's host name.
    pub hostname: String,
    /// How long the guest may take to boot, and at least for what a start asks of it.
    pub deadline: Duration,
    /// How long its agent may be silent.
    pub pace: Pace,
}

/// What of the host a sandbox is put into.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// The pod's network namespace; by default a fresh one.
    pub network: Option<OwnedFd>,
    /// Hooks that may change the network before the machine is made.
    pub hooks: Option<HostHooks>,
    /// Its cgroup.
    pub cgroup: Option<CgroupPlan>,
    /// The process that stands for the first container, to be put into the cgroup, too.
    pub relay: Option<u32>,
    /// Networks that the namespace is attached to.
    pub attach: Option<cni::Plan>,
}

/// What a sandbox is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To see whether a guest comes up: it shares nothing with the host.
    Probe,
    /// Containers, whose files come by the shared tree.
    Containers,
}

/// A running virtual machine whose agent answers. Dropping it ends the machine and removes what
/// was made for it.
pub struct Sandbox {
    agent: AgentClient,
    signs: Signs,
    pace: Pace,
    vmm: Vmm,
    console: Console,
    tree: Option<Arc<SharedTree>>,
    wires: Mutex<Option<Wires>>,
    /// Held while cards are plugged in and told of.
    plugging: tokio::sync::Mutex<()>,
    attachments: Mutex<Option<Attachments>>,
    /// Told when nobody wants to wait for the network's end any more.
    hurry: Notify,
    cgroup: Mutex<Option<HostCgroup>>,
    state: StateDir,
    trace: Trace,
    size: Size,
    hostname: String,
    boot_deadline: Duration,
    /// When the guest's clock began, on the trace's.
    guest_epoch_ns: u64,
}

/// Why a sandbox did not start, or what it could not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No directory for it.
    #[error(transparent)]
    State(#[from] StateError),
    /// Something it is made from is missing.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// A hook of the configuration.
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// The pod's network.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// Networks that it is attached to.
    #[error(transparent)]
    Attach(#[from] cni::Error),
    /// A card for an interface that came later.
    #[error("cannot plug a card for the pod's interface {name:?} into the virtual machine")]
    Plug {
        /// The interface.
        name: String,
        /// What the VMM said.
        #[source]
        source: ::vmm::control::Error,
    },
    /// The cgroup is another container's.
    #[error(
        "the cgroup {} has processes of another container; name another by linux.cgroupsPath, or choose another id",
        path.display()
    )]
    CgroupTaken {
        /// Its directory.
        path: PathBuf,
    },
    /// A disk that is plugged in or taken out.
    #[error("cannot change the disks of the virtual machine")]
    Disk(#[source] ::vmm::control::Error),
    /// The tree of files that it shares with the host.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// The host ran out of something.
    #[error("cannot make {what} for the virtual machine")]
    Make {
        /// Of what.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The VMM could not be started.
    #[error("cannot start the virtual machine")]
    Launch(#[source] ::vmm::launch::Error),
    /// The VMM ended before the agent came up.
    #[error("the virtual machine ended while it booted: {death}{console}")]
    BootDeath {
        /// How.
        death: Death,
        /// The guest's last lines.
        console: ConsoleTail,
    },
    /// The agent did not come up in time.
    #[error(
        "the guest did not boot within {seconds} s; try --start-timeout with more seconds, or `bulkhead check`{console}"
    )]
    BootDeadline {
        /// The deadline.
        seconds: u64,
        /// The guest's last lines.
        console: ConsoleTail,
    },
    /// The guest went away before, and its VMM did not.
    #[error(
        "the guest broke its connection to the host off before its agent was ready, and its virtual machine has not ended after {seconds} s; try `bulkhead check`{console}"
    )]
    BootHangUp {
        /// How long its end was waited for, with the boot.
        seconds: u64,
        /// The guest's last lines.
        console: ConsoleTail,
    },
    /// What came up is no agent of ours.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The VMM ended later.
    #[error("the virtual machine ended while {doing}: {death}{console}")]
    Death {
        /// What was being done.
        doing: &'static str,
        /// How.
        death: Death,
        /// The guest's last lines.
        console: ConsoleTail,
    },
    /// The guest's side is there and does not talk.
    #[error("the connection to the guest failed while {doing}")]
    Connection {
        /// What was being done.
        doing: &'static str,
        /// How it failed.
        #[source]
        source: io::Error,
    },
    /// The agent did not answer in time.
    #[error("the guest's agent did not answer within {seconds} s while {doing}")]
    CallDeadline {
        /// What was being done.
        doing: &'static str,
        /// The deadline.
        seconds: u64,
    },
    /// The agent refused.
    #[error("{message}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// The agent's reason.
        code: ttrpc::Code,
        /// Its words, made printable.
        message: String,
    },
}

/// The guest's last lines, as they are appended to an error; none where they tell nothing.
#[derive(Debug)]
pub struct ConsoleTail(Option<Vec<String>>);

impl std::fmt::Display for ConsoleTail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.as_deref() {
            None => Ok(()),
            Some([]) => f.write_str("; the guest's console is empty"),
            Some(lines) => {
                f.write_str("; the guest's console ends with:")?;
                lines.iter().try_for_each(|line| write!(f, "\n  | {line}"))
            }
        }
    }
}

impl Sandbox {
    /// Starts a virtual machine and waits until its agent answers.
    ///
    /// # Errors
    /// When a step fails; everything before it is undone.
    pub async fn start(plan: Plan, trace: &Trace) -> Result<Self, Error> {
        let spawning = trace.span("vmm spawned");
        let state = StateDir::create(&plan.state_root, &plan.namespace, &plan.id)?;
        let Surroundings {
            network,
            hooks,
            cgroup,
            relay,
            attach,
        } = plan.surroundings;
        let making = trace.span("cgroup made");
        let cgroup = made_cgroup(&state, cgroup)?;
        drop(making);
        let admit = || match (&cgroup, relay) {
            (Some(cgroup), Some(pid)) => cgroup.admit(pid),
            _ => Admission::default(),
        };
        let mut admission = None;
        if let Some(hooks) = hooks.filter(|hooks| hooks.has(Moment::Create)) {
            // They may look where the process is.
            admission.insert(admit()).done().await;
            hooks.run(Moment::Create).await?;
        }
        let attachments = attached(&state, network.as_ref(), attach, trace).await?;
        // Whatever hooks and plug-ins made in it is there now.
        let joining = trace.span("network joined");
        let (network, cards) = match plan.purpose {
            Purpose::Containers => joined(network)?,
            Purpose::Probe => (None, Vec::new()),
        };
        drop(joining);
        let resources = Resources::open(&plan.files)?;
        let console = Console::new().map_err(make("the console's ring"))?;
        let vsock = state.listen(VSOCK)?;
        let control = state.listen(CONTROL)?;
        let (ready, theirs) = StdUnixStream::pair().map_err(make("a socket pair"))?;
        let tree = match plan.purpose {
            Purpose::Containers => Some(SharedTree::make(&state)?),
            Purpose::Probe => None,
        };
        let top = tree.as_ref().map(|tree| tree.for_vmm()).transpose();

        let mut launch =
            ::vmm::launch::Launch::new(resources.vmm.try_clone().map_err(make("a descriptor"))?);
        if let Some(network) = &network {
            let namespace = network.namespace().as_fd().try_clone_to_owned();
            launch.network(namespace.map_err(make("a descriptor"))?);
        }
        if let Some(cgroup) = &cgroup {
            launch.cgroup(cgroup.vmm().map_err(make("a descriptor"))?);
        }
        let parts = machine::Parts {
            cards,
            console: console.for_vmm().map_err(make("a descriptor"))?,
            vsock: vsock.into(),
            control: control.into(),
            ready: theirs.into(),
            shared: top.map_err(make("a descriptor"))?,
            media: plan.media,
            resources,
        };
        let config = machine::compose(&mut launch, plan.size, parts);
        state.record(&Made::Vmm)?;
        let vmm = Vmm::launch(launch, &config).map_err(Error::Launch)?;
        drop(spawning);
        tracing::debug!(pid = vmm.pid(), "the VMM runs");
        // Not before: the kernel puts the VMM into its cgroup only when nobody else is on the way.
        let mut admission = admission.unwrap_or_else(admit);
        let wires = network.map(|network| Wires::new(network, state.short_path(VSOCK)));

        let spawned_ns = trace.now_ns();
        let hello = hello(ready, &vmm, &console, plan.deadline).await?;
        let guest_epoch_ns = draw_boot(trace, spawned_ns, hello);
        let connecting = trace.span("agent connected");
        let path = state.short_path(VSOCK);
        let doing = "connecting to the agent";
        let patience = CALL.max(plan.deadline);
        let client = agent::client(&path);
        let agent = connected((&vmm, &console), doing, patience, client).await?;
        drop(connecting);
        admission.done().await;
        Ok(Self {
            agent,
            signs: Signs::default(),
            pace: plan.pace,
            vmm,
            console,
            tree,
            wires: Mutex::new(wires),
            plugging: tokio::sync::Mutex::default(),
            attachments: Mutex::new(attachments),
            hurry: Notify::new(),
            cgroup: Mutex::new(cgroup),
            state,
            trace: trace.clone(),
            size: plan.size,
            hostname: plan.hostname,
            boot_deadline: plan.deadline,
            guest_epoch_ns,
        })
    }

    /// Sets the guest up. It may be under way together with the first container's making: the
    /// agent does the one after the other.
    ///
    /// # Errors
    /// When the agent refuses or the machine ends.
    pub async fn configure(&self, shm_bytes: Option<u64>) -> Result<ConfigureGuestResponse, Error> {
        let _span = self.trace.span("guest configured");
        let request = ConfigureGuestRequest {
            version: protocol::VERSION,
            time_ns: sys::realtime_ns(),
            entropy: sys::random::<ENTROPY>().to_vec(),
            hostname: self.hostname.clone(),
            online_cpus: u32::from(self.size.cpus),
            shared_directories: self.shared_directories(),
            shm_bytes: shm_bytes.unwrap_or_default(),
            ..Default::default()
        };
        let network = match &mut *self.wires() {
            Some(wires) => wires.news()?,
            None => None,
        };
        let configuring = self.call_at_start("configuring the guest", async |agent| {
            agent.configure_guest(no_limit(), &request).await
        });
        // The agent takes one after the other.
        let connecting = async {
            match network {
                Some(network) => self.tell_network(network).await,
                None => Ok(()),
            }
        };
        let (guest, ()) = tokio::try_join!(configuring, connecting)?;
        Ok(guest)
    }

    fn wires(&self) -> MutexGuard<'_, Option<Wires>> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets limits of its cgroup anew.
    pub fn limit(&self, resources: &serde_json::Value) {
        let cgroup = self.cgroup.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cgroup) = &*cgroup {
            cgroup.limit(resources);
        }
    }

    /// Makes the cgroup of a further container.
    ///
    /// # Errors
    /// When it cannot be noted.
    pub fn further_cgroup(&self, plan: Option<CgroupPlan>) -> Result<Option<HostCgroup>, Error> {
        made_cgroup(&self.state, plan)
    }

    fn shared_directories(&self) -> Vec<SharedDirectory> {
        let shared = |_: &Arc<SharedTree>| SharedDirectory {
            tag: shared::TAG.to_owned(),
            mount_point: shared::GUEST.to_owned(),
            ..Default::default()
        };
        self.tree.as_ref().map(shared).into_iter().collect()
    }

    /// Lets the agent do something, which must be done soon. The death of the VMM ends the call at
    /// once.
    ///
    /// # Errors
    /// When the agent refuses or is silent, or the machine ends.
    pub async fn call<T>(
        &self,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        self.call_within(self.soon(), doing, call).await
    }

    /// As [`Sandbox::call`], for what a start waits for: who lets a guest boot for longer lets it do
    /// this for longer, too.
    ///
    /// # Errors
    /// As [`Sandbox::call`].
    pub async fn call_at_start<T>(
        &self,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        let deadline = (CALL + CALL_FOR_CPU * u32::from(self.size.cpus)).max(self.boot_deadline);
        self.call_within(deadline, doing, call).await
    }

    /// As [`Sandbox::call`], with a deadline of its own.
    ///
    /// # Errors
    /// As [`Sandbox::call`].
    pub async fn call_within<T>(
        &self,
        deadline: Duration,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        let work = self.signs.work();
        let done = self.ask_within(deadline, doing, call).await;
        if let Ok(_) | Err(Error::Refused { .. }) = done {
            work.done();
        }
        done
    }

    /// As [`Sandbox::call`], for what an agent answers at once: nothing of it waits for a disk, or
    /// for files of the host.
    ///
    /// # Errors
    /// As [`Sandbox::call`].
    pub async fn ask<T>(
        &self,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        self.ask_within(self.soon(), doing, call).await
    }

    /// As [`Sandbox::ask`], with a deadline of its own.
    ///
    /// # Errors
    /// As [`Sandbox::call`].
    pub async fn ask_within<T>(
        &self,
        deadline: Duration,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        let seconds = deadline.as_secs();
        timeout(deadline, self.wait(doing, call))
            .await
            .unwrap_or(Err(Error::CallDeadline { doing, seconds }))
    }

    fn soon(&self) -> Duration {
        CALL + CALL_FOR_CPU * u32::from(self.size.cpus)
    }

    /// Calls the agent for something that may take for ever. The death of the VMM ends the call
    /// at once.
    ///
    /// # Errors
    /// When the agent refuses or the machine ends.
    pub async fn wait<T>(
        &self,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        let answer = tokio::select! {
            biased;
            answer = call(&self.agent) => answer,
            () = self.vmm.ended() => return Err(death(doing, &self.vmm, &self.console)),
        };
        if let Ok(_) | Err(ttrpc::Error::RpcStatus(_)) = answer {
            self.signs.heard();
        }
        match answer {
            Ok(answer) => Ok(answer),
            Err(ttrpc::Error::RpcStatus(status)) => Err(Error::Refused {
                doing,
                code: status.code(),
                message: printable(&status.message, 1000),
            }),
            Err(error) => {
                Err(broken(doing, &self.vmm, &self.console, io::Error::other(error)).await)
            }
        }
    }

    /// Looks after the agent until the machine ends, which is what becomes of it when the agent
    /// says nothing for too long.
    pub async fn look_after_agent(&self) {
        let asking = async || {
            let ping = self.wait("asking for a sign of life", async |agent| {
                agent.ping(no_limit(), &Empty::default()).await
            });
            if let Err(error) = ping.await {
                tracing::debug!(%error, "the agent does not answer");
            }
            // Nothing else happens, or it would not have been asked.
            sys::give_back();
        };
        let machine = pulse::Machine {
            pid: self.vmm.pid(),
            control: self.state.short_path(CONTROL),
        };
        tokio::select! {
            biased;
            () = self.vmm.ended() => {}
            silent = pulse::silence(&self.signs, self.pace, machine, asking) => {
                let seconds = silent.as_secs();
                self.vmm.condemn(Verdict::Silent { seconds });
            }
        }
    }

    /// Where it is noted that the agent was heard.
    pub(crate) fn signs(&self) -> &Signs {
        &self.signs
    }

    /// Opens a standard stream by its name.
    ///
    /// # Errors
    /// When the agent does not take it.
    pub async fn stream(&self, id: StreamId) -> Result<UnixStream, Error> {
        let path = self.state.short_path(VSOCK);
        let doing = "opening a standard stream";
        let machine = (&self.vmm, &self.console);
        connected(machine, doing, CALL, agent::stream(&path, id)).await
    }

    /// A place in the shared tree for one more container.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn place(&self) -> Result<Place, Error> {
        let tree = self.tree.as_ref().ok_or_else(|| Error::Make {
            what: "a container's place",
            source: io::Error::other("the sandbox was started for a probe"),
        })?;
        Ok(tree.place()?)
    }

    /// Whether the machine is not there any more.
    pub fn has_ended(&self) -> bool {
        self.vmm.has_ended()
    }

    /// Why the machine failed while `doing` was done; nothing while it runs, or if it ended because
    /// nobody needed it any more.
    pub fn failure(&self, doing: &'static str) -> Option<Error> {
        let death = self
            .has_ended()
            .then(|| death(doing, &self.vmm, &self.console))?;
        match &death {
            Error::Death { death, .. } if death.is_dismissal() => None,
            _ => Some(death),
        }
    }

    /// Ends the machine at once, without waiting, as nobody needs it any more.
    pub fn dismiss(&self) {
        self.vmm.condemn(Verdict::Dismissed);
    }

    /// Ends the machine at once, without waiting, as it did not end what was to end in it.
    pub fn kill(&self) {
        self.vmm.condemn(Verdict::Deaf);
    }

    /// Waits for the machine's end.
    pub async fn ended(&self) {
        self.vmm.ended().await;
    }

    /// Leaves the networks that it was attached to, while other tasks go on. The machine has ended.
    pub async fn leave_networks(&self) {
        drop(self.wires().take());
        let attachments = {
            let mut attachments = self.attachments();
            attachments.take()
        };
        if let Some(attachments) = attachments {
            tokio::select! {
                biased;
                () = attachments.remove() => {}
                () = self.hurry.notified() => {}
            }
        }
    }

    /// Has the networks be left soon, though a plug-in may not be done: what it does not undo is
    /// left as by a killed process.
    pub fn hurry(&self) {
        self.hurry.notify_one();
    }

    fn attachments(&self) -> MutexGuard<'_, Option<Attachments>> {
        self.attachments
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes its cgroup, once those that are in it have ended, while other tasks go on.
    pub async fn leave_cgroup(&self) {
        let cgroup = {
            let mut cgroup = self.cgroup.lock().unwrap_or_else(PoisonError::into_inner);
            cgroup.take()
        };
        if let Some(cgroup) = cgroup {
            cgroup.end().await;
        }
    }

    /// Ends the machine and removes what was made for it. Twice is as good as once.
    pub fn end(&self) {
        self.vmm.end();
        if let Some(tree) = &self.tree {
            tree.release();
        }
        drop(self.wires().take());
        drop(self.attachments().take());
        let mut cgroup = self.cgroup.lock().unwrap_or_else(PoisonError::into_inner);
        drop(cgroup.take());
        self.state.remove();
    }

    /// Its directory, to note things in.
    pub fn state(&self) -> &StateDir {
        &self.state
    }

    /// Where its state lies.
    pub fn path(&self) -> &Path {
        self.state.path()
    }

    /// The trace of its start.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// How large the machine is.
    pub fn size(&self) -> Size {
        self.size
    }

    /// The VMM's pid.
    pub fn vmm_pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// A moment of the guest's clock on the trace's.
    pub fn guest_ns(&self, boot_ns: u64) -> u64 {
        self.guest_epoch_ns.saturating_add(boot_ns)
    }

    /// Keeps the trace for those who look while the sandbox runs.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save_trace(&self) -> Result<(), Error> {
        let json = self.trace.record().to_json();
        Ok(self.state.write("trace.json", json.as_bytes())?)
    }
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("path", &self.path())
            .field("vmm_pid", &self.vmm_pid())
            .finish_non_exhaustive()
    }
}

/// Makes a container's cgroup, if one is wanted and can be had.
fn made_cgroup(state: &StateDir, plan: Option<CgroupPlan>) -> Result<Option<HostCgroup>, Error> {
    let Some((plan, path)) = plan.and_then(|plan| Some((plan.clone(), plan.place()?))) else {
        return Ok(None);
    };
    if cgroup::is_taken(&path) {
        // Not even noted: what is noted is removed, with those that are in it.
        return Err(Error::CgroupTaken { path });
    }
    state.record(&Made::Cgroup { path })?;
    Ok(plan.make())
}

/// Attaches the namespace to networks, if that is planned.
async fn attached(
    state: &StateDir,
    namespace: Option<&OwnedFd>,
    plan: Option<cni::Plan>,
    trace: &Trace,
) -> Result<Option<Attachments>, Error> {
    match (plan, namespace) {
        (Some(plan), Some(namespace)) if !plan.networks.is_empty() => {
            let _span = trace.span("network attached");
            Attachments::make(state, namespace, plan).await.map(Some)
        }
        _ => Ok(None),
    }
}

/// The pod's network, and the guest's cards for what is in it.
fn joined(namespace: Option<OwnedFd>) -> Result<(Option<Network>, Vec<Card>), Error> {
    let mut network = Network::open(namespace)?;
    let cards = network.join()?;
    for left in network.left()? {
        tracing::info!(name = left.name, reason = ?left.reason, "the guest does not get an interface");
    }
    Ok((Some(network), cards))
}

const VSOCK: &str = "vsock.sock";

/// Where the VMM takes commands.
const CONTROL: &str = "vmm.sock";

/// Deadlines are kept here, where the death of the VMM is seen too.
pub(crate) fn no_limit() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(0)
}

/// Waits for the agent's first words, the VMM's death or the deadline, whatever comes first.
async fn hello(
    ready: StdUnixStream,
    vmm: &Vmm,
    console: &Console,
    deadline: Duration,
) -> Result<Hello, Error> {
    ready.set_nonblocking(true).map_err(make("a socket pair"))?;
    let mut ready = UnixStream::from_std(ready).map_err(make("a socket pair"))?;
    let begin = Instant::now();
    let mut bytes = [0; Hello::LEN];
    let heard = tokio::select! {
        biased;
        heard = timeout(deadline, ready.read_exact(&mut bytes)) => heard,
        () = vmm.ended() => Ok(Err(io::ErrorKind::UnexpectedEof.into())),
    };
    let tail = || ConsoleTail(Some(console.last_lines(CONSOLE_LINES)));
    match heard {
        Ok(Ok(_)) => return Ok(Hello::from_bytes(&bytes)?),
        Ok(Err(error)) => tracing::debug!(%error, "the guest says nothing any more"),
        Err(_) => {
            return Err(Error::BootDeadline {
                seconds: deadline.as_secs(),
                console: tail(),
            });
        }
    }
    // A process closes what it has open before it has ended, and a machine takes its time for what
    // is between: as long as a boot may take, its death is waited for, which is the reason.
    let patience = deadline.saturating_sub(begin.elapsed()).max(DEATH);
    match timeout(patience, vmm.ended()).await {
        Ok(()) => Err(Error::BootDeath {
            death: vmm.death(),
            console: tail(),
        }),
        Err(_) => Err(Error::BootHangUp {
            seconds: begin.elapsed().as_secs(),
            console: tail(),
        }),
    }
}

/// Adds the guest's own times to the trace and returns where its clock begins there. What the
/// guest says is taken for no more than lies between the VMM's start and now.
fn draw_boot(trace: &Trace, spawned_ns: u64, hello: Hello) -> u64 {
    let now_ns = trace.now_ns();
    let lasted_ns = now_ns - spawned_ns;
    let ready_ns = hello.ready_ns.min(lasted_ns);
    let main_ns = hello.main_ns.min(ready_ns);
    let epoch_ns = now_ns - ready_ns;
    trace.add("vm made, kernel entered", spawned_ns, epoch_ns);
    trace.add("kernel booted", epoch_ns, epoch_ns + main_ns);
    trace.add("agent ready", epoch_ns + main_ns, now_ns);
    epoch_ns
}

/// Waits for a connection with a deadline; the VMM's death ends it.
async fn connected<T>(
    (vmm, console): (&Vmm, &Console),
    doing: &'static str,
    patience: Duration,
    connection: impl Future<Output = io::Result<T>>,
) -> Result<T, Error> {
    tokio::select! {
        biased;
        result = timeout(patience, connection) => match result {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(source)) => Err(broken(doing, vmm, console, source).await),
            Err(_) => Err(Error::CallDeadline {
                doing,
                seconds: patience.as_secs(),
            }),
        },
        () = vmm.ended() => Err(death(doing, vmm, console)),
    }
}

/// Why a connection broke: mostly because the VMM died, which is then told.
async fn broken(doing: &'static str, vmm: &Vmm, console: &Console, source: io::Error) -> Error {
    match timeout(DEATH, vmm.ended()).await {
        Ok(()) => death(doing, vmm, console),
        Err(_) => Error::Connection { doing, source },
    }
}

fn death(doing: &'static str, vmm: &Vmm, console: &Console) -> Error {
    let death = vmm.death();
    let lines = (!death.is_dismissal()).then(|| console.last_lines(CONSOLE_LINES));
    Error::Death {
        doing,
        death,
        console: ConsoleTail(lines),
    }
}

fn make(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Make { what, source }
}
