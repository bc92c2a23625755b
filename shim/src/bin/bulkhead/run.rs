//! `bulkhead run`: one container, from the bundle or image to its exit
//! status.
//!
//! In the foreground this process is the pod's, too; detached, or as a member
//! of another's pod, it is `create` and `start`.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    pin::pin,
};

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use shim::{
    bundle::{Role, SizeRequest},
    container::{Signals, Terminal},
    id::{ContainerId, Namespace},
    oci::{Kept, Relay, Request, Server},
    pod::{self, Input, NewContainer, Pod, PodPlan, ProcessId, Root, Stdio},
    sandbox::Trace,
};

use super::{
    cli::{Global, RunArgs},
    home,
    new::{New, Unattended, possible, write_pid},
    run_image::{self, Place},
    say::{complain, say},
};

/// A signal that came before everything was started.
#[derive(Debug, thiserror::Error)]
#[error("interrupted by {0}")]
pub(crate) struct Interrupted(pub(crate) Signal);

/// Runs the container and returns its exit status.
pub(crate) fn run(global: &Global, args: &RunArgs, trace: &Trace) -> anyhow::Result<u8> {
    let reading = trace.span("config read");
    Namespace::parse(&global.namespace)?;
    if let Some(bundle) = bundle(args) {
        let new = New::load(global, (&args.target, &bundle), &args.make)?;
        drop(reading);
        return match args.detach {
            true => detached(global, args, new, None, trace),
            false => foreground(global, args, new, Stdin::Inherited, trace),
        };
    }
    possible(&args.make)?;
    if args.keep {
        bail!(
            "--keep is not possible with an image: what it is run from ends with the command; use --detach, \
             or name a bundle by --bundle"
        );
    }
    if args.detach && (args.image_flags.interactive || args.image_flags.tty) {
        bail!(
            "--detach is not possible with --interactive and --tty: there is no attaching to it later; leave \
             them out, and use `bulkhead exec --tty`"
        );
    }
    let mut image = run_image::prepare(&global.root, args)?;
    let request = SizeRequest::default();
    let mut new = New::of(global, image.id.clone(), image.bundle, request)?;
    new.root = Root::Image(image.upper);
    new.media = std::mem::take(&mut image.media);
    new.size.memory_mib += image.overhead_mib;
    new.attach = image.attach.take();
    if args.detach {
        drop(reading);
        return detached_image(global, args, new, image.place, trace);
    }
    let stdin = match args.image_flags.interactive {
        true => Stdin::Inherited,
        false => Stdin::Nothing,
    };
    // What keeps the bundle's files stays here until the container is over.
    let _place = image.place;
    drop(reading);
    foreground(global, args, new, stdin, trace)
}

/// The bundle that is to be run: the one that is named, or, as with other runtimes, this directory
/// if it is one and nothing is said that only an image can have.
fn bundle(args: &RunArgs) -> Option<PathBuf> {
    let here = || {
        let named = ContainerId::parse(&args.target).is_ok() && args.command.is_empty();
        (named && Path::new("config.json").is_file()).then(|| PathBuf::from("."))
    };
    args.bundle.clone().or_else(here)
}

/// What the container reads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stdin {
    Inherited,
    Nothing,
}

/// Makes it in this process and returns its exit status.
fn foreground(
    global: &Global,
    args: &RunArgs,
    mut new: New,
    stdin: Stdin,
    trace: &Trace,
) -> anyhow::Result<u8> {
    if let Role::Member { sandbox } = new.bundle.role() {
        bail!(
            "a member of the pod of {sandbox} cannot be run in the foreground; use --detach, or create and start"
        );
    }
    if args.make.console_socket.is_some() {
        bail!("cannot use console socket if bulkhead will not detach or allocate tty");
    }
    let mut plan = new.plan(global, &args.make);
    let terminal = match new.bundle.terminal() {
        true => Some(Terminal::find()?),
        false => None,
    };
    // While this process has one thread.
    let relay = trace_span(trace, || {
        let stand = new.stand(Stdio::null(), false)?;
        stand.spawn().map_err(anyhow::Error::from)
    })?;
    if let Err(error) = new.surround(&mut plan, &relay) {
        relay.discard();
        return Err(error);
    }
    let record = new.record(&relay);
    let stdio = streams(stdin).context("cannot relay the standard streams")?;
    let mut container = new.container(stdio, &relay);
    container.terminal_size = terminal.as_ref().and_then(Terminal::size);
    let job = Job {
        plan,
        container,
        record,
        relay,
        terminal,
        pid_file: args.make.pid_file.clone(),
        keep: args.keep,
        trace_to: args.trace.clone(),
    };
    let relay_pid = job.relay.pid;
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(job.run(trace));
    // Its socket is closed by now, so it ends whatever it was told.
    shim::oci::reap(relay_pid);
    outcome
}

fn trace_span<T>(trace: &Trace, work: impl FnOnce() -> T) -> T {
    let _span = trace.span("relay spawned");
    work()
}

/// Makes and starts the container of an image, prints its name, and returns. What keeps the
/// bundle's files goes to the pod's process.
fn detached_image(
    global: &Global,
    args: &RunArgs,
    new: New,
    place: Place,
    trace: &Trace,
) -> anyhow::Result<u8> {
    let id = new.id.clone();
    let log = place.log(&args.image_flags.store.image_root)?;
    let unattended = Unattended {
        log,
        kept: Kept {
            place: Box::new(place),
            remove: args.image_flags.rm,
        },
    };
    let status = detached(global, args, new, Some(unattended), trace)?;
    say(id)?;
    Ok(status)
}

/// Makes and starts it, and returns.
fn detached(
    global: &Global,
    args: &RunArgs,
    new: New,
    unattended: Option<Unattended>,
    trace: &Trace,
) -> anyhow::Result<u8> {
    let id = new.id.clone();
    let relay = new.detached(global, &args.make, unattended, trace)?;
    let home = home(global)?;
    let started = home
        .ask(&id, &Request::Start { id: id.to_string() })
        .map_err(anyhow::Error::from)
        .and_then(|_| write_pid(args.make.pid_file.as_deref(), relay.pid));
    if let Err(error) = started {
        home.delete(&id, true)?;
        relay.reap();
        return Err(error);
    }
    Ok(0)
}

/// Everything that was read and checked.
struct Job {
    plan: PodPlan,
    container: NewContainer,
    record: shim::oci::Record,
    relay: Relay,
    terminal: Option<Terminal>,
    pid_file: Option<PathBuf>,
    keep: bool,
    trace_to: Option<Option<PathBuf>>,
}

impl Job {
    async fn run(self, trace: &Trace) -> anyhow::Result<u8> {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let id = self.container.id.clone();
        let first = ProcessId::first(id.clone());
        let relay = self.relay;
        let starting = async {
            let pod = Pod::start(self.plan, trace).await?;
            pod.create(self.container).await?;
            let server = Server::new(pod)?;
            server.adopt(self.record, Some(relay.socket))?;
            Ok::<_, pod::Error>(server)
        };
        let server = unless_ended(&mut signals, starting).await??;
        let pod = server.pod();
        write_pid(self.pid_file.as_deref(), relay.pid)?;
        let raw = self.terminal.as_ref().map(Terminal::raw).transpose();
        let raw = raw.context("cannot change the mode of the terminal")?;

        let attending = async |signals: &mut Signals| {
            unless_ended(signals, pod.start_process(&first)).await??;
            keep_trace(pod, self.trace_to.as_ref())?;
            attend(pod, &first, signals, self.terminal.as_ref()).await
        };
        let ending = async {
            let status = attending(&mut signals).await;
            let lost = pod.sandbox().failure("running the container");
            let ended = async {
                match self.keep {
                    true => server.abandon().await,
                    false => server.remove(&id).await,
                }
            };
            unhurried(pod, &mut signals, ended).await;
            (status, lost)
        };
        let ((status, lost), ()) = tokio::join!(ending, server.run());
        drop(raw);
        let status = status?;
        if let Some(error) = lost {
            return Err(pod::Error::from(error).into());
        }
        if let Some(None) = self.trace_to {
            complain(trace.record().waterfall());
        }
        Ok(status)
    }
}

/// This process's own streams.
fn streams(stdin: Stdin) -> io::Result<Stdio> {
    Ok(Stdio {
        stdin: match stdin {
            Stdin::Inherited => Input::From(io::stdin().as_fd().try_clone_to_owned()?),
            Stdin::Nothing => Input::Nothing,
        },
        stdout: Some(io::stdout().as_fd().try_clone_to_owned()?),
        stderr: Some(io::stderr().as_fd().try_clone_to_owned()?),
        ..Stdio::default()
    })
}

/// Does `work` unless a signal asks for the end; what the work has made is then undone.
pub(crate) async fn unless_ended<T>(
    signals: &mut Signals,
    work: impl Future<Output = T>,
) -> Result<T, Interrupted> {
    tokio::select! {
        biased;
        signal = signals.end() => Err(Interrupted(signal)),
        done = work => Ok(done),
    }
}

/// Waits for the pod's end; who asks for the end meanwhile has had enough of waiting.
async fn unhurried(pod: &Pod, signals: &mut Signals, ended: impl Future<Output = ()>) {
    let mut ended = pin!(ended);
    loop {
        tokio::select! {
            biased;
            () = &mut ended => return,
            _ = signals.end() => pod.sandbox().hurry(),
        }
    }
}

/// Passes signals on until the process has ended and its output was written.
async fn attend(
    pod: &Pod,
    first: &ProcessId,
    signals: &mut Signals,
    terminal: Option<&Terminal>,
) -> anyhow::Result<u8> {
    let mut end = pin!(pod.wait(first));
    loop {
        tokio::select! {
            exit = &mut end => return Ok(u8::try_from(exit?.status).unwrap_or(u8::MAX)),
            signal = signals.next() => {
                match pass_on(pod, first, signal, terminal).await {
                    Ok(()) => {}
                    Err(error) if Signals::ask_for_the_end(signal) && error.is_silence() => {
                        // Nothing in the guest can take it, and whoever sent it wants this to end.
                        tracing::warn!(%signal, "the guest does not take the signal: its machine is ended");
                        pod.sandbox().kill();
                    }
                    Err(error) => {
                        tracing::debug!(%signal, %error, "the signal did not reach the container");
                    }
                }
            }
        }
    }
}

async fn pass_on(
    pod: &Pod,
    first: &ProcessId,
    signal: Signal,
    terminal: Option<&Terminal>,
) -> Result<(), pod::Error> {
    match (signal, terminal) {
        (Signal::SIGWINCH, None) => Ok(()),
        (Signal::SIGWINCH, Some(terminal)) => match terminal.size() {
            Some(size) => pod.resize(first, size).await,
            None => Ok(()),
        },
        (signal, _) => pod.kill(first, signal as i32, false).await,
    }
}

fn keep_trace(pod: &Pod, to: Option<&Option<PathBuf>>) -> anyhow::Result<()> {
    let sandbox = pod.sandbox();
    sandbox.save_trace()?;
    if let Some(Some(path)) = to {
        fs::write(path, sandbox.trace().record().to_json())
            .with_context(|| format!("cannot write the trace to {}", path.display()))?;
    }
    Ok(())
}
