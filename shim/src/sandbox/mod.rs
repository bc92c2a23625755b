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
    time::Duration,
};

use protocol::{
    agent::{ConfigureGuestRequest, ConfigureGuestResponse, SharedDirectory},
    agent_ttrpc::AgentClient,
};
use tokio::sync::Notify;

mod agent;
mod attachment;
mod boot;
mod calls;
pub mod console;
mod disks;
mod error;
mod frames;
mod machine;
mod mapped;
mod plugging;
mod pulse;
mod resources;
mod shared;
mod state;
mod trace;
mod vmm;

pub(crate) use calls::no_limit;
pub use console::Console;
pub use error::{ConsoleTail, Error};
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
    boot::{draw_boot, hello},
    calls::{CALL, connected, death},
    mapped::Mapped,
    plugging::Wires,
    vmm::{Verdict, Vmm},
};
use crate::{
    cgroup::{self, Admission, CgroupPlan, HostCgroup},
    cni,
    hooks::{HostHooks, Moment},
    id::{ContainerId, Namespace},
    network::{Card, Network},
    sys,
};

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
        let (mut network, cards) = match plan.purpose {
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
        let images = parts.media.images.iter().chain([&parts.resources.image]);
        let mapped = Mapped::of(images).map_err(make("a descriptor"))?;
        let config = machine::compose(&mut launch, plan.size, parts);
        if let Some(network) = &mut network {
            network.plugged_in_order(machine::card_slots(&config));
        }
        state.record(&Made::Vmm)?;
        let vmm = Vmm::launch(launch, &config, mapped).map_err(Error::Launch)?;
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

    /// Where it is noted that the agent was heard.
    pub(crate) fn signs(&self) -> &Signs {
        &self.signs
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

fn make(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Make { what, source }
}
