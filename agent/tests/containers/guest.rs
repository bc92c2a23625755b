//! An agent in a child process, in namespaces of its own, and the host's side
//! of it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use agent::{
    boot::{Power, Sockets, serve_sockets},
    cgroup, port,
    port::Port,
};
use nix::mount::{MsFlags, mount};
use protocol::{agent as message, agent_ttrpc::AgentClient};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use ttrpc::context;

/// The agent's side: process 1 of its namespaces. Never comes back.
pub(crate) fn serve(directory: &Path) -> ! {
    let none = None::<&str>;
    let plain = MsFlags::empty();
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).expect("private mounts");
    mount(Some("proc"), "/proc", Some("proc"), plain, none).expect("proc");
    match mount(Some("cgroup2"), cgroup::ROOT, Some("cgroup2"), plain, none) {
        // It is there already, and the only one.
        Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
        Err(error) => panic!("cgroup2: {error}"),
    }
    mount(Some("tmpfs"), "/run", Some("tmpfs"), plain, none).expect("a tmpfs");
    let rpc = port::unix(&directory.join("rpc")).expect("a socket");
    let streams = port::unix(&directory.join("streams")).expect("a socket");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let sockets = Sockets {
            rpc: Port::new(rpc).expect("a port"),
            streams: Port::new(streams).expect("a port"),
        };
        let power = Power::default();
        serve_sockets(0, sockets, Path::new("/run/bulkhead"), power.clone())
            .await
            .expect("an agent");
        // It is there with a rename, which leaves no descriptor to be counted.
        fs::write(directory.join("new"), "").expect("a file");
        fs::rename(directory.join("new"), directory.join("ready")).expect("a file");
        power.wait().await;
    });
    std::process::exit(0)
}

/// How many agents there were.
static AGENTS: AtomicU64 = AtomicU64::new(0);

/// The host's side of one agent.
pub(crate) struct Guest {
    directory: tempfile::TempDir,
    agent: Child,
    client: OnceLock<AgentClient>,
    /// How many descriptors the agent had before anyone asked it anything.
    pub(crate) open_files_at_start: usize,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        self.remove_cgroups();
    }
}

/// How a process ended and what it wrote.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) status: u32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Guest {
    /// Starts an agent with a busybox root.
    pub(crate) fn start() -> Self {
        AGENTS.fetch_add(1, Ordering::Relaxed);
        let directory = tempfile::tempdir().expect("a directory");
        make_root(&directory.path().join("root"));
        let agent = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--ipc",
                "--uts",
                "--fork",
                "--kill-child",
                "--",
            ])
            .arg(std::env::current_exe().expect("our own path"))
            .arg("serve")
            .arg(directory.path())
            .spawn()
            .expect("unshare of util-linux");
        let mut guest = Self {
            directory,
            agent,
            client: OnceLock::new(),
            open_files_at_start: 0,
        };
        let began = std::time::Instant::now();
        while !guest.directory.path().join("ready").exists() {
            assert!(began.elapsed().as_secs() < 20, "the agent does not start");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        guest.open_files_at_start = guest.open_files() + 1;
        guest
    }

    /// The agent's id on this machine: the only child of unshare.
    fn agent_pid(&self) -> u32 {
        let id = self.agent.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
        children
            .ok()
            .and_then(|text| text.split_whitespace().next()?.parse().ok())
            .expect("an agent that runs")
    }

    /// How many descriptors the agent has; one is the connection of requests.
    pub(crate) fn open_files(&self) -> usize {
        let directory = fs::read_dir(format!("/proc/{}/fd", self.agent_pid()));
        directory.map_or(0, Iterator::count)
    }

    /// How many ended children the agent has not collected.
    pub(crate) fn zombies(&self) -> usize {
        let id = self.agent_pid();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
        let is_zombie = |pid: &str| {
            fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
        };
        let text = children.unwrap_or_default();
        text.split_whitespace().filter(|pid| is_zombie(pid)).count()
    }

    pub(crate) async fn ping(&self) {
        let context = context::with_timeout(30_000_000_000);
        let answered = self.client().ping(context, &message::Empty::new()).await;
        answered.expect("a sign of life");
    }

    pub(crate) async fn agent_rss_kib(&self) -> u64 {
        let context = context::with_timeout(30_000_000_000);
        let stats = self
            .client()
            .guest_stats(context, &message::Empty::new())
            .await;
        stats.expect("stats").agent_rss_kib
    }

    pub(crate) async fn pids(&self, id: &str) -> Vec<u32> {
        let mut request = message::ListProcessesRequest::new();
        request.container_id = id.into();
        let context = context::with_timeout(30_000_000_000);
        let listed = self.client().list_processes(context, &request).await;
        listed.expect("a list").pids
    }

    pub(crate) async fn pause(&self, id: &str, paused: bool) -> ttrpc::Result<message::Empty> {
        let mut request = message::PauseContainerRequest::new();
        request.container_id = id.into();
        request.paused = paused;
        let context = context::with_timeout(15_000_000_000);
        self.client().pause_container(context, &request).await
    }

    pub(crate) async fn resize(
        &self,
        id: &str,
        width: u32,
        height: u32,
    ) -> ttrpc::Result<message::Empty> {
        let mut request = message::ResizeTerminalRequest::new();
        request.container_id = id.into();
        (request.width, request.height) = (width, height);
        let context = context::with_timeout(30_000_000_000);
        self.client().resize_terminal(context, &request).await
    }

    /// Gives the root and its directories to the user `uid`, and lets it get there.
    pub(crate) fn own_root_by(&self, uid: u32) {
        use std::os::unix::fs::{PermissionsExt, chown};
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.directory.path(), open).expect("a directory of ours");
        for directory in [".", "dev", "proc", "sys", "tmp", "etc", "bin"] {
            chown(self.root().join(directory), Some(uid), Some(uid)).expect("root's right");
        }
    }

    /// A directory of the root, as the host sees it.
    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// The agent's own resident memory and its id, as the host sees it.
    pub(crate) fn client(&self) -> &AgentClient {
        self.client.get_or_init(|| {
            let path = self.directory.path().join("rpc");
            let stream = std::os::unix::net::UnixStream::connect(path).expect("a connection");
            stream.set_nonblocking(true).expect("non-blocking");
            let stream = UnixStream::from_std(stream).expect("a stream");
            AgentClient::new(ttrpc::r#async::Client::new(
                ttrpc::r#async::transport::Socket::new(stream),
            ))
        })
    }

    /// Opens a stream; its id and the host's end.
    pub(crate) async fn stream(&self) -> (u64, UnixStream) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.path().join("streams");
        let mut stream = UnixStream::connect(path).await.expect("a connection");
        stream.write_all(&id.to_le_bytes()).await.expect("a write");
        (id, stream)
    }

    pub(crate) async fn create_with(
        &self,
        id: &str,
        spec: &Value,
        streams: message::Streams,
    ) -> ttrpc::Result<u32> {
        let mut request = message::CreateContainerRequest::new();
        request.container_id = id.into();
        request.spec = spec.to_string().into_bytes();
        let root = request.root.mut_or_insert_default();
        root.set_path(self.root().to_str().expect("text").into());
        request.streams = Some(streams).into();
        let context = context::with_timeout(20_000_000_000);
        self.client()
            .create_container(context, &request)
            .await
            .map(|made| made.pid)
    }

    /// Makes a container that stands for the pod.
    pub(crate) async fn placeholder(&self, id: &str, spec: &Value) -> ttrpc::Result<u32> {
        let mut request = message::CreateContainerRequest::new();
        request.container_id = id.into();
        request.spec = spec.to_string().into_bytes();
        request.placeholder = true;
        let context = context::with_timeout(30_000_000_000);
        let made = self.client().create_container(context, &request).await?;
        self.start_process(id, "").await?;
        Ok(made.pid)
    }

    /// Starts a container that stays, in a cgroup of its name.
    pub(crate) async fn stay_as(&self, id: &str, spec: &Value) {
        let mut spec = spec.clone();
        spec["linux"]["cgroupsPath"] = cgroup_of(id).into();
        let none = message::Streams::new();
        self.create_with(id, &spec, none)
            .await
            .expect("a container");
        self.start_process(id, "").await.expect("a start");
    }

    /// Runs a shell command in the container `id`; what it prints.
    pub(crate) async fn sh_in(&self, id: &str, command: &str) -> String {
        let process = process(&["sh", "-c", command]);
        let output = self.exec(id, "sh", &process).await.expect("an exec");
        assert_eq!(output.stderr, "");
        output.stdout
    }

    pub(crate) async fn state(
        &self,
        id: &str,
        exec: &str,
    ) -> ttrpc::Result<message::ProcessStateResponse> {
        let mut request = message::ProcessStateRequest::new();
        request.container_id = id.into();
        request.exec_id = exec.into();
        let context = context::with_timeout(30_000_000_000);
        self.client().process_state(context, &request).await
    }

    pub(crate) async fn stats(&self, id: &str) -> message::ContainerStatsResponse {
        let mut request = message::ContainerStatsRequest::new();
        request.container_id = id.into();
        let context = context::with_timeout(30_000_000_000);
        let stats = self.client().container_stats(context, &request).await;
        stats.expect("stats")
    }

    pub(crate) async fn update(
        &self,
        id: &str,
        resources: &Value,
    ) -> ttrpc::Result<message::Empty> {
        let mut request = message::UpdateContainerRequest::new();
        request.container_id = id.into();
        request.resources = resources.to_string().into_bytes();
        let context = context::with_timeout(30_000_000_000);
        self.client().update_container(context, &request).await
    }

    pub(crate) async fn next_events(&self, after: u64) -> message::NextEventsResponse {
        let mut request = message::NextEventsRequest::new();
        request.after = after;
        let context = context::with_timeout(20_000_000_000);
        let events = self.client().next_events(context, &request).await;
        events.expect("events")
    }

    pub(crate) async fn details(&self, id: &str) -> Vec<message::ProcessDetails> {
        let mut request = message::ListProcessesRequest::new();
        request.container_id = id.into();
        request.details = true;
        let context = context::with_timeout(30_000_000_000);
        let listed = self.client().list_processes(context, &request).await;
        listed.expect("a list").processes
    }

    pub(crate) async fn start_process(
        &self,
        id: &str,
        exec: &str,
    ) -> ttrpc::Result<message::StartProcessResponse> {
        let mut request = message::StartProcessRequest::new();
        request.container_id = id.into();
        request.exec_id = exec.into();
        self.client()
            .start_process(context::with_timeout(20_000_000_000), &request)
            .await
    }

    pub(crate) async fn wait(
        &self,
        id: &str,
        exec: &str,
    ) -> ttrpc::Result<message::WaitProcessResponse> {
        let mut request = message::WaitProcessRequest::new();
        request.container_id = id.into();
        request.exec_id = exec.into();
        self.client()
            .wait_process(context::with_timeout(30_000_000_000), &request)
            .await
    }

    pub(crate) async fn signal(
        &self,
        id: &str,
        signal: u32,
        all: bool,
    ) -> ttrpc::Result<message::Empty> {
        let mut request = message::SignalProcessRequest::new();
        request.container_id = id.into();
        request.signal = signal;
        request.all = all;
        self.client()
            .signal_process(context::with_timeout(10_000_000_000), &request)
            .await
    }

    pub(crate) async fn delete(
        &self,
        id: &str,
        exec: &str,
        force: bool,
    ) -> ttrpc::Result<message::Empty> {
        let mut request = message::DeleteContainerRequest::new();
        request.container_id = id.into();
        request.exec_id = exec.into();
        request.force = force;
        self.client()
            .delete_container(context::with_timeout(20_000_000_000), &request)
            .await
    }

    /// Runs a container to its end, `input` on its standard input, and deletes it.
    pub(crate) async fn run_with(&self, spec: &Value, input: &[u8]) -> ttrpc::Result<Output> {
        let (stdin, mut host_in) = self.stream().await;
        let (stdout, host_out) = self.stream().await;
        let (stderr, host_err) = self.stream().await;
        let mut streams = message::Streams::new();
        (streams.stdin, streams.stdout, streams.stderr) = (stdin, stdout, stderr);
        self.create_with("c", spec, streams).await?;
        let started = self.start_process("c", "").await;
        if let Err(error) = started {
            self.delete("c", "", true).await?;
            return Err(error);
        }
        let input = input.to_vec();
        let writer = tokio::spawn(async move {
            let _ = host_in.write_all(&input).await;
            let _ = host_in.shutdown().await;
        });
        let (stdout, stderr) = tokio::join!(read_all(host_out), read_all(host_err));
        writer.await.expect("a writer");
        let status = self.wait("c", "").await?.exit_status;
        self.delete("c", "", false).await?;
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    /// Runs a shell command in a container of the usual configuration.
    pub(crate) async fn sh(&self, command: &str) -> Output {
        self.run(&spec(&["sh", "-c", command])).await
    }

    pub(crate) async fn run(&self, spec: &Value) -> Output {
        self.run_with(spec, b"")
            .await
            .expect("a container that runs")
    }

    /// Runs a further process in the container `id`.
    pub(crate) async fn exec(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
    ) -> ttrpc::Result<Output> {
        let (stdout, host_out) = self.stream().await;
        let (stderr, mut host_err) = self.stream().await;
        if process["terminal"] == true {
            // It has its error output on the terminal.
            host_err.shutdown().await.expect("a stream");
            host_err = closed();
        }
        let mut request = message::ExecProcessRequest::new();
        request.container_id = id.into();
        request.exec_id = exec.into();
        request.process = process.to_string().into_bytes();
        let streams = request.streams.mut_or_insert_default();
        (streams.stdout, streams.stderr) = (stdout, stderr);
        let context = context::with_timeout(20_000_000_000);
        self.client().exec_process(context, &request).await?;
        self.start_process(id, exec).await?;
        let (stdout, stderr) = tokio::join!(read_all(host_out), read_all(host_err));
        let status = self.wait(id, exec).await?.exit_status;
        self.delete(id, exec, false).await?;
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    /// Makes a further process without streams, and does not start it.
    pub(crate) async fn make_exec(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
    ) -> ttrpc::Result<message::ExecProcessResponse> {
        let mut request = message::ExecProcessRequest::new();
        request.container_id = id.into();
        request.exec_id = exec.into();
        request.process = process.to_string().into_bytes();
        let context = context::with_timeout(20_000_000_000);
        self.client().exec_process(context, &request).await
    }

    /// The agent may have been killed with containers left in this machine's hierarchy.
    fn remove_cgroups(&self) {
        let Ok(mounts) = fs::read_to_string("/proc/self/mounts") else {
            return;
        };
        let hierarchy = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields.get(2) == Some(&"cgroup2"))
            .map(|fields| PathBuf::from(fields[1]));
        let Some(cgroup) = hierarchy.map(|hierarchy| hierarchy.join(cgroup_of_all())) else {
            return;
        };
        // The kernel may still be ending who was in them.
        let began = std::time::Instant::now();
        while fs::read_to_string(cgroup.join("cgroup.events"))
            .is_ok_and(|events| events.contains("populated 1"))
            && began.elapsed().as_secs() < 20
        {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        remove_cgroup(&cgroup);
    }
}

/// The cgroup of all containers of this agent, and of no other: the one before may still have some.
fn cgroup_of_all() -> String {
    let agents = AGENTS.load(Ordering::Relaxed);
    format!("bulkhead-agent-test-{}-{agents}", std::process::id())
}

/// A container's cgroup in it.
pub(crate) fn cgroup_of(id: &str) -> String {
    format!("/{}/{id}", cgroup_of_all())
}

fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

/// A stream whose other side is closed.
fn closed() -> UnixStream {
    UnixStream::pair().expect("a pair").0
}

async fn read_all(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.expect("a stream");
    String::from_utf8(bytes).expect("text")
}

/// The status's code and text of a failed call.
pub(crate) fn failure<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other:?}"),
    }
}

/// A configuration as container engines write it, with `args`.
pub(crate) fn spec(args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_NET_BIND_SERVICE",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_DAC_OVERRIDE"
    ]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/bin:/sbin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1000, "soft": 900}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs"},
        "hostname": "web-0",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "cgroupsPath": cgroup_of("c"),
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"},
                {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}
            ],
            "maskedPaths": ["/proc/kcore", "/proc/timer_list", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// The `process` of such a configuration, for an exec.
pub(crate) fn process(args: &[&str]) -> Value {
    spec(args)["process"].clone()
}

/// Starts a container that stays.
pub(crate) async fn stay(guest: &Guest, spec: &Value) {
    guest.stay_as("c", spec).await;
}

/// A root file system: busybox and what it needs.
fn make_root(root: &Path) {
    for directory in [
        "bin", "dev", "proc", "sys", "etc", "tmp", "root", "home/web",
    ] {
        fs::create_dir_all(root.join(directory)).expect("a directory");
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .expect("busybox-static is installed");
    fs::copy(busybox, root.join("bin/busybox")).expect("a copy");
    let list = Command::new(busybox)
        .arg("--list")
        .output()
        .expect("busybox");
    for applet in String::from_utf8_lossy(&list.stdout).lines() {
        let _ = symlink("busybox", root.join("bin").join(applet));
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n",
    )
    .expect("a file");
    fs::write(root.join("bin/script"), "not a program").expect("a file");
}
