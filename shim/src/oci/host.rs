//! A pod's process, made by `bulkhead create`: a copy of the command, in a
//! session of its own, which outlives it.
//!
//! ```text
//!   create ── copy ──► pod's process: boots the machine, makes the container
//!      ◄───── reply ──┤
//!   exits             serves the control socket until the last container is deleted
//! ```
//!
//! If `create` is killed before the reply, its end of the connection closes: the
//! pod's process then undoes everything.

use std::{
    any::Any,
    fs::{File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
};

use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::{
    client::Error,
    message::{self, Reply},
    record::Record,
    server::{Server, lost, reply_of},
};
use crate::{
    container::Signals,
    log,
    pod::{self, NewContainer, Pod, PodPlan, ProcessId},
    sandbox::Trace,
    sys::{self, Fork},
};

/// What a pod's process makes first.
#[derive(Debug)]
pub struct Hosted {
    /// The pod.
    pub plan: PodPlan,
    /// Its first container.
    pub new: NewContainer,
    /// Its record.
    pub record: Record,
    /// The socket of its relay.
    pub relay: OwnedFd,
    /// Whether its log lines go where the command's go, too, rather than to the state directory.
    pub keep_log: bool,
    /// What it keeps besides.
    pub kept: Option<Kept>,
}

/// What a pod's process keeps for a container that no client asks for.
#[derive(Debug)]
pub struct Kept {
    /// Something that ends with the pod.
    pub place: Box<dyn Any + Send>,
    /// Whether the container is removed at its end.
    pub remove: bool,
}

/// Makes a pod's process and waits until its first container is made.
///
/// # Errors
/// When it cannot be made; then nothing is left of it.
pub fn host_detached(mut hosted: Hosted, trace: &Trace) -> Result<(), Error> {
    let (mut ours, theirs) = StdUnixStream::pair().map_err(Error::Io)?;
    if sys::fork().map_err(Error::Io)? == Fork::Child {
        drop(ours);
        // Whatever happens, the reply is the one word to the parent.
        let status = match detached(hosted, theirs, trace) {
            Ok(()) => 0,
            Err(error) => {
                tracing::error!(%error, "the pod's process ended");
                1
            }
        };
        sys::exit_copy(status);
    }
    // It is the copy's now, which ends it, too.
    std::mem::forget(hosted.kept.take());
    drop((theirs, hosted));
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut ours, &mut bytes).map_err(Error::Io)?;
    let text = bytes.get(4..).unwrap_or_default();
    match serde_json::from_slice(text).unwrap_or(lost()) {
        Reply::Ok(_) => Ok(()),
        Reply::Error { kind, message } => Err(Error::Refused { kind, message }),
    }
}

fn detached(hosted: Hosted, reply: StdUnixStream, trace: &Trace) -> io::Result<()> {
    setsid()?;
    // No directory, and none of the caller's streams, is held for a container's life.
    chdir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    if !hosted.keep_log {
        log::redirect(None);
    }
    reply.set_nonblocking(true)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(run(hosted, reply, trace))
}

async fn run(mut hosted: Hosted, reply: StdUnixStream, trace: &Trace) -> io::Result<()> {
    let mut signals = Signals::catch()?;
    let mut reply = UnixStream::from_std(reply)?;
    let keep_log = hosted.keep_log;
    let kept = hosted.kept.take();
    let first = ProcessId::first(hosted.new.id.clone());
    let mut nothing = [0];
    let made = tokio::select! {
        made = make(hosted, trace) => made,
        // The command says nothing: it is gone.
        _ = reply.read(&mut nothing) => return Ok(()),
        _ = signals.end() => return Ok(()),
    };
    let server = match made {
        Ok(server) => server,
        Err(error) => {
            let bytes = message::encode(&reply_of(&Err(error)))?;
            return reply.write_all(&bytes).await;
        }
    };
    if !keep_log {
        let path = server.pod().sandbox().path().join("log");
        log::redirect(OpenOptions::new().append(true).create(true).open(path).ok());
    }
    let told = reply.write_all(&message::encode(&reply_of(&Ok(())))?).await;
    if told.is_err() {
        // The command went away in this moment: nobody knows of the container.
        server.pod().shutdown().await;
        return Ok(());
    }
    drop(reply);
    let pod = server.pod();
    let watching = async {
        pod.sandbox().ended().await;
        if let Some(death) = pod.sandbox().failure("running the pod") {
            tracing::warn!("{}", crate::text::chain(&death));
        }
        std::future::pending::<()>().await;
    };
    let removing = async {
        if kept.as_ref().is_some_and(|kept| kept.remove) {
            // However it ends, and whoever is told before.
            let _ = pod.wait(&first).await;
            server.remove(&first.container).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = server.run() => {}
        () = watching => {}
        () = removing => {}
    }
    Ok(())
}

async fn make(hosted: Hosted, trace: &Trace) -> Result<Server, pod::Error> {
    let pod = Pod::start(hosted.plan, trace).await?;
    pod.create(hosted.new).await?;
    pod.sandbox().save_trace().map_err(pod::Error::from)?;
    let server = Server::new(pod)?;
    server.end_when_idle();
    server.adopt(hosted.record, Some(hosted.relay))?;
    Ok(server)
}
