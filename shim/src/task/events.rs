//! Events for containerd, in the order in which they happened.
//!
//! A queue and one task that empties it: an event leaves the queue when containerd has taken it.
//! While containerd is gone, events wait; so many as that the shim's memory stays small, and then
//! the oldest are dropped, since containerd asks for the state of everything when it is back.
//!
//! ```text
//!   publish ─► queue ─► forward ── taken or refused ─► next
//!                          └── no connection ─► wait, connect again
//! ```

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::{net::UnixStream, sync::Notify, task::JoinHandle, time::timeout};

use super::proto::{
    events::{
        Envelope, ForwardRequest, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit,
        TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    events_ttrpc::EventsClient,
    timestamp,
};
use crate::text::printable;

/// The most events that wait.
const QUEUE: usize = 1024;

/// The topic of events that a guest can cause at will.
const OOM: &str = "/tasks/oom";

/// How long containerd may take for one event.
const FORWARD: Duration = Duration::from_secs(5);

/// The first and the longest pause before the next attempt to connect.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Something that happened to a container or an exec.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    missing_docs,
    reason = "each is documented by containerd's topic of that name"
)]
pub enum Event {
    Create(TaskCreate),
    Start(TaskStart),
    ExecAdded(TaskExecAdded),
    ExecStarted(TaskExecStarted),
    Exit(TaskExit),
    Delete(TaskDelete),
    Paused(TaskPaused),
    Resumed(TaskResumed),
    Oom(TaskOOM),
}

/// The way to containerd. Dropping it drops what waits.
#[derive(Debug)]
pub struct Publisher {
    namespace: String,
    queue: Arc<Queue>,
    worker: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<VecDeque<Envelope>>,
    added: Notify,
    emptied: Notify,
}

impl Publisher {
    /// Starts one that brings events to the socket at `address`.
    pub fn start(address: String, namespace: String) -> Self {
        let queue = Arc::new(Queue::default());
        let worker = tokio::spawn(work(queue.clone(), address));
        Self {
            namespace,
            queue,
            worker,
        }
    }

    /// Sends an event behind those that were sent before.
    pub fn publish(&self, event: Event) {
        let (topic, event) = event.into_any();
        tracing::debug!(topic, "event");
        self.queue.push(Envelope {
            timestamp: timestamp(Some(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Default::default()
        });
    }

    /// Waits until containerd has taken all, or `deadline` has passed.
    pub async fn flush(&self, deadline: Duration) {
        if timeout(deadline, self.queue.empty()).await.is_err() {
            let left = self.queue.waiting().len();
            tracing::warn!(left, "containerd did not take the last events");
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.worker.abort();
    }
}

impl Event {
    fn into_any(self) -> (&'static str, Any) {
        match self {
            Self::Create(event) => ("/tasks/create", any("TaskCreate", &event)),
            Self::Start(event) => ("/tasks/start", any("TaskStart", &event)),
            Self::ExecAdded(event) => ("/tasks/exec-added", any("TaskExecAdded", &event)),
            Self::ExecStarted(event) => ("/tasks/exec-started", any("TaskExecStarted", &event)),
            Self::Exit(event) => ("/tasks/exit", any("TaskExit", &event)),
            Self::Delete(event) => ("/tasks/delete", any("TaskDelete", &event)),
            Self::Paused(event) => ("/tasks/paused", any("TaskPaused", &event)),
            Self::Resumed(event) => ("/tasks/resumed", any("TaskResumed", &event)),
            Self::Oom(event) => (OOM, any("TaskOOM", &event)),
        }
    }
}

fn any(name: &str, event: &impl Message) -> Any {
    Any {
        type_url: format!("containerd.events.{name}"),
        value: event
            .write_to_bytes()
            .expect("a message of plain fields can be written"),
        ..Default::default()
    }
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, envelope: Envelope) {
        let mut waiting = self.waiting();
        // A guest can cause these at will, and must not push the others out.
        let said =
            |other: &Envelope| (&other.topic, &other.event) == (&envelope.topic, &envelope.event);
        if envelope.topic == OOM && waiting.iter().any(said) {
            return;
        }
        if waiting.len() >= QUEUE {
            tracing::warn!("too many events wait for containerd; the oldest is dropped");
            waiting.pop_front();
        }
        waiting.push_back(envelope);
        drop(waiting);
        self.added.notify_one();
    }

    async fn first(&self) -> Envelope {
        loop {
            if let Some(first) = self.waiting().front().cloned() {
                return first;
            }
            self.added.notified().await;
        }
    }

    /// Takes the first away, if it is this one and was not dropped meanwhile.
    fn done(&self, envelope: &Envelope) {
        let mut waiting = self.waiting();
        if waiting.front() == Some(envelope) {
            waiting.pop_front();
        }
        if waiting.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    async fn empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.waiting().is_empty() {
                return;
            }
            emptied.await;
        }
    }
}

async fn work(queue: Arc<Queue>, address: String) {
    let mut connection = None;
    let mut pause = PAUSES.0;
    loop {
        let envelope = queue.first().await;
        match forward(&mut connection, &address, &envelope).await {
            Ok(()) => {
                queue.done(&envelope);
                pause = PAUSES.0;
            }
            Err(ttrpc::Error::RpcStatus(status)) => {
                let reason = printable(&status.message, 200);
                tracing::warn!(
                    topic = envelope.topic,
                    reason,
                    "containerd refused an event"
                );
                queue.done(&envelope);
            }
            Err(error) => {
                tracing::debug!(%error, "containerd cannot be reached; the event waits");
                connection = None;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
        }
    }
}

async fn forward(
    connection: &mut Option<EventsClient>,
    address: &str,
    envelope: &Envelope,
) -> ttrpc::Result<()> {
    let client = match connection {
        Some(client) => client,
        None => {
            let stream = UnixStream::connect(address).await;
            let stream = stream.map_err(|error| ttrpc::Error::Socket(error.to_string()))?;
            let socket = ttrpc::r#async::transport::Socket::new(stream);
            connection.insert(EventsClient::new(ttrpc::r#async::Client::new(socket)))
        }
    };
    let request = ForwardRequest {
        envelope: MessageField::some(envelope.clone()),
        ..Default::default()
    };
    let context = ttrpc::context::with_duration(FORWARD);
    client.forward(context, &request).await.map(|_| ())
}

#[cfg(test)]
mod tests;
