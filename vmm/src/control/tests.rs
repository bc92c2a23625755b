//! A server on a thread, clients of every sort, and a VM of which only the commands are known.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
};

use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    connection::{Connection, Next},
    message::{Counters, MAX_LINE_BYTES, State, Status},
    *,
};
use crate::config::{DeviceConfig, Resource};

#[derive(Default)]
struct Fake {
    asked: Arc<Mutex<Vec<Request>>>,
    /// Bytes in the reply to `counters`.
    padding: usize,
}

impl Commands for Fake {
    fn carry_out(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Reply {
        self.asked.lock().unwrap().push(request.clone());
        match request {
            Request::Status {} => Reply::Status(Status {
                state: State::Running,
                devices: Vec::new(),
            }),
            Request::State {} => Reply::State {
                state: State::Paused,
            },
            Request::Counters {} => {
                let mut counters = Counters::default();
                counters.exits.insert("x".repeat(self.padding), 1);
                Reply::Counters(counters)
            }
            Request::AddDevice { .. } => {
                let mut text = String::new();
                for descriptor in descriptors {
                    File::from(descriptor).read_to_string(&mut text).unwrap();
                }
                Reply::Failed { message: text }
            }
            Request::RemoveDevice { slot } => Reply::Failed {
                message: format!("there is no device in slot {slot}"),
            },
            _ => Reply::Done {},
        }
    }
}

struct Running {
    path: PathBuf,
    ended: EventFd,
    thread: Option<thread::JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Running {
    fn start(mut fake: Fake) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let ended = EventFd::new(EFD_NONBLOCK).unwrap();
        let until = ended.try_clone().unwrap();
        let thread = thread::spawn(move || serve(listener.into(), &until, &mut fake).unwrap());
        Self {
            path,
            ended,
            thread: Some(thread),
            _directory: directory,
        }
    }

    fn client(&self) -> Client {
        Client::connect(&self.path).unwrap()
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream
            .set_read_timeout(Some(std::time::Duration::from_secs(10)))
            .unwrap();
        stream
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.ended.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn all_of(mut stream: UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn requests_are_carried_out_in_their_order() {
    let fake = Fake::default();
    let asked = Arc::clone(&fake.asked);
    let server = Running::start(fake);
    let mut client = server.client();

    client.pause().unwrap();
    client.resume().unwrap();
    assert_eq!(client.status().unwrap().state, State::Running);
    assert_eq!(client.state().unwrap(), State::Paused);
    client.stop().unwrap();

    assert_eq!(
        *asked.lock().unwrap(),
        [
            Request::Pause {},
            Request::Resume {},
            Request::Status {},
            Request::State {},
            Request::Stop {}
        ]
    );
}

#[test]
fn a_refusal_says_why() {
    let server = Running::start(Fake::default());
    let error = server.client().remove_device(9).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the VMM refuses: \"there is no device in slot 9\""
    );
}

#[test]
fn descriptors_come_with_their_request() {
    let server = Running::start(Fake::default());
    let (reader, writer) = nix::unistd::pipe().unwrap();
    File::from(writer).write_all(b"through a pipe").unwrap();
    let device = DeviceConfig::Pmem {
        file: Resource::Fd(0),
        read_only: true,
    };
    let error = server
        .client()
        .add_device(device, &[reader.as_fd()])
        .unwrap_err();
    assert_eq!(error.to_string(), "the VMM refuses: \"through a pipe\"");
}

#[test]
fn a_line_may_come_in_pieces_and_lines_together() {
    let server = Running::start(Fake::default());
    let mut stream = server.raw();
    stream.write_all(b"{\"request\":").unwrap();
    thread::sleep(std::time::Duration::from_millis(20));
    stream
        .write_all(b"\"pause\"}\n{\"request\":\"resume\"}\n")
        .unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(
        all_of(stream),
        "{\"reply\":\"done\"}\n{\"reply\":\"done\"}\n"
    );
}

#[test]
fn what_is_no_request_is_told_so_and_the_next_is_answered() {
    let server = Running::start(Fake::default());
    let mut stream = server.raw();
    for bad in [
        &b"\n"[..],
        b"nonsense\n",
        b"{\"request\":\"explode\"}\n",
        b"{\"request\":\"pause\",\"why\":1}\n",
        b"\xff\xfe\n",
        b"{\"request\":\"remove_device\",\"slot\":256}\n",
    ] {
        stream.write_all(bad).unwrap();
    }
    stream.write_all(b"{\"request\":\"pause\"}\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let text = all_of(stream);
    let replies: Vec<&str> = text.lines().collect();
    assert_eq!(replies.len(), 7);
    assert!(
        replies[..6]
            .iter()
            .all(|reply| reply.contains("not a request")),
        "{text}"
    );
    assert_eq!(replies[6], "{\"reply\":\"done\"}");
}

#[test]
fn a_line_without_end_is_cut_off() {
    let server = Running::start(Fake::default());
    let mut stream = server.raw();
    // The server may let go before all is written.
    let _ = stream.write_all(&vec![b'x'; MAX_LINE_BYTES + 5000]);
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    assert!(text.contains("more than 65536 bytes"), "{text}");
    server.client().status().unwrap();
}

#[test]
fn too_many_descriptors_are_refused() {
    let server = Running::start(Fake::default());
    let null = File::open("/dev/null").unwrap();
    let device = DeviceConfig::Balloon { inflate_mib: 0 };
    let many = [null.as_fd(); message::MAX_DESCRIPTORS + 1];
    let mut client = server.client();
    // The kernel closes those beyond the room that there is.
    let _ = client.add_device(device, &many).unwrap_err();
    server.client().status().unwrap();
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let server = Running::start(Fake {
        padding: 60_000,
        ..Fake::default()
    });
    let mut lazy = server.raw();
    lazy.set_nonblocking(true).unwrap();
    for _ in 0..10_000 {
        if lazy.write_all(b"{\"request\":\"counters\"}\n").is_err() {
            break;
        }
    }
    let mut other = server.client();
    assert_eq!(other.counters().unwrap().exits.len(), 1);
}

#[test]
fn a_reply_that_is_too_long_becomes_a_refusal() {
    let server = Running::start(Fake {
        padding: MAX_LINE_BYTES,
        ..Fake::default()
    });
    let error = server.client().counters().unwrap_err();
    assert!(error.to_string().contains("bytes"), "{error}");
}

#[test]
fn clients_beyond_the_limit_are_let_go() {
    let server = Running::start(Fake::default());
    let mut held: Vec<Client> = (0..16).map(|_| server.client()).collect();
    for client in &mut held {
        client.status().unwrap();
    }
    server.client().status().unwrap_err();
    held.pop();
    // The place is free once the server has seen the client go.
    let free = (0..2000).any(|_| {
        thread::sleep(std::time::Duration::from_millis(5));
        server.client().status().is_ok()
    });
    assert!(free);
}

#[test]
fn a_vmm_that_says_nothing_useful_is_an_error() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"\"what?\"\n").unwrap();
    Client::new(ours).unwrap().status().unwrap_err();

    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    Client::new(ours).unwrap().status().unwrap_err();
}

proptest! {
    /// However the bytes come, each line gets one reply, and nothing else does.
    #[test]
    fn every_line_is_answered_once(
        lines in prop::collection::vec("[ -~]{0,60}|\\{\"request\":\"(pause|status|stop)\"\\}", 0..12),
        pieces in prop::collection::vec(1usize..40, 1..8),
    ) {
        let (mut client, server) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(server).unwrap();
        let mut commands = Fake::default();
        let bytes: Vec<u8> = lines.iter().flat_map(|line| [line.as_bytes(), b"\n"].concat()).collect();
        let mut rest = &bytes[..];
        for piece in pieces.iter().cycle() {
            let (now, later) = rest.split_at((*piece).min(rest.len()));
            if now.is_empty() {
                break;
            }
            client.write_all(now).unwrap();
            prop_assert_eq!(connection.ready(&mut commands), Next::Read);
            rest = later;
        }
        drop(connection);
        prop_assert_eq!(all_of(client).lines().count(), lines.len());
        let valid = lines.iter().filter(|line| serde_json::from_str::<Request>(line).is_ok());
        prop_assert_eq!(commands.asked.lock().unwrap().len(), valid.count());
    }
}
