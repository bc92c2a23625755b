//! Stands in for `bulkhead-vmm` in the tests of the sandbox: it takes the same
//! configuration and descriptors and plays VMM, guest and agent, without KVM.
//!
//! The "kernel" it is given is a line of text that says what happens:
//!
//! ```text
//!   boot              the agent comes up and serves containers
//!   stranger          something else than an agent comes up
//!   silent TEXT       nothing ever comes up; TEXT is in the console's ring
//!   exit CODE TEXT    the VMM ends with TEXT as its last words
//!   hangup MS TEXT    the guest breaks its connection off, and the VMM ends that much later with
//!                     TEXT as its last words
//!   boot then exit    it ends as soon as a container is to be made
//!   boot then lie     the agent tells of containers that there are not, of absurd numbers, and
//!                     always has news
//!   boot then flood BYTES
//!                     its lists and its news have so many bytes
//!   boot then babble HOW
//!                     what comes from it are no answers, see [`Babble`]
//! ```
//!
//! A container's arguments say what its process does: `cat`, `exit N`, `shout`
//! without an end, `wait` for a signal, `missing`, `forbidden`; or what the agent
//! does when it starts the process: `stand` still for ever, `work N` seconds
//! before it answers.
//!
//! Of commands to the VMM it knows `state`, `pause` and `resume`.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
    pin::Pin,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use protocol::{
    AGENT_PORT, Hello, STREAM_PORT, StreamId,
    agent::{self as message, event},
    agent_ttrpc::{Agent, create_agent},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
};
use ttrpc::{
    Code, MessageHeader,
    r#async::{Server, TtrpcContext, transport::Listener},
    proto::{MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE},
};
use vmm::{
    config::{DeviceConfig, Resource, VmConfig},
    control::{
        Commands,
        message::{Reply, Request, State},
    },
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let config: VmConfig = serde_json::from_reader(sys::fd(3))?;
    let mut script = String::new();
    opened(&config.boot.kernel).read_to_string(&mut script)?;
    let (word, rest) = script.trim().split_once(' ').unwrap_or((script.trim(), ""));
    match (word, rest) {
        ("exit", rest) => {
            let (code, text) = rest.split_once(' ').unwrap_or((rest, ""));
            eprintln!("bulkhead-vmm: {text}");
            std::process::exit(code.parse()?)
        }
        ("hangup", rest) => {
            let (wait_ms, text) = rest.split_once(' ').unwrap_or((rest, ""));
            let (_, ready) = sockets(&config)?;
            drop(opened(ready));
            std::thread::sleep(Duration::from_millis(wait_ms.parse()?));
            eprintln!("bulkhead-vmm: {text}");
            std::process::exit(1)
        }
        ("silent", text) => {
            let size = text.len() as u32 + 1;
            let header = [0x4347_4244, size, size].map(u32::to_le_bytes).concat();
            let ring = [&header[..], text.as_bytes(), b"\n"].concat();
            let console = config.console_log.as_ref().ok_or("no console")?;
            opened(console).write_all_at(&ring, 0)?;
            loop {
                std::thread::park();
            }
        }
        ("boot" | "stranger", rest) => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(serve(&config, word == "stranger", Conduct::of(rest)?)),
        _ => Err(format!("no such script: {script}").into()),
    }
}

/// How the agent serves its host.
#[derive(Clone, Copy, PartialEq)]
enum Conduct {
    Honest,
    Exits,
    Lies,
    Floods { bytes: usize },
    Babbles(Babble),
}

/// What an agent says that answers nothing.
#[derive(Clone, Copy, PartialEq)]
enum Babble {
    /// Any bytes, without an end.
    Noise,
    /// Data on the streams of all calls, without an end.
    Data,
    /// An answer that is longer than any can be.
    Length,
    /// Answers to all calls, which are none.
    Junk,
}

impl Conduct {
    fn of(words: &str) -> Result<Self> {
        let words: Vec<&str> = words.split_whitespace().collect();
        Ok(match words[..] {
            [] => Self::Honest,
            ["then", "exit"] => Self::Exits,
            ["then", "lie"] => Self::Lies,
            ["then", "flood", bytes] => Self::Floods {
                bytes: bytes.parse()?,
            },
            ["then", "babble", how] => Self::Babbles(match how {
                "noise" => Babble::Noise,
                "data" => Babble::Data,
                "length" => Babble::Length,
                "junk" => Babble::Junk,
                how => return Err(format!("no such babble: {how}").into()),
            }),
            _ => return Err(format!("no such conduct: {words:?}").into()),
        })
    }
}

impl Babble {
    /// Says it until nobody listens any more.
    async fn say(self, mut host: UnixStream) -> io::Result<()> {
        // Not before the host has asked for something.
        host.read_u8().await?;
        let frame = |kind, length: usize, stream| {
            let header = MessageHeader {
                length: length as u32,
                stream_id: stream,
                type_: kind,
                flags: 0,
            };
            let mut bytes = Vec::from(header);
            bytes.resize(bytes.len() + length.min(64 << 10), 0xff);
            bytes
        };
        match self {
            Self::Noise => loop {
                let bytes: Vec<u8> = (0..64_u32 << 10)
                    .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
                    .collect();
                host.write_all(&bytes).await?;
            },
            Self::Data => loop {
                for stream in (1..32).step_by(2) {
                    let bytes = frame(MESSAGE_TYPE_DATA, 64 << 10, stream);
                    host.write_all(&bytes).await?;
                }
            },
            Self::Length => loop {
                let bytes = frame(MESSAGE_TYPE_RESPONSE, u32::MAX as usize, 1);
                host.write_all(&bytes).await?;
            },
            Self::Junk => {
                for stream in (1..32).step_by(2) {
                    let bytes = frame(MESSAGE_TYPE_RESPONSE, 64, stream);
                    host.write_all(&bytes).await?;
                }
            }
        }
        // It stays there.
        tokio::io::copy(&mut host, &mut tokio::io::sink()).await?;
        Ok(())
    }
}

fn opened(resource: &Resource) -> File {
    match resource {
        Resource::Fd(number) => sys::fd(*number),
        Resource::Path(path) => panic!("{} was not opened", path.display()),
    }
}

/// The vsock device's listener, and the socket that the guest greets.
fn sockets(config: &VmConfig) -> Result<(&Resource, &Resource)> {
    let vsock = config.devices.iter().find_map(|device| match device {
        DeviceConfig::Vsock {
            listener,
            guest_ports,
            ..
        } => Some((listener, &guest_ports[0].socket)),
        _ => None,
    });
    Ok(vsock.ok_or("no vsock")?)
}

async fn serve(config: &VmConfig, stranger: bool, conduct: Conduct) -> Result<()> {
    let (listener, ready) = sockets(config)?;
    let listener = std::os::unix::net::UnixListener::from(OwnedFd::from(opened(listener)));
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;

    let control = config.control.as_ref().map(opened);
    tokio::spawn(Gate::behind(control.ok_or("no control socket")?));
    let (connections, accepted) = mpsc::channel(8);
    let agent = StandIn {
        streams: Mutex::default(),
        arrived: watch::channel(()).0,
        processes: Mutex::default(),
        conduct,
        told: AtomicU64::new(0),
    };
    let agent = Arc::new(agent);
    let mut server = Server::new()
        .add_listener(Listener::new(Accepted(accepted)))
        .register_service(create_agent(agent.clone()));
    server.start().await?;

    let hello = Hello {
        version: protocol::VERSION,
        main_ns: 1_000_000,
        ready_ns: 2_000_000,
    };
    let words = if stranger {
        [b'x'; Hello::LEN]
    } else {
        hello.to_bytes()
    };
    opened(ready).write_all(&words)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let agent = agent.clone();
        let connections = connections.clone();
        tokio::spawn(async move {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.expect("a greeting");
            let port: u32 = line
                .trim_start_matches("CONNECT ")
                .trim()
                .parse()
                .expect("a port");
            let mut name = [0; StreamId::LEN];
            if port == STREAM_PORT {
                stream.read_exact(&mut name).await.expect("a name");
            }
            assert!(stream.buffer().is_empty(), "more was sent than asked for");
            let mut stream = stream.into_inner();
            stream
                .write_all(b"OK 1073741824\n")
                .await
                .expect("answered");
            match (port, agent.conduct) {
                (AGENT_PORT, Conduct::Babbles(babble)) => drop(babble.say(stream).await),
                (AGENT_PORT, _) => drop(connections.send(Ok(stream)).await),
                _ => agent.park(u64::from_le_bytes(name), stream),
            }
        });
    }
}

/// What holds the guest while its VMM is paused.
#[derive(Clone)]
struct Gate {
    paused: Arc<(Mutex<bool>, Condvar)>,
    changed: mpsc::UnboundedSender<()>,
}

impl Gate {
    /// Serves commands on a thread of its own, as long as the answer lives, and holds up all other
    /// tasks while the VMM is paused.
    async fn behind(control: File) {
        let (changed, mut told) = mpsc::unbounded_channel();
        let gate = Self {
            paused: Arc::default(),
            changed,
        };
        let mut commands = gate.clone();
        std::thread::spawn(move || {
            let never = EventFd::new(EFD_NONBLOCK).expect("a descriptor");
            vmm::control::serve(control.into(), &never, &mut commands)
        });
        while told.recv().await.is_some() {
            let (paused, resumed) = &*gate.paused;
            let held = paused.lock().expect("lock");
            drop(resumed.wait_while(held, |paused| *paused).expect("lock"));
        }
    }

    fn set(&self, paused: bool) -> Reply {
        *self.paused.0.lock().expect("lock") = paused;
        self.paused.1.notify_all();
        self.changed.send(()).expect("the guest is there");
        Reply::Done {}
    }
}

impl Commands for Gate {
    fn carry_out(&mut self, request: Request, _: Vec<OwnedFd>) -> Reply {
        match request {
            Request::Pause {} => self.set(true),
            Request::Resume {} => self.set(false),
            Request::State {} => Reply::State {
                state: match *self.paused.0.lock().expect("lock") {
                    true => State::Paused,
                    false => State::Running,
                },
            },
            other => Reply::Failed {
                message: format!("{other:?} is not known here"),
            },
        }
    }
}

struct Accepted(mpsc::Receiver<io::Result<UnixStream>>);

impl futures_core::Stream for Accepted {
    type Item = io::Result<UnixStream>;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

struct StandIn {
    streams: Mutex<HashMap<u64, UnixStream>>,
    arrived: watch::Sender<()>,
    /// By their names, see [`name`].
    processes: Mutex<HashMap<String, Process>>,
    conduct: Conduct,
    /// The number of the last event.
    told: AtomicU64,
}

struct Process {
    args: Vec<String>,
    /// Input, output and errors.
    streams: [Option<UnixStream>; 3],
    status: watch::Sender<Option<u32>>,
}

impl StandIn {
    fn park(&self, name: u64, stream: UnixStream) {
        self.streams.lock().expect("lock").insert(name, stream);
        self.arrived.send_replace(());
    }

    async fn take(&self, name: u64) -> Option<UnixStream> {
        if name == 0 {
            return None;
        }
        let mut arrived = self.arrived.subscribe();
        loop {
            if let Some(stream) = self.streams.lock().expect("lock").remove(&name) {
                return Some(stream);
            }
            arrived.changed().await.ok()?;
        }
    }

    fn status(&self, name: &str) -> watch::Sender<Option<u32>> {
        self.processes.lock().expect("lock")[name].status.clone()
    }

    /// Makes a process, up to its start.
    async fn make(&self, name: String, process: &serde_json::Value, streams: &message::Streams) {
        let args = serde_json::from_value(process["args"].clone()).expect("args");
        let process = Process {
            args,
            streams: [
                self.take(streams.stdin).await,
                self.take(streams.stdout).await,
                self.take(streams.stderr).await,
            ],
            status: watch::channel(None).0,
        };
        self.processes.lock().expect("lock").insert(name, process);
    }

    /// A number that is true, or one that no guest can have.
    fn number(&self, number: u64) -> u64 {
        match self.conduct {
            Conduct::Lies => u64::MAX,
            _ => number,
        }
    }

    /// How many empty elements of a list an answer has.
    fn empties(&self) -> usize {
        match self.conduct {
            // A tag and a length of 0.
            Conduct::Floods { bytes } => bytes / 2,
            _ => 0,
        }
    }
}

/// A process's name: its container's, and its own behind a slash if it is an exec.
fn name(container: &str, exec: &str) -> String {
    match exec {
        "" => container.to_owned(),
        exec => format!("{container}/{exec}"),
    }
}

#[async_trait]
impl Agent for StandIn {
    async fn configure_guest(
        &self,
        _: &TtrpcContext,
        request: message::ConfigureGuestRequest,
    ) -> ttrpc::Result<message::ConfigureGuestResponse> {
        assert!(request.time_ns > 0 && request.entropy.len() == 64);
        Ok(message::ConfigureGuestResponse {
            version: protocol::VERSION,
            kernel_release: request.hostname,
            ..Default::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: message::CreateContainerRequest,
    ) -> ttrpc::Result<message::CreateContainerResponse> {
        if self.conduct == Conduct::Exits {
            eprintln!("bulkhead-vmm: as the script says");
            std::process::exit(1);
        }
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).expect("json");
        let process = &spec["process"];
        if process["args"][0] == "missing" {
            return refuse(Code::NOT_FOUND, "exec: \"missing\": no such\x1b[2J file");
        }
        self.make(request.container_id, process, &request.streams)
            .await;
        Ok(message::CreateContainerResponse {
            pid: self.number(1) as u32,
            ..Default::default()
        })
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: message::ExecProcessRequest,
    ) -> ttrpc::Result<message::ExecProcessResponse> {
        let process = serde_json::from_slice(&request.process).expect("json");
        let name = name(&request.container_id, &request.exec_id);
        self.make(name, &process, &request.streams).await;
        Ok(message::ExecProcessResponse::default())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: message::StartProcessRequest,
    ) -> ttrpc::Result<message::StartProcessResponse> {
        let name = name(&request.container_id, &request.exec_id);
        let status = self.status(&name);
        let (args, [stdin, stdout, stderr]) = {
            let mut processes = self.processes.lock().expect("lock");
            let process = processes.get_mut(&name).expect("there");
            let streams = std::mem::take(&mut process.streams);
            (process.args.clone(), streams)
        };
        match args[0].as_str() {
            "forbidden" => return refuse(Code::PERMISSION_DENIED, "exec: permission denied"),
            "work" => {
                let seconds = args[1].parse().expect("a number");
                std::thread::sleep(Duration::from_secs(seconds));
            }
            "stand" => drop(tokio::spawn(async {
                // Behind the answer to this.
                tokio::time::sleep(Duration::from_millis(50)).await;
                loop {
                    std::thread::park();
                }
            })),
            "exit" => drop(status.send_replace(args[1].parse().ok())),
            "cat" => drop(tokio::spawn(async move {
                let (mut stdin, mut stdout) = (stdin.expect("stdin"), stdout.expect("stdout"));
                let copied = tokio::io::copy(&mut stdin, &mut stdout).await;
                drop(stderr);
                status.send_replace(Some(copied.map_or(1, |_| 0)));
            })),
            "shout" => drop(tokio::spawn(async move {
                let mut stdout = stdout.expect("stdout");
                while stdout.write_all(&[b'x'; 64 << 10]).await.is_ok() {}
                drop((stdin, stderr));
            })),
            // Its streams are open as long as it lives.
            _ => drop(tokio::spawn(async move {
                let mut ended = status.subscribe();
                let _ = ended.wait_for(Option::is_some).await;
                drop((stdin, stdout, stderr));
            })),
        }
        Ok(message::StartProcessResponse {
            exec_ns: self.number(1),
            boot_ns: self.number(1),
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: message::SignalProcessRequest,
    ) -> ttrpc::Result<message::Empty> {
        let status = self.status(&name(&request.container_id, &request.exec_id));
        if status.borrow().is_some() {
            return refuse(Code::FAILED_PRECONDITION, "it has ended");
        }
        status.send_replace(Some(128 + request.signal));
        Ok(message::Empty::default())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: message::WaitProcessRequest,
    ) -> ttrpc::Result<message::WaitProcessResponse> {
        let name = name(&request.container_id, &request.exec_id);
        let mut status = self.status(&name).subscribe();
        let ended = status.wait_for(Option::is_some).await.expect("an end");
        Ok(message::WaitProcessResponse {
            exit_status: self.number(ended.unwrap_or_default().into()) as u32,
            exited_at_ns: self.number(1),
            ..Default::default()
        })
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: message::DeleteContainerRequest,
    ) -> ttrpc::Result<message::Empty> {
        let name = name(&request.container_id, &request.exec_id);
        self.processes.lock().expect("lock").remove(&name);
        Ok(message::Empty::default())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        _: message::PauseContainerRequest,
    ) -> ttrpc::Result<message::Empty> {
        Ok(message::Empty::default())
    }

    async fn next_events(
        &self,
        _: &TtrpcContext,
        _: message::NextEventsRequest,
    ) -> ttrpc::Result<message::NextEventsResponse> {
        let event = |container: &str| message::Event {
            number: self.told.fetch_add(1, Ordering::Relaxed) + 1,
            container_id: container.to_owned(),
            what: Some(event::What::OutOfMemory(message::OutOfMemory {
                kills: u64::MAX,
                ..Default::default()
            })),
            ..Default::default()
        };
        let events = match self.conduct {
            Conduct::Lies => ["stranger", "web", "../web", "", "other"]
                .into_iter()
                .cycle()
                .take(2000)
                .map(event)
                .collect(),
            Conduct::Floods { .. } => {
                let mut events = vec![message::Event::default(); self.empties()];
                events.push(event("web"));
                events
            }
            _ => std::future::pending().await,
        };
        Ok(message::NextEventsResponse {
            events,
            lost: self.number(0),
            ..Default::default()
        })
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        _: message::ListProcessesRequest,
    ) -> ttrpc::Result<message::ListProcessesResponse> {
        Ok(message::ListProcessesResponse {
            processes: vec![message::ProcessDetails::default(); self.empties()],
            ..Default::default()
        })
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        _: message::ContainerStatsRequest,
    ) -> ttrpc::Result<message::ContainerStatsResponse> {
        let counters = (0..self.empties() / 8).map(|number| (format!("{number:x}"), 0));
        Ok(message::ContainerStatsResponse {
            memory_current_bytes: self.number(1),
            memory_max_bytes: self.number(1),
            cpu_usage_us: self.number(1),
            memory_stat: counters.collect(),
            io: vec![message::DeviceIo::default(); self.empties() / 4],
            ..Default::default()
        })
    }

    async fn ping(&self, _: &TtrpcContext, _: message::Empty) -> ttrpc::Result<message::Empty> {
        Ok(message::Empty::default())
    }
}

fn refuse<T>(code: Code, text: &str) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, text)))
}

/// What the compiler cannot check.
#[expect(unsafe_code, reason = "descriptors are named by number")]
mod sys {
    use std::{
        fs::File,
        os::fd::{FromRawFd, OwnedFd},
    };

    /// A descriptor that the process was started with.
    pub(super) fn fd(number: i32) -> File {
        // SAFETY: the launcher passed it and each is taken once.
        File::from(unsafe { OwnedFd::from_raw_fd(number) })
    }
}
