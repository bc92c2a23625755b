//! The Task service as containerd calls it, over its socket, before a pod whose guest is played by
//! `examples/stand_in_vmm.rs`.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::{
    Code,
    r#async::{Client, Server, transport::Socket},
    proto::Request,
};

use super::{
    arguments::Invocation,
    daemon::listener,
    events::Publisher,
    proto::{
        task::{
            CheckpointTaskRequest, ConnectRequest, CreateTaskRequest, DeleteRequest,
            ExecProcessRequest, KillRequest, PidsRequest, ShutdownRequest, StartRequest,
            StateRequest, StateResponse, Status, WaitRequest,
        },
        task_ttrpc::TaskClient,
    },
    service,
    tasks::Tasks,
};
use crate::{
    id::{ContainerId, Namespace},
    pod::{Pod, PodPlan},
    sandbox::{Files, Pace, Purpose, Size, Surroundings, Trace},
};

/// A shim that serves a pod, and a client of it.
struct Shim {
    directory: tempfile::TempDir,
    tasks: Arc<Tasks>,
    _server: Server,
    client: TaskClient,
}

impl Shim {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        fs::write(path("kernel"), "boot").expect("written");
        let mut image = vec![0; 8192];
        image[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        image[1036] = 12;
        image[1060] = 2;
        fs::write(path("image"), image).expect("written");
        fs::create_dir_all(path("bundle/rootfs")).expect("made");

        let namespace = Namespace::parse("default").expect("a name");
        let id = ContainerId::parse("web").expect("a name");
        let plan = PodPlan {
            state_root: path("state"),
            namespace: namespace.clone(),
            id: id.clone(),
            files: Files {
                kvm: PathBuf::from("/dev/null"),
                vmm: stand_in(),
                kernel: path("kernel"),
                image: path("image"),
            },
            size: Size {
                cpus: 1,
                memory_mib: 64,
            },
            purpose: Purpose::Containers,
            media: crate::sandbox::Media::default(),
            surroundings: Surroundings::default(),
            hostname: "web-0".to_owned(),
            deadline: Duration::from_secs(20),
            pace: Pace::default(),
        };
        let pod = Pod::start(plan, &Trace::start()).await.expect("started");
        let invocation = Invocation {
            namespace,
            id,
            address: "/nowhere".to_owned(),
            bundle: None,
            debug: false,
        };
        let publisher = Publisher::start("/nowhere".to_owned(), "default".to_owned());
        let tasks = Arc::new(Tasks::new(invocation, path("bundle"), publisher));
        tasks.use_pod(pod);
        let socket = UnixListener::bind(path("s")).expect("bound");
        let mut server = Server::new()
            .add_listener(listener(socket))
            .register_service(service::methods(&tasks));
        server.start().await.expect("started");
        let client = TaskClient::new(connect(&path("s")).await);
        Self {
            directory,
            tasks,
            _server: server,
            client,
        }
    }

    /// A request to make a container in which the stand-in does as `args` say.
    fn creation(&self, args: &[&str]) -> CreateTaskRequest {
        let bundle = self.directory.path().join("bundle");
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}]}
        });
        fs::write(bundle.join("config.json"), config.to_string()).expect("written");
        CreateTaskRequest {
            id: "web".to_owned(),
            bundle: bundle.display().to_string(),
            ..Default::default()
        }
    }

    async fn create(&self, args: &[&str]) -> Result<u32, (Code, String)> {
        let created = self.client.create(context(), &self.creation(args)).await;
        created.map(|created| created.pid).map_err(refusal)
    }

    async fn begin(&self, exec: &str) -> Result<u32, (Code, String)> {
        let request = StartRequest {
            id: "web".to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        let started = self.client.start(context(), &request).await;
        started.map(|started| started.pid).map_err(refusal)
    }

    async fn exec(&self, exec: &str, args: &[&str]) -> Result<(), (Code, String)> {
        let process = serde_json::json!({"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/"});
        let request = ExecProcessRequest {
            id: "web".to_owned(),
            exec_id: exec.to_owned(),
            spec: MessageField::some(Any {
                value: process.to_string().into_bytes(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let made = self.client.exec(context(), &request).await;
        made.map(drop).map_err(refusal)
    }

    async fn state(&self, exec: &str) -> Result<StateResponse, (Code, String)> {
        let request = StateRequest {
            id: "web".to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.client
            .state(context(), &request)
            .await
            .map_err(refusal)
    }

    async fn wait(&self, exec: &str) -> Result<u32, (Code, String)> {
        let request = WaitRequest {
            id: "web".to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        let ended = self.client.wait(context(), &request).await;
        ended.map(|ended| ended.exit_status).map_err(refusal)
    }

    async fn kill(&self, signal: u32) -> Result<(), (Code, String)> {
        let request = KillRequest {
            id: "web".to_owned(),
            signal,
            ..Default::default()
        };
        let sent = self.client.kill(context(), &request).await;
        sent.map(drop).map_err(refusal)
    }

    async fn delete(&self, exec: &str) -> Result<u32, (Code, String)> {
        let request = DeleteRequest {
            id: "web".to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        let deleted = self.client.delete(context(), &request).await;
        deleted.map(|deleted| deleted.exit_status).map_err(refusal)
    }

    async fn end(self) {
        self.tasks.end(Duration::ZERO).await;
    }
}

async fn connect(path: &std::path::Path) -> Client {
    Client::new(Socket::new(
        UnixStream::connect(path).await.expect("served"),
    ))
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(60))
}

fn refusal(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("no answer: {other}"),
    }
}

fn stand_in() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    let target = test.ancestors().nth(2).expect("deps is in the target");
    let program = target.join("examples/stand_in_vmm");
    assert!(program.exists(), "build it: cargo build -p shim --examples");
    program
}

#[tokio::test]
async fn a_task_goes_through_its_life_in_the_states_that_clients_know() {
    let shim = Shim::start().await;
    let pid = shim.create(&["wait"]).await.expect("made");
    assert_ne!(pid, 0);
    let state = shim.state("").await.expect("told");
    assert_eq!(state.status.enum_value(), Ok(Status::CREATED));
    assert_eq!((state.id.as_str(), state.pid), ("web", pid));
    assert_eq!(state.exited_at.seconds, -62_135_596_800);

    // Who waits before the start hears of the end.
    let waiting = {
        let client = TaskClient::new(connect(&shim.directory.path().join("s")).await);
        let request = WaitRequest {
            id: "web".to_owned(),
            ..Default::default()
        };
        tokio::spawn(async move { client.wait(context(), &request).await })
    };
    assert_eq!(shim.begin("").await, Ok(pid));
    let state = shim.state("").await.expect("told");
    assert_eq!(state.status.enum_value(), Ok(Status::RUNNING));
    let request = PidsRequest {
        id: "web".to_owned(),
        ..Default::default()
    };
    let pids = shim.client.pids(context(), &request).await.expect("told");
    let pids: Vec<_> = pids.processes.iter().map(|told| told.pid).collect();
    assert_eq!(pids, [pid]);
    shim.kill(15).await.expect("sent");
    let ended = waiting.await.expect("joined").expect("ended");
    assert_eq!(ended.exit_status, 143);
    let state = shim.state("").await.expect("told");
    assert_eq!(state.status.enum_value(), Ok(Status::STOPPED));
    assert_eq!(state.exit_status, 143);
    assert!(state.exited_at.seconds > 0);
    assert_eq!(shim.delete("").await, Ok(143));
    let (code, message) = shim.state("").await.expect_err("gone");
    assert_eq!(code, Code::NOT_FOUND);
    assert!(message.contains("container not created"), "{message}");
    shim.end().await;
}

#[tokio::test]
async fn what_is_out_of_order_has_the_codes_that_clients_know() {
    let shim = Shim::start().await;
    let code = |result: Result<u32, (Code, String)>| result.expect_err("refused").0;
    assert_eq!(code(shim.begin("").await), Code::NOT_FOUND);
    assert_eq!(code(shim.wait("").await), Code::NOT_FOUND);
    assert_eq!(code(shim.delete("").await), Code::NOT_FOUND);

    shim.create(&["wait"]).await.expect("made");
    let (again, message) = shim.create(&["wait"]).await.expect_err("refused");
    assert_eq!(again, Code::ALREADY_EXISTS);
    assert!(message.contains("already exists"), "{message}");
    shim.begin("").await.expect("started");
    assert_eq!(code(shim.begin("").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(shim.delete("").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(shim.wait("e1").await), Code::NOT_FOUND);

    shim.kill(9).await.expect("sent");
    assert_eq!(shim.wait("").await, Ok(137));
    let (late, message) = shim.kill(9).await.expect_err("refused");
    assert_eq!(late, Code::NOT_FOUND);
    assert!(message.contains("process already finished"), "{message}");
    let (dead, _) = shim.exec("e1", &["exit", "0"]).await.expect_err("refused");
    assert_eq!(dead, Code::FAILED_PRECONDITION);
    assert_eq!(shim.delete("").await, Ok(137));
    assert_eq!(code(shim.delete("").await), Code::NOT_FOUND);

    // Names are no paths, and a program that is missing is told in the words clients look for.
    let mut request = shim.creation(&["wait"]);
    request.id = "../web".to_owned();
    let refused = shim.client.create(context(), &request).await;
    assert_eq!(
        refusal(refused.expect_err("refused")).0,
        Code::INVALID_ARGUMENT
    );
    let checkpoint = CheckpointTaskRequest::default();
    let refused = shim.client.checkpoint(context(), &checkpoint).await;
    assert_eq!(
        refusal(refused.expect_err("refused")).0,
        Code::UNIMPLEMENTED
    );
    shim.end().await;
}

#[tokio::test]
async fn both_versions_of_the_service_are_served() {
    let shim = Shim::start().await;
    let client = connect(&shim.directory.path().join("s")).await;
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let request = Request {
            service: service.to_owned(),
            method: "Connect".to_owned(),
            payload: ConnectRequest::default().write_to_bytes().expect("written"),
            ..Default::default()
        };
        client.request(request).await.expect(service);
    }
    shim.end().await;
}

#[tokio::test]
async fn a_shim_with_tasks_is_not_shut_down_by_asking() {
    let shim = Shim::start().await;
    shim.create(&["wait"]).await.expect("made");
    let mut request = ShutdownRequest::default();
    shim.client
        .shutdown(context(), &request)
        .await
        .expect("answered");
    let over = tokio::time::timeout(Duration::from_millis(50), shim.tasks.over());
    assert!(over.await.is_err());
    request.now = true;
    shim.client
        .shutdown(context(), &request)
        .await
        .expect("answered");
    shim.tasks.over().await;
    shim.end().await;
}
