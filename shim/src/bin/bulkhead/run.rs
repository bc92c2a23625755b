//! `bulkhead run`: one container, from the bundle to its exit status.

use std::{fs, path::PathBuf, pin::pin, time::Duration};

use anyhow::Context as _;
use nix::sys::{signal::Signal, sysinfo::sysinfo};
use shim::{
    bundle::{self, Bundle, GuestSpec},
    container::{self, Signals, Terminal, Wiring},
    id::{ContainerId, Namespace},
    sandbox::{Plan, Sandbox, Trace},
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
    plan: Plan,
    id: ContainerId,
    bundle: Bundle,
    terminal: Option<Terminal>,
    trace_to: Option<Option<PathBuf>>,
}

impl Job {
    async fn run(self, trace: &Trace) -> anyhow::Result<u8> {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let size = self.terminal.as_ref().and_then(Terminal::size);

        // The machine boots while the configuration is rewritten.
        let booting = async {
            tokio::join!(
                Sandbox::start(self.plan, trace),
                rewritten(&self.bundle, size)
            )
        };
        let (sandbox, spec) = unless_ended(&mut signals, booting).await?;
        let sandbox = sandbox?;

        let wiring = Wiring::inherited(self.terminal.is_some())
            .context("cannot relay the standard streams")?;
        let creating = async {
            let configured = async { sandbox.configure().await.map_err(container::Error::from) };
            let created = container::create(&sandbox, &self.id, &spec, wiring);
            tokio::try_join!(configured, created)
        };
        let (guest, created) = unless_ended(&mut signals, creating).await??;
        tracing::debug!(
            kernel = shim::text::printable(&guest.kernel_release, 80),
            agent = shim::text::printable(&guest.agent_version, 80),
            "the guest is ready"
        );

        let raw = self.terminal.as_ref().map(Terminal::raw).transpose();
        let raw = raw.context("cannot change the mode of the terminal")?;
        let running = unless_ended(&mut signals, created.start()).await??;
        keep_trace(&sandbox, self.trace_to.as_ref())?;

        let status = attend(&running, &mut signals, self.terminal.as_ref()).await?;
        drop(running);
        drop(raw);
        if let Some(None) = self.trace_to {
            eprint!("{}", trace.record().waterfall());
        }
        Ok(status)
    }
}

async fn rewritten(bundle: &Bundle, terminal_size: Option<(u16, u16)>) -> GuestSpec {
    bundle.for_guest(terminal_size)
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
    running: &container::Running<'_>,
    signals: &mut Signals,
    terminal: Option<&Terminal>,
) -> anyhow::Result<u8> {
    let mut end = pin!(running.wait());
    let status = loop {
        tokio::select! {
            status = &mut end => break status?,
            signal = signals.next() => {
                if let Err(error) = pass_on(running, signal, terminal).await {
                    tracing::debug!(%signal, %error, "the signal did not reach the container");
                }
            }
        }
    };
    tokio::select! {
        () = running.drained() => {}
        signal = signals.end() => tracing::warn!(%signal, "the rest of the container's output is dropped"),
    }
    Ok(status)
}

async fn pass_on(
    running: &container::Running<'_>,
    signal: Signal,
    terminal: Option<&Terminal>,
) -> Result<(), container::Error> {
    match (signal, terminal) {
        (Signal::SIGWINCH, None) => Ok(()),
        (Signal::SIGWINCH, Some(terminal)) => match terminal.size() {
            Some(size) => running.resize(size).await,
            None => Ok(()),
        },
        (signal, _) => running.signal(signal as i32).await,
    }
}

fn keep_trace(sandbox: &Sandbox, to: Option<&Option<PathBuf>>) -> anyhow::Result<()> {
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
) -> anyhow::Result<Plan> {
    let request = bundle::SizeRequest {
        memory_mib: args.memory,
        cpus: args.cpus,
    };
    let host_mib = sysinfo()
        .context("cannot read the host's memory")?
        .ram_total()
        >> 20;
    Ok(Plan {
        state_root: global.root.clone(),
        namespace,
        id,
        files: args.files.files(),
        size: bundle::size(bundle.spec(), request, host_mib)?,
        root: Some(
            bundle
                .share()
                .context("cannot share the root file system")?,
        ),
        hostname: bundle.spec().hostname().clone().unwrap_or_default(),
        deadline: Duration::from_secs(args.files.start_timeout),
    })
}
