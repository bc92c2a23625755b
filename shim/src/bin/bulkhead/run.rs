//! `bulkhead run`: one container, from the bundle to its exit status.

use std::{fs, io, os::fd::AsFd, path::PathBuf, pin::pin, time::Duration};

use anyhow::Context as _;
use nix::sys::{signal::Signal, sysinfo::sysinfo};
use shim::{
    bundle::{self, Bundle},
    container::{Signals, Terminal},
    id::{ContainerId, Namespace},
    pod::{self, NewContainer, Pod, PodPlan, ProcessId, Root, Stdio},
    sandbox::{Purpose, Trace},
};

use super::cli::{Global, RunArgs};

/// A signal that came before everything was started.
#[derive(Debug, thiserror::Error)]
#[error("interrupted by {0}")]
pub(crate) struct Interrupted(pub(crate) Signal);

/// Runs the container and returns its exit status.
pub(crate) fn run(global: &Global, args: &RunArgs, trace: &Trace) -> anyhow::Result<u8> {
    let reading = trace.span("config read");
    let id = ContainerId::parse(&args.id)?;
    let namespace = Namespace::parse(&args.namespace)?;
    let bundle = Bundle::load(&args.bundle)?;
    let plan = plan(global, args, (namespace, id.clone()), &bundle)?;
    let terminal = match bundle.terminal() {
        true => Some(Terminal::find()?),
        false => None,
    };
    drop(reading);
    let job = Job {
        plan,
        id,
        bundle,
        terminal,
        trace_to: args.trace.clone(),
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(job.run(trace))
}

/// Everything that was read and checked.
struct Job {
    plan: PodPlan,
    id: ContainerId,
    bundle: Bundle,
    terminal: Option<Terminal>,
    trace_to: Option<Option<PathBuf>>,
}

impl Job {
    async fn run(self, trace: &Trace) -> anyhow::Result<u8> {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let new = NewContainer {
            id: self.id.clone(),
            bundle: self.bundle,
            root: Root::Bundle,
            stdio: inherited().context("cannot relay the standard streams")?,
            terminal_size: self.terminal.as_ref().and_then(Terminal::size),
            pid: None,
            placeholder: false,
        };
        let first = ProcessId::first(self.id);
        let starting = async {
            let pod = Pod::start(self.plan, trace).await?;
            pod.create(new).await?;
            Ok::<_, pod::Error>(pod)
        };
        let pod = unless_ended(&mut signals, starting).await??;
        let raw = self.terminal.as_ref().map(Terminal::raw).transpose();
        let raw = raw.context("cannot change the mode of the terminal")?;
        unless_ended(&mut signals, pod.start_process(&first)).await??;
        keep_trace(&pod, self.trace_to.as_ref())?;

        let status = attend(&pod, &first, &mut signals, self.terminal.as_ref()).await?;
        let lost = pod.sandbox().death("running the container");
        pod.shutdown().await;
        drop(raw);
        if let Some(error) = lost {
            return Err(pod::Error::from(error).into());
        }
        if let Some(None) = self.trace_to {
            eprint!("{}", trace.record().waterfall());
        }
        Ok(status)
    }
}

/// This process's own streams. A file or pipe is duplicated, so that what the container's streams
/// do at their end is not done to ours.
fn inherited() -> io::Result<Stdio> {
    Ok(Stdio {
        stdin: Some(io::stdin().as_fd().try_clone_to_owned()?),
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
                if let Err(error) = pass_on(pod, first, signal, terminal).await {
                    tracing::debug!(%signal, %error, "the signal did not reach the container");
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

fn plan(
    global: &Global,
    args: &RunArgs,
    (namespace, id): (Namespace, ContainerId),
    bundle: &Bundle,
) -> anyhow::Result<PodPlan> {
    let request = bundle::SizeRequest {
        memory_mib: args.memory,
        cpus: args.cpus,
    };
    let host_mib = sysinfo()
        .context("cannot read the host's memory")?
        .ram_total()
        >> 20;
    Ok(PodPlan {
        state_root: global.root.clone(),
        namespace,
        id,
        files: args.files.files(),
        size: bundle::size(bundle.spec(), request, host_mib)?,
        purpose: Purpose::Containers,
        hostname: bundle.spec().hostname().clone().unwrap_or_default(),
        deadline: Duration::from_secs(args.files.start_timeout),
    })
}
