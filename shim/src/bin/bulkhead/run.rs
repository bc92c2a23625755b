//! `bulkhead run`: one container, from the bundle or image to its exit status.

use std::{fs, io, os::fd::AsFd, path::PathBuf, pin::pin, time::Duration};

use anyhow::Context as _;
use nix::sys::{signal::Signal, sysinfo::sysinfo};
use shim::{
    bundle::{self, Bundle},
    container::{Signals, Terminal},
    id::{ContainerId, Namespace},
    pod::{self, NewContainer, Pod, PodPlan, ProcessId, Root, Stdio},
    sandbox::{Media, Purpose, Size, Trace},
};

use super::{
    cli::{Global, RunArgs},
    run_image,
};

/// A signal that came before everything was started.
#[derive(Debug, thiserror::Error)]
#[error("interrupted by {0}")]
pub(crate) struct Interrupted(pub(crate) Signal);

/// Runs the container and returns its exit status.
pub(crate) fn run(global: &Global, args: &RunArgs, trace: &Trace) -> anyhow::Result<u8> {
    let reading = trace.span("config read");
    let namespace = Namespace::parse(&args.namespace)?;
    let Some(path) = &args.bundle else {
        let mut image = run_image::prepare(&global.root, args)?;
        let size = size(&image.bundle, bundle::SizeRequest::default())?;
        let mut plan = plan(
            global,
            args,
            (namespace, image.id.clone()),
            &image.bundle,
            size,
        );
        plan.size.memory_mib += image.overhead_mib;
        plan.media = std::mem::take(&mut image.media);
        let stdin = match args.image_flags.interactive {
            true => Stdin::Inherited,
            false => Stdin::Nothing,
        };
        // What keeps the bundle's files stays here until the container is over.
        let (bundle, root) = (image.bundle, Root::Image(image.upper));
        let _place = image.place;
        let job = Job::new(plan, bundle, root, stdin, args)?;
        drop(reading);
        return job.finish(trace);
    };
    let id = ContainerId::parse(&args.target)?;
    let bundle = Bundle::load(path)?;
    let request = bundle::SizeRequest {
        memory_mib: args.memory.map(|memory| memory.0 >> 20),
        cpus: args.cpus.map(|cpus| cpus.0.div_ceil(1000)),
    };
    let size = size(&bundle, request)?;
    let plan = plan(global, args, (namespace, id), &bundle, size);
    let job = Job::new(plan, bundle, Root::Bundle, Stdin::Inherited, args)?;
    drop(reading);
    job.finish(trace)
}

/// What the container reads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stdin {
    Inherited,
    Nothing,
}

/// Everything that was read and checked.
struct Job {
    plan: PodPlan,
    bundle: Bundle,
    root: Root,
    stdin: Stdin,
    terminal: Option<Terminal>,
    trace_to: Option<Option<PathBuf>>,
}

impl Job {
    fn new(
        plan: PodPlan,
        bundle: Bundle,
        root: Root,
        stdin: Stdin,
        args: &RunArgs,
    ) -> anyhow::Result<Self> {
        let terminal = match bundle.terminal() {
            true => Some(Terminal::find()?),
            false => None,
        };
        Ok(Self {
            plan,
            bundle,
            root,
            stdin,
            terminal,
            trace_to: args.trace.clone(),
        })
    }

    /// Runs it to its end.
    fn finish(self, trace: &Trace) -> anyhow::Result<u8> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime")?
            .block_on(self.run(trace))
    }

    async fn run(self, trace: &Trace) -> anyhow::Result<u8> {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let new = NewContainer {
            id: self.plan.id.clone(),
            bundle: self.bundle,
            root: self.root,
            stdio: streams(self.stdin).context("cannot relay the standard streams")?,
            terminal_size: self.terminal.as_ref().and_then(Terminal::size),
            pid: None,
            placeholder: false,
        };
        let first = ProcessId::first(self.plan.id.clone());
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
fn streams(stdin: Stdin) -> io::Result<Stdio> {
    Ok(Stdio {
        stdin: match stdin {
            Stdin::Inherited => Some(io::stdin().as_fd().try_clone_to_owned()?),
            Stdin::Nothing => None,
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

fn size(bundle: &Bundle, request: bundle::SizeRequest) -> anyhow::Result<Size> {
    let host_mib = sysinfo()
        .context("cannot read the host's memory")?
        .ram_total()
        >> 20;
    Ok(bundle::size(bundle.spec(), request, host_mib)?)
}

fn plan(
    global: &Global,
    args: &RunArgs,
    (namespace, id): (Namespace, ContainerId),
    bundle: &Bundle,
    size: Size,
) -> PodPlan {
    PodPlan {
        state_root: global.root.clone(),
        namespace,
        id,
        files: args.files.files(),
        size,
        purpose: Purpose::Containers,
        media: Media::default(),
        hostname: bundle.spec().hostname().clone().unwrap_or_default(),
        deadline: Duration::from_secs(args.files.start_timeout),
    }
}
