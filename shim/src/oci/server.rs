//! A pod's process: it serves the commands on the control socket, and each
//! container's relay, until the last container is deleted.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    sync::Notify,
    task::JoinSet,
    time::timeout,
};

use super::{
    client::SOCKET,
    message::{self, Create, Exec, Reply, Request},
    record::Record,
    relay::{Line, RelayMessage},
    told,
};
use crate::{
    bundle::Bundle,
    cgroup::{CgroupPlan, Layout},
    id::ContainerId,
    pod::{self, Error, Input, Kind, NewContainer, Pod, ProcessId, Root, Stdio},
    sandbox, sys,
};

/// After so long without a command, memory that only commands need is given back.
const REST: Duration = Duration::from_secs(1);

/// How long a command may take to say what it asks for, and to take the answer.
const COMMAND: Duration = Duration::from_secs(30);

/// How long no command is taken after one could not be.
const PAUSE: Duration = Duration::from_millis(100);

/// SIGKILL.
const SIGKILL: i32 = 9;

/// Serves a pod.
#[derive(Debug)]
pub struct Server {
    pod: Arc<Pod>,
    listener: UnixListener,
    shared: Arc<Shared>,
}

/// What the tasks have in common.
#[derive(Debug)]
struct Shared {
    pod: Arc<Pod>,
    records: Mutex<HashMap<ContainerId, Record>>,
    /// Tasks that pass on what relays say.
    relays: Mutex<JoinSet<()>>,
    /// Told when the last container is gone.
    empty: Notify,
    /// Whether the machine ends as soon as nothing runs in it.
    frugal: AtomicBool,
}

impl Server {
    /// Listens in the pod's state directory.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn new(pod: Arc<Pod>) -> Result<Self, Error> {
        let state = pod.sandbox().state();
        let listener = state.listen(SOCKET).map_err(sandbox::Error::from)?;
        let listener = listener
            .set_nonblocking(true)
            .and_then(|()| UnixListener::from_std(listener))
            .map_err(Error::Streams)?;
        let shared = Shared {
            pod: pod.clone(),
            records: Mutex::default(),
            relays: Mutex::default(),
            empty: Notify::new(),
            frugal: AtomicBool::new(false),
        };
        Ok(Self {
            pod,
            listener,
            shared: Arc::new(shared),
        })
    }

    /// Takes a container that was made without the socket into its care.
    ///
    /// # Errors
    /// When its record cannot be kept.
    pub fn adopt(&self, record: Record, relay: Option<OwnedFd>) -> Result<(), Error> {
        self.shared.adopt(record, relay)
    }

    /// Ends the machine as soon as nothing runs in it, though its containers are still asked for.
    pub fn end_when_idle(&self) {
        self.shared.frugal.store(true, Ordering::Relaxed);
    }

    /// Serves until the last container is deleted.
    pub async fn run(&self) {
        let mut connections = JoinSet::new();
        let mut rested = false;
        loop {
            tokio::select! {
                biased;
                () = self.shared.empty.notified() => break,
                () = tokio::time::sleep(REST), if !rested => {
                    sys::give_back();
                    rested = true;
                }
                connection = self.listener.accept() => match connection {
                    Ok((stream, _)) => {
                        rested = false;
                        connections.spawn(serve(self.shared.clone(), stream));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a command cannot be taken");
                        // Out of descriptors, mostly: others give some back.
                        tokio::time::sleep(PAUSE).await;
                    }
                },
            }
            while connections.try_join_next().is_some() {}
        }
        // The last deletion is answered once everything is gone.
        while connections.join_next().await.is_some() {}
    }

    /// Removes a container as `delete --force` does.
    pub async fn remove(&self, id: &ContainerId) {
        match self.shared.delete(id, true).await {
            // By a command, which is just being answered.
            Ok(()) | Err(Error::NotFound { .. }) => {}
            Err(error) => tracing::warn!(%error, container = %id, "a container stays"),
        }
    }

    /// Ends the pod and leaves its containers' records, as if this process had been killed.
    pub async fn abandon(&self) {
        self.pod.sandbox().state().keep();
        self.pod.shutdown().await;
        self.shared.empty.notify_one();
    }

    /// The pod.
    pub fn pod(&self) -> &Arc<Pod> {
        &self.pod
    }
}

/// One connection, one request. A command that was stopped holds nothing up.
async fn serve(shared: Arc<Shared>, mut stream: UnixStream) {
    let answer = async {
        let (request, descriptors) = read(&mut stream, COMMAND).await?;
        let mut nothing = [0];
        let reply = match request {
            Request::Thawed { id } => tokio::select! {
                thawed = shared.thawed(&id) => thawed,
                // The command says nothing: it is gone.
                _ = stream.read(&mut nothing) => return Ok(()),
            },
            request => shared.answer(request, descriptors).await,
        };
        timeout(COMMAND, stream.write_all(&encoded(reply))).await?
    };
    if let Err(error) = answer.await {
        let error: io::Error = error;
        tracing::debug!(%error, "a command went away");
    }
}

/// The answer, of a length that a command takes.
fn encoded(reply: Result<Value, Error>) -> Vec<u8> {
    let failed = |kind, message| Reply::Error { kind, message };
    let reply = match reply {
        Ok(value) => Reply::Ok(value),
        Err(error) => failed(error.kind(), crate::text::chain(&error)),
    };
    message::encode(&reply).unwrap_or_else(|error| {
        let told = message::encode(&failed(Kind::Internal, error.to_string()));
        told.expect("a few words can be encoded")
    })
}

async fn read(stream: &mut UnixStream, within: Duration) -> io::Result<(Request, Vec<OwnedFd>)> {
    timeout(within, read_slowly(stream)).await?
}

async fn read_slowly(stream: &mut UnixStream) -> io::Result<(Request, Vec<OwnedFd>)> {
    let mut first = [0; 4];
    let mut filled = 0;
    let mut descriptors = Vec::new();
    while filled < first.len() {
        let received = stream.async_io(Interest::READABLE, || {
            Ok(sys::receive(stream.as_fd(), &mut first[filled..])?)
        });
        let (count, came) = received.await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += count;
        descriptors.extend(came);
    }
    let mut text = vec![0; message::length(first)?];
    stream.read_exact(&mut text).await?;
    Ok((serde_json::from_slice(&text)?, descriptors))
}

impl Shared {
    async fn answer(
        self: &Arc<Self>,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Value, Error> {
        let pod = &self.pod;
        let done = Ok(Value::Null);
        match request {
            Request::Create(create) => self.create(create, descriptors).await,
            Request::Exec(exec) => self.exec(exec, descriptors).await,
            Request::Start { id } => {
                pod.start_process(&first(&id)?).await?;
                done
            }
            Request::State { id } => self.state(&name(&id)?),
            Request::Kill { id, signal, all } => {
                pod.kill(&first(&id)?, signal, all).await?;
                done
            }
            Request::Delete { id, force } => {
                self.delete(&name(&id)?, force).await?;
                done
            }
            Request::Pause { id } => {
                pod.pause(&name(&id)?).await?;
                done
            }
            Request::Resume { id } => {
                pod.resume(&name(&id)?).await?;
                done
            }
            Request::Update { id, resources } => {
                pod.update(&name(&id)?, &resources).await?;
                done
            }
            Request::Stats { id } => Ok(told::stats(&pod.stats(&name(&id)?).await?)),
            Request::Processes { id } => Ok(told::processes(&pod.processes(&name(&id)?).await?)),
            Request::Pids { id } => Ok(json!(pod.pids(&name(&id)?)?)),
            Request::Thawed { id } => self.thawed(&id).await,
        }
    }

    async fn thawed(&self, id: &str) -> Result<Value, Error> {
        self.pod.thawed(&name(id)?).await?;
        Ok(Value::Null)
    }

    fn state(&self, id: &ContainerId) -> Result<Value, Error> {
        let state = self.pod.state(&ProcessId::first(id.clone()))?;
        let records = self.records();
        let record = records.get(id).ok_or_else(|| Error::NotFound {
            what: "container".to_owned(),
        })?;
        Ok(json!(record.living(state.status)))
    }

    async fn create(
        self: &Arc<Self>,
        create: Create,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Value, Error> {
        let id = name(&create.id)?;
        let bundle = Bundle::load(&create.bundle)?;
        let (relay, stdio) = streams(descriptors, bundle.terminal())?;
        let record = Record::new(&id, &bundle, create.pid);
        let state = self.pod.sandbox().state();
        state.link(&id).map_err(sandbox::Error::from)?;
        let link = Undo(|| state.unlink(&id));
        let layout = match create.systemd_cgroup {
            true => Layout::Systemd,
            false => Layout::Path,
        };
        let cgroup = CgroupPlan::of(bundle.spec(), &id, layout);
        let new = NewContainer {
            id: id.clone(),
            bundle,
            root: Root::Bundle,
            stdio,
            terminal_size: None,
            pid: Some(create.pid),
            placeholder: false,
        };
        self.pod.create_in(new, Some(cgroup)).await?;
        self.adopt(record, Some(relay))?;
        link.keep();
        Ok(Value::Null)
    }

    async fn exec(self: &Arc<Self>, exec: Exec, descriptors: Vec<OwnedFd>) -> Result<Value, Error> {
        let which = ProcessId {
            container: name(&exec.id)?,
            exec: Some(name(&exec.exec)?),
        };
        let terminal = exec.process.get("terminal").and_then(Value::as_bool) == Some(true);
        let (relay, stdio) = streams(descriptors, terminal)?;
        self.pod
            .exec(&which, exec.process, stdio, Some(exec.pid))
            .await?;
        if let Err(error) = self.pod.start_process(&which).await {
            // What could not be started is nobody's to delete.
            if let Err(error) = self.pod.delete(&which, true).await {
                tracing::debug!(process = %which, %error, "an exec that did not start stays");
            }
            return Err(error);
        }
        self.attend(which, relay)?;
        Ok(Value::Null)
    }

    async fn delete(&self, id: &ContainerId, force: bool) -> Result<(), Error> {
        let state = self.pod.sandbox().state();
        let is_last = {
            let records = self.records();
            records.len() == 1 && records.contains_key(id)
        };
        if is_last {
            self.pod.delete_last(id, force).await?;
        } else {
            self.pod
                .delete(&ProcessId::first(id.clone()), force)
                .await?;
            Record::remove(state.path(), id.as_str());
        }
        state.unlink(id);
        let empty = {
            let mut records = self.records();
            records.remove(id);
            records.is_empty()
        };
        if empty {
            if !is_last {
                self.pod.shutdown().await;
            }
            self.empty.notify_one();
        }
        Ok(())
    }

    fn adopt(self: &Arc<Self>, record: Record, relay: Option<OwnedFd>) -> Result<(), Error> {
        let id = name(&record.id)?;
        record
            .save(self.pod.sandbox().path())
            .map_err(Error::Streams)?;
        self.records().insert(id.clone(), record);
        match relay {
            Some(relay) => self.attend(ProcessId::first(id), relay),
            None => Ok(()),
        }
    }

    /// Passes on what a relay says until its process ends, and then tells it.
    fn attend(self: &Arc<Self>, which: ProcessId, relay: OwnedFd) -> Result<(), Error> {
        let line = Line::new(relay).map_err(Error::Streams)?;
        let pod = self.pod.clone();
        let shared = Arc::downgrade(self);
        let mut relays = self.relays.lock().unwrap_or_else(PoisonError::into_inner);
        while relays.try_join_next().is_some() {}
        relays.spawn(async move {
            let end = pod.wait(&which);
            tokio::pin!(end);
            let exit = loop {
                tokio::select! {
                    biased;
                    exit = &mut end => break exit,
                    said = line.next() => {
                        let gone = said.is_none();
                        pass_on(&pod, &which, said).await;
                        if gone {
                            break end.await;
                        }
                    }
                }
            };
            if which.exec.is_some() {
                // Nobody asks for an exec of the command line after its end.
                let _ = pod.delete(&which, true).await;
            }
            let frugal = shared
                .upgrade()
                .is_some_and(|shared| shared.frugal.load(Ordering::Relaxed));
            if frugal && pod.is_idle() {
                // What was written is on the host before anybody hears of the end.
                pod.let_go_of_disks().await;
            }
            line.exit(exit.map_or(u32::from(u8::MAX), |exit| exit.status));
            if frugal && pod.is_idle() {
                // Nothing can run in it any more; what is left is asked of this process alone.
                pod.sandbox().dismiss();
            }
        });
        Ok(())
    }

    fn records(&self) -> MutexGuard<'_, HashMap<ContainerId, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A relay that is gone was killed: so is what it stood for.
async fn pass_on(pod: &Pod, which: &ProcessId, said: Option<RelayMessage>) {
    let done = match said {
        Some(RelayMessage::Signal(signal)) => pod.kill(which, signal, false).await,
        Some(RelayMessage::Size(columns, rows)) => pod.resize(which, (columns, rows)).await,
        None => pod.kill(which, SIGKILL, false).await,
    };
    if let Err(error) = done {
        tracing::debug!(process = %which, %error, "what a relay said did not reach its process");
    }
}

/// Undoes something unless it is kept.
struct Undo<F: FnMut()>(F);

impl<F: FnMut()> Undo<F> {
    fn keep(self) {
        std::mem::forget(self);
    }
}

impl<F: FnMut()> Drop for Undo<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// What came with a request: the relay's socket, then a terminal or three streams.
pub(super) fn streams(
    descriptors: Vec<OwnedFd>,
    terminal: bool,
) -> Result<(OwnedFd, Stdio), Error> {
    let expected = if terminal { 2 } else { 4 };
    let wrong = || Error::Invalid {
        message: format!("the request needs {expected} descriptors"),
    };
    if descriptors.len() != expected {
        return Err(wrong());
    }
    let mut descriptors = descriptors.into_iter();
    let relay = descriptors.next().ok_or_else(wrong)?;
    let first = descriptors.next().ok_or_else(wrong)?;
    let stdio = match terminal {
        true => Stdio::terminal(first).map_err(Error::Streams)?,
        false => Stdio {
            stdin: Input::From(first),
            stdout: descriptors.next(),
            stderr: descriptors.next(),
            ..Stdio::default()
        },
    };
    Ok((relay, stdio))
}

fn name(id: &str) -> Result<ContainerId, Error> {
    ContainerId::parse(id).map_err(|error| Error::Invalid {
        message: error.to_string(),
    })
}

fn first(id: &str) -> Result<ProcessId, Error> {
    name(id).map(ProcessId::first)
}

/// Answers a command that waits on a stream, before there is a server.
pub(super) fn reply_of(result: &Result<(), pod::Error>) -> Reply {
    match result {
        Ok(()) => Reply::Ok(Value::Null),
        Err(error) => Reply::Error {
            kind: error.kind(),
            message: crate::text::chain(error),
        },
    }
}

/// The words that an unexpected end of the pod's process has.
pub(super) fn lost() -> Reply {
    Reply::Error {
        kind: Kind::Dead,
        message: "the pod's process ended before it answered".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_command_that_says_nothing_is_not_waited_for() {
        let within = Duration::from_millis(50);
        for said in [&b""[..], &[9, 0], &[9, 0, 0, 0, b'{']] {
            let (mut ours, mut theirs) = UnixStream::pair().expect("a pair");
            theirs.write_all(said).await.expect("written");
            let error = read(&mut ours, within).await.expect_err("given up");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{said:?}");
        }
    }

    #[test]
    fn an_answer_that_is_too_long_is_a_failure_that_is_told() {
        let long = Value::String("x".repeat(9 << 20));
        let bytes = encoded(Ok(long));
        let reply: Reply = serde_json::from_slice(&bytes[4..]).expect("a reply");
        assert!(
            matches!(
                reply,
                Reply::Error {
                    kind: Kind::Internal,
                    ..
                }
            ),
            "{reply:?}"
        );
    }
}
