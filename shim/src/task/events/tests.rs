use std::path::{Path, PathBuf};

use async_trait::async_trait;
use tokio::sync::mpsc;
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;
use crate::task::proto::{
    events::Empty,
    events_ttrpc::{Events, create_events},
};

/// A containerd that takes events.
struct Containerd(mpsc::UnboundedSender<Envelope>);

#[async_trait]
impl Events for Containerd {
    async fn forward(
        &self,
        _context: &TtrpcContext,
        request: ForwardRequest,
    ) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        if envelope.topic == "/tasks/oom" {
            let status = ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, "no");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        self.0.send(envelope).expect("the test listens");
        Ok(Empty::default())
    }
}

async fn serve(socket: &Path) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
    let (sender, events) = mpsc::unbounded_channel();
    let _ = std::fs::remove_file(socket);
    let mut server = Server::new()
        .bind(&format!("unix://{}", socket.display()))
        .expect("bound")
        .register_service(create_events(Arc::new(Containerd(sender))));
    server.start().await.expect("started");
    (server, events)
}

fn directory() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("containerd.sock.ttrpc");
    (directory, socket)
}

fn publisher(socket: &Path) -> Publisher {
    Publisher::start(socket.display().to_string(), "default".to_owned())
}

fn started(id: &str) -> Event {
    Event::Start(TaskStart {
        container_id: id.to_owned(),
        pid: 7,
        ..Default::default()
    })
}

fn exited(id: &str) -> Event {
    Event::Exit(TaskExit {
        container_id: id.to_owned(),
        id: id.to_owned(),
        exit_status: 3,
        ..Default::default()
    })
}

#[tokio::test]
async fn events_arrive_in_order_with_their_names() {
    let (_directory, socket) = directory();
    let (_server, mut events) = serve(&socket).await;
    let publisher = publisher(&socket);
    publisher.publish(started("web"));
    publisher.publish(exited("web"));
    publisher.flush(Duration::from_secs(10)).await;

    let first = events.recv().await.expect("an event");
    assert_eq!(first.topic, "/tasks/start");
    assert_eq!(first.namespace, "default");
    assert!(first.timestamp.seconds > 0);
    let event = first.event.unwrap_or_default();
    assert_eq!(event.type_url, "containerd.events.TaskStart");
    let start = TaskStart::parse_from_bytes(&event.value).expect("a TaskStart");
    assert_eq!((start.container_id.as_str(), start.pid), ("web", 7));
    assert_eq!(events.recv().await.expect("an event").topic, "/tasks/exit");
}

#[tokio::test]
async fn events_wait_for_a_containerd_that_is_restarted() {
    let (_directory, socket) = directory();
    let publisher = publisher(&socket);
    publisher.publish(started("web"));
    publisher.flush(Duration::from_millis(20)).await;
    let (mut server, mut events) = serve(&socket).await;
    publisher.flush(Duration::from_secs(10)).await;
    assert_eq!(events.recv().await.expect("an event").topic, "/tasks/start");

    server.shutdown().await.expect("ended");
    publisher.publish(exited("web"));
    publisher.flush(Duration::from_millis(20)).await;
    let (_server, mut events) = serve(&socket).await;
    publisher.flush(Duration::from_secs(10)).await;
    assert_eq!(events.recv().await.expect("an event").topic, "/tasks/exit");
}

#[tokio::test]
async fn an_event_that_is_refused_does_not_stop_those_behind_it() {
    let (_directory, socket) = directory();
    let (_server, mut events) = serve(&socket).await;
    let publisher = publisher(&socket);
    publisher.publish(Event::Oom(TaskOOM::default()));
    publisher.publish(exited("web"));
    publisher.flush(Duration::from_secs(10)).await;
    assert_eq!(events.recv().await.expect("an event").topic, "/tasks/exit");
}

#[tokio::test]
async fn a_guest_that_tells_of_its_memory_again_and_again_drops_no_other_event() {
    let (_directory, socket) = directory();
    let publisher = publisher(&socket);
    publisher.publish(exited("web"));
    for number in 0..2 * QUEUE {
        publisher.publish(Event::Oom(TaskOOM {
            container_id: format!("web{}", number % 3),
            ..Default::default()
        }));
    }
    let waiting = publisher.queue.waiting();
    assert_eq!(waiting.len(), 4);
    assert_eq!(waiting[0].topic, "/tasks/exit");
}

#[tokio::test]
async fn no_more_events_wait_than_the_queue_holds() {
    let (_directory, socket) = directory();
    let publisher = publisher(&socket);
    for number in 0..QUEUE + 10 {
        publisher.publish(started(&number.to_string()));
    }
    assert_eq!(publisher.queue.waiting().len(), QUEUE);
}
