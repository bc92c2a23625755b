//! What `create` and `run` have in common: everything that is read, checked
//! and made before the pod is asked.

use std::{
    fs,
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use nix::sys::sysinfo::sysinfo;
use shim::{
    bundle::{self, Bundle, Role},
    cgroup::{CgroupPlan, Layout},
    cni,
    hooks::HostHooks,
    id::{ContainerId, Namespace},
    oci::{
        Client, Console, Create, Found, Hosted, Kept, Record, Relay, Request, Stand, host_detached,
    },
    pod::{Input, NewContainer, PodPlan, Root, Stdio},
    sandbox::{Media, Pace, Purpose, Size, Surroundings, Trace},
};

use super::{
    cli::{Global, MakeArgs},
    home,
};

/// A container that is to be made.
#[derive(Debug)]
pub(crate) struct New {
    /// Its name.
    pub(crate) id: ContainerId,
    namespace: Namespace,
    /// Its configuration.
    pub(crate) bundle: Bundle,
    /// Where its root file system comes from.
    pub(crate) root: Root,
    /// What its machine has as memory and as disks.
    pub(crate) media: Media,
    /// How large its machine is.
    pub(crate) size: Size,
    /// Networks that it is attached to.
    pub(crate) attach: Option<cni::Plan>,
}

/// What a container has that nobody attends, and that was not made by a client.
pub(crate) struct Unattended {
    /// Where its output goes.
    pub(crate) log: fs::File,
    /// What the pod's process keeps for it.
    pub(crate) kept: Kept,
}

impl New {
    /// Reads and checks the one of a bundle.
    pub(crate) fn load(
        global: &Global,
        (id, bundle): (&str, &Path),
        args: &MakeArgs,
    ) -> anyhow::Result<Self> {
        possible(args)?;
        let request = bundle::SizeRequest {
            memory_mib: args.memory.map(|memory| memory.0 >> 20),
            cpus: args.cpus.map(|cpus| cpus.0.div_ceil(1000)),
        };
        let id = ContainerId::parse(id)?;
        Self::of(global, id, Bundle::load(bundle)?, request)
    }

    /// The one of a bundle that was read.
    pub(crate) fn of(
        global: &Global,
        id: ContainerId,
        bundle: Bundle,
        request: bundle::SizeRequest,
    ) -> anyhow::Result<Self> {
        let host_mib = sysinfo()
            .context("cannot read the host's memory")?
            .ram_total()
            >> 20;
        Ok(Self {
            id,
            namespace: Namespace::parse(&global.namespace)?,
            size: bundle::size(bundle.spec(), bundle.role(), request, host_mib)?,
            bundle,
            root: Root::Bundle,
            media: Media::default(),
            attach: None,
        })
    }

    /// The plan of a pod of its own.
    pub(crate) fn plan(&mut self, global: &Global, args: &MakeArgs) -> PodPlan {
        let spec = self.bundle.spec();
        PodPlan {
            state_root: global.root.clone(),
            namespace: self.namespace.clone(),
            id: self.id.clone(),
            files: args.files.files(),
            size: self.size,
            purpose: Purpose::Containers,
            surroundings: Surroundings {
                cgroup: Some(CgroupPlan::of(spec, &self.id, layout(global))),
                attach: self.attach.take(),
                ..Surroundings::default()
            },
            media: std::mem::take(&mut self.media),
            hostname: spec.hostname().clone().unwrap_or_default(),
            deadline: Duration::from_secs(args.files.start_timeout),
            pace: Pace::default(),
        }
    }

    /// Completes the plan by what its relay has.
    pub(crate) fn surround(&self, plan: &mut PodPlan, relay: &Relay) -> anyhow::Result<()> {
        let network = fs::File::open(format!("/proc/{}/ns/net", relay.pid));
        let network = network.context("cannot open the container's network namespace")?;
        plan.surroundings.network = Some(network.into());
        plan.surroundings.hooks = Some(HostHooks::new(&self.id, &self.bundle, relay.pid));
        plan.surroundings.relay = Some(relay.pid);
        Ok(())
    }

    /// What its relay is made from.
    pub(crate) fn stand(&self, stdio: Stdio, terminal: bool) -> anyhow::Result<Stand> {
        let spec = self.bundle.spec();
        let process = spec.process().as_ref();
        let arguments = process.and_then(|process| process.args().clone());
        let arguments = arguments.unwrap_or_default();
        Ok(Stand::for_container(&self.bundle)?.called(arguments, stdio, terminal))
    }

    /// Its record.
    pub(crate) fn record(&self, relay: &Relay) -> Record {
        Record::new(&self.id, &self.bundle, relay.pid)
    }

    /// The container for its pod.
    pub(crate) fn container(self, stdio: Stdio, relay: &Relay) -> NewContainer {
        let placeholder = *self.bundle.role() == Role::Sandbox;
        NewContainer {
            id: self.id,
            bundle: self.bundle,
            root: self.root,
            stdio,
            terminal_size: None,
            pid: Some(relay.pid),
            placeholder,
        }
    }

    /// Makes it, detached from this command; returns its relay, a child of this process.
    pub(crate) fn detached(
        mut self,
        global: &Global,
        args: &MakeArgs,
        unattended: Option<Unattended>,
        trace: &Trace,
    ) -> anyhow::Result<Relay> {
        let sandbox = match self.bundle.role() {
            Role::Member { sandbox } => Some(sandbox.clone()),
            Role::First | Role::Sandbox => None,
        };
        // Before anything is made that would have to be undone.
        let plan = match sandbox {
            Some(_) => None,
            None => Some(self.plan(global, args)),
        };
        let (stdio, kept) = match unattended {
            Some(unattended) => (Streams::log(&unattended.log)?, Some(unattended.kept)),
            None => {
                let console = args.console_socket.as_deref();
                (Streams::of(self.bundle.terminal(), console)?, None)
            }
        };
        let stand = self.stand(stdio.stdio()?, self.bundle.terminal())?;
        let relay = stand.spawn()?;
        let made = match (sandbox, plan) {
            (Some(sandbox), _) => self.join(global, &sandbox, &stdio, &relay),
            (None, Some(plan)) => self.host(global, (plan, kept), stdio, &relay, trace),
            (None, None) => unreachable!("a container without a sandbox has a plan"),
        };
        if let Err(error) = made {
            relay.discard();
            return Err(error);
        }
        Ok(relay)
    }

    /// As the first of a pod of its own. Its process has no other streams than those that it
    /// carries: who reads the output waits until the last copy is closed.
    fn host(
        self,
        global: &Global,
        (mut plan, kept): (PodPlan, Option<Kept>),
        stdio: Streams,
        relay: &Relay,
        trace: &Trace,
    ) -> anyhow::Result<()> {
        self.surround(&mut plan, relay)?;
        let hosted = Hosted {
            plan,
            record: self.record(relay),
            relay: relay
                .socket
                .try_clone()
                .context("cannot hold the relay's socket")?,
            new: self.container(stdio.into_stdio()?, relay),
            keep_log: global.debug && global.log.is_some(),
            kept,
        };
        Ok(host_detached(hosted, trace)?)
    }

    /// As a member of another's pod.
    fn join(
        &self,
        global: &Global,
        sandbox: &ContainerId,
        stdio: &Streams,
        relay: &Relay,
    ) -> anyhow::Result<()> {
        let client = match home(global)?.find(sandbox)? {
            Found::Living(client) => client,
            _ => bail!("the sandbox {sandbox} of the container does not run; start it first"),
        };
        let request = Request::Create(Create {
            id: self.id.to_string(),
            bundle: self.bundle.path().to_owned(),
            pid: relay.pid,
            systemd_cgroup: global.systemd_cgroup,
        });
        send(client, &request, relay.socket.as_fd(), stdio)
    }
}

/// Refuses what cannot be had in a virtual machine.
pub(crate) fn possible(args: &MakeArgs) -> anyhow::Result<()> {
    ensure!(
        args.preserve_fds == 0,
        "--preserve-fds {} is not possible: a virtual machine cannot be given descriptors; leave it out",
        args.preserve_fds
    );
    Ok(())
}

fn layout(global: &Global) -> Layout {
    match global.systemd_cgroup {
        true => Layout::Systemd,
        false => Layout::Path,
    }
}

/// Asks with a relay's socket and streams.
pub(crate) fn send(
    client: Client,
    request: &Request,
    relay: BorrowedFd<'_>,
    stdio: &Streams,
) -> anyhow::Result<()> {
    let mut descriptors = vec![relay];
    descriptors.extend(stdio.0.iter().map(AsFd::as_fd));
    client.ask(request, &descriptors)?;
    Ok(())
}

/// The streams of a process: a terminal, or this process's own three.
#[derive(Debug)]
pub(crate) struct Streams(Vec<OwnedFd>);

impl Streams {
    /// A terminal that is sent to `console`, or the streams that this process was started with.
    pub(crate) fn of(terminal: bool, console: Option<&Path>) -> anyhow::Result<Self> {
        match (terminal, console) {
            (true, Some(path)) => Ok(Self(vec![Console::send_to(path)?.into_fd()])),
            (true, None) => {
                bail!("cannot allocate tty if bulkhead will detach without setting console socket")
            }
            (false, Some(_)) => {
                bail!("cannot use console socket if bulkhead will not detach or allocate tty")
            }
            (false, None) => Self::inherited(),
        }
    }

    /// The streams that this process was started with.
    pub(crate) fn inherited() -> anyhow::Result<Self> {
        let all = [
            io::stdin().as_fd().try_clone_to_owned(),
            io::stdout().as_fd().try_clone_to_owned(),
            io::stderr().as_fd().try_clone_to_owned(),
        ];
        let all = all.into_iter().collect::<io::Result<_>>();
        Ok(Self(all.context("cannot hold the standard streams")?))
    }

    /// Nothing to read, and a log for what is printed.
    fn log(log: &fs::File) -> anyhow::Result<Self> {
        let all = || -> io::Result<Vec<OwnedFd>> {
            let null = fs::File::open("/dev/null")?;
            Ok(vec![
                null.into(),
                log.try_clone()?.into(),
                log.try_clone()?.into(),
            ])
        };
        Ok(Self(all().context("cannot hold the log")?))
    }

    /// A terminal that this process has.
    pub(crate) fn terminal(terminal: OwnedFd) -> Self {
        Self(vec![terminal])
    }

    /// Copies of them.
    pub(crate) fn stdio(&self) -> anyhow::Result<Stdio> {
        let copies: io::Result<Vec<OwnedFd>> = self.0.iter().map(OwnedFd::try_clone).collect();
        Self(copies.context("cannot hold the standard streams")?).into_stdio()
    }

    /// Themselves.
    fn into_stdio(self) -> anyhow::Result<Stdio> {
        let terminal = self.0.len() == 1;
        let mut streams = self.0.into_iter();
        let first = streams.next().context("no streams")?;
        if terminal {
            return Stdio::terminal(first).context("cannot hold the terminal");
        }
        Ok(Stdio {
            stdin: Input::From(first),
            stdout: streams.next(),
            stderr: streams.next(),
            ..Stdio::default()
        })
    }
}

/// Writes a pid to a file, in one step for those who wait for it.
pub(crate) fn write_pid(file: Option<&Path>, pid: u32) -> anyhow::Result<()> {
    let Some(file) = file else {
        return Ok(());
    };
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let new = file.with_file_name(format!(".{name}"));
    let written = || -> io::Result<()> {
        let mut options = fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o666);
        options.open(&new)?.write_all(pid.to_string().as_bytes())?;
        fs::rename(&new, file)
    };
    written().with_context(|| format!("cannot write the pid file {}", file.display()))
}
