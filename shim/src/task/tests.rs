//! The Task service as containerd calls it, over its socket, before a pod whose guest is played by
//! `examples/stand_in_vmm.rs`.

use std::{
    fs,
    io::{self, PipeWriter, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::{net::UnixStream, task::JoinHandle};
use ttrpc::{
    Code,
    r#async::{Client, transport::Socket},
    proto::Request,
};

use super::{
    arguments::Invocation,
    daemon::{self, serve},
    events::Publisher,
    proto::{
        task::{
            CheckpointTaskRequest, ConnectRequest, CreateTaskRequest, DeleteRequest,
            ExecProcessRequest, KillRequest, PidsRequest, ShutdownRequest, StartRequest,
            StateRequest, StateResponse, Status, WaitRequest,
        },
        task_ttrpc::TaskClient,
    },
    socket::{Claim, claim},
    tasks::Tasks,
};
use crate::{
    id::{ContainerId, Namespace},
    pod::{Pod, PodPlan},
    sandbox::{Files, Pace, Purpose, Size, Surroundings, Trace},
    testing::executable,
};

/// A shim that serves a pod, and a client of it.
struct Shim {
    directory: tempfile::TempDir,
    starter: PipeWriter,
    serving: JoinHandle<Result<(), daemon::Error>>,
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
        let Ok(Claim::Ours(socket)) = claim(&path("s")) else {
            panic!("no socket");
        };
        let (known, starter) = io::pipe().expect("a pipe");
        let serving = tokio::spawn(async move { serve(socket, known, &tasks).await });
        let client = TaskClient::new(connect(&path("s")).await);
        Self {
            directory,
            starter,
            serving,
            client,
        }
    }

    /// What of the pod is on the host.
    fn left(&self) -> Vec<PathBuf> {
        let path = |name: &str| self.directory.path().join(name);
        let made = [path("s"), path("state/default/web")];
        made.into_iter().filter(|path| path.exists()).collect()
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

    async fn pids(&self) -> Vec<u32> {
        let request = PidsRequest {
            id: "web".to_owned(),
            ..Default::default()
        };
        let told = self.client.pids(context(), &request).await.expect("told");
        told.processes.iter().map(|told| told.pid).collect()
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

    async fn shut_down(&self, now: bool) {
        let request = ShutdownRequest {
            id: "web".to_owned(),
            now,
            ..Default::default()
        };
        let answer = self.client.shutdown(context(), &request).await;
        answer.expect("answered");
    }

    async fn end(self) {
        self.shut_down(true).await;
        self.serving.await.expect("joined").expect("served");
    }
}

/// Does something four times at once, and returns the codes of the refusals.
async fn at_once<T>(act: impl AsyncFn() -> Result<T, (Code, String)>) -> Vec<Code> {
    let (a, b, c, d) = tokio::join!(act(), act(), act(), act());
    let refused = [a, b, c, d].map(|done| done.err().map(|(code, _)| code));
    refused.into_iter().flatten().collect()
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
    assert_eq!(shim.pids().await, [pid]);
    shim.kill(15).await.expect("sent");
    let ended = waiting.await.expect("joined").expect("ended");
    assert_eq!(ended.exit_status, 143);
    let state = shim.state("").await.expect("told");
    assert_eq!(state.status.enum_value(), Ok(Status::STOPPED));
    assert_eq!(state.exit_status, 143);
    assert!(state.exited_at.seconds > 0);
    assert_eq!(shim.pids().await, [pid]);
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
async fn calls_that_come_at_once_are_done_once_each() {
    let shim = Shim::start().await;
    for _ in 0..2 {
        let refused = at_once(async || shim.create(&["wait"]).await).await;
        assert_eq!(refused, [Code::ALREADY_EXISTS; 3]);
        let refused = at_once(async || shim.begin("").await).await;
        assert_eq!(refused, [Code::FAILED_PRECONDITION; 3]);
        // One that comes when it has ended is told so.
        let refused = at_once(async || shim.kill(9).await).await;
        assert!(refused.len() <= 3, "{refused:?}");
        assert!(refused.iter().all(|code| *code == Code::NOT_FOUND));
        let refused = at_once(async || shim.wait("").await).await;
        assert_eq!(refused, []);
        let refused = at_once(async || shim.delete("").await).await;
        assert_eq!(refused, [Code::NOT_FOUND; 3]);
    }
    shim.end().await;
}

#[tokio::test]
async fn all_kinds_of_calls_at_once_are_answered() {
    let shim = Shim::start().await;
    for _ in 0..5 {
        let _ = tokio::join!(
            shim.create(&["wait"]),
            shim.begin(""),
            shim.create(&["wait"]),
            shim.state(""),
            shim.kill(9),
            shim.delete(""),
            shim.delete(""),
        );
        // Whatever came of it, this is its end.
        let _ = shim.begin("").await;
        let _ = shim.kill(9).await;
        let _ = shim.wait("").await;
        let _ = shim.delete("").await;
        assert_eq!(shim.state("").await.expect_err("gone").0, Code::NOT_FOUND);
    }
    shim.shut_down(false).await;
    assert_eq!(shim.left(), Vec::<PathBuf>::new());
    shim.serving.await.expect("joined").expect("served");
}

#[tokio::test]
async fn one_that_is_deleted_while_it_is_made_is_gone_when_it_was_made() {
    let shim = Shim::start().await;
    // Until there is a logger nothing is made.
    let path = |name: &str| shim.directory.path().join(name);
    let script = format!(
        "#!/bin/sh\ntouch {begun}\nuntil [ -e {go} ]; do sleep 0.02; done\nexec 5>&-\nexec cat <&3\n",
        begun = path("begun").display(),
        go = path("go").display()
    );
    executable(&path("logger"), &script);
    let mut request = shim.creation(&["wait"]);
    request.stdout = format!("binary://{}", path("logger").display());

    let make = async { shim.client.create(context(), &request).await };
    let remove = async {
        while !path("begun").exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(
            shim.begin("").await.expect_err("not made").0,
            Code::NOT_FOUND
        );
        let deleted = shim.delete("");
        tokio::pin!(deleted);
        let early = tokio::time::timeout(Duration::from_millis(50), &mut deleted);
        assert!(early.await.is_err());
        fs::write(path("go"), "").expect("written");
        deleted.await
    };
    let (made, removed) = tokio::join!(make, remove);
    made.expect("made");
    assert_eq!(removed, Ok(137));
    assert_eq!(shim.state("").await.expect_err("gone").0, Code::NOT_FOUND);
    shim.end().await;
}

#[tokio::test]
async fn a_shim_with_tasks_is_not_shut_down_by_asking() {
    let shim = Shim::start().await;
    shim.create(&["wait"]).await.expect("made");
    shim.shut_down(false).await;
    let state = shim.state("").await.expect("served");
    assert_eq!(state.status.enum_value(), Ok(Status::CREATED));
    assert_eq!(shim.left().len(), 2);
    shim.end().await;
}

#[tokio::test]
async fn who_hears_that_a_shim_was_shut_down_can_use_its_names() {
    let shim = Shim::start().await;
    shim.create(&["wait"]).await.expect("made");
    assert_eq!(shim.delete("").await, Ok(137));
    assert_eq!(shim.left().len(), 2);
    shim.shut_down(false).await;
    assert_eq!(shim.left(), Vec::<PathBuf>::new());
    shim.serving.await.expect("joined").expect("served");
}

#[tokio::test]
async fn a_shim_whose_starter_ends_before_it_answers_ends_too() {
    let shim = Shim::start().await;
    shim.create(&["wait"]).await.expect("made");
    drop(shim.starter);
    shim.serving.await.expect("joined").expect("served");
    assert!(!shim.directory.path().join("s").exists());
    assert!(!shim.directory.path().join("state/default/web").exists());
}

#[tokio::test]
async fn a_shim_whose_starter_has_answered_stays() {
    let mut shim = Shim::start().await;
    shim.starter.write_all(&[0]).expect("written");
    shim.starter = io::pipe().expect("a pipe").1;
    shim.create(&["wait"]).await.expect("made");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(shim.state("").await.is_ok());
    shim.end().await;
}
