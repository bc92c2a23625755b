//! The recipes of sandbox and pod against a stand-in for the VMM, see
//! `examples/stand_in_vmm.rs`: what works, and that whatever fails leaves
//! nothing behind.

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use shim::{
    bundle::Bundle,
    id::{ContainerId, Namespace},
    pod::{self, Event, Input, Kind, NewContainer, Pod, ProcessId, Root, Status, Stdio},
    sandbox::{Error, Files, Media, Pace, Plan, Purpose, Sandbox, Size, Surroundings, Trace},
};
use tokio::{sync::broadcast, time::timeout};
use vmm::control::Client;

/// The tests look at this process's children, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

/// How long an agent may be silent that is not waited for long.
const SILENCE: Duration = Duration::from_secs(1);

/// Enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory with everything that a sandbox is made from.
struct Host {
    directory: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Host {
    /// One on which the guest does as `script` says.
    fn with(script: &str) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let host = Self {
            directory: tempfile::tempdir().expect("a directory"),
            _turn: turn,
        };
        fs::write(host.path("kernel"), script).expect("written");
        let mut image = vec![0; 8192];
        image[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        image[1036] = 12;
        image[1060] = 2;
        fs::write(host.path("image"), image).expect("written");
        fs::create_dir_all(host.path("bundle/rootfs")).expect("made");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn plan(&self) -> Plan {
        Plan {
            state_root: self.path("state"),
            namespace: Namespace::parse("default").expect("a name"),
            id: id(),
            files: Files {
                kvm: PathBuf::from("/dev/null"),
                vmm: stand_in(),
                kernel: self.path("kernel"),
                image: self.path("image"),
            },
            size: Size {
                cpus: 1,
                memory_mib: 64,
            },
            purpose: Purpose::Containers,
            media: Media::default(),
            surroundings: Surroundings::default(),
            hostname: "web-0".to_owned(),
            deadline: Duration::from_secs(20),
            pace: Pace::default(),
        }
    }

    async fn start(&self) -> Result<Sandbox, Error> {
        Sandbox::start(self.plan(), &Trace::start()).await
    }

    async fn pod(&self) -> Arc<Pod> {
        let pod = Pod::start(self.plan(), &Trace::start()).await;
        pod.expect("started")
    }

    /// One whose agent may be silent for no more than a second.
    async fn impatient_pod(&self) -> Arc<Pod> {
        let plan = Plan {
            pace: Pace {
                quiet: Duration::from_millis(50),
                tick: Duration::from_millis(50),
                answer: Duration::from_millis(500),
                silence: SILENCE,
                work: Duration::from_secs(600),
            },
            ..self.plan()
        };
        let pod = Pod::start(plan, &Trace::start()).await;
        pod.expect("started")
    }

    /// A started container in which the stand-in does as `args` say.
    async fn started(&self, pod: &Pod, name: &str, args: &[&str]) -> ProcessId {
        let new = self.container(name, args, Stdio::null());
        let first = ProcessId::first(new.id.clone());
        pod.create(new).await.expect("made");
        pod.start_process(&first).await.expect("runs");
        first
    }

    /// A container in which the stand-in does as `args` say.
    fn container(&self, name: &str, args: &[&str], stdio: Stdio) -> NewContainer {
        NewContainer {
            id: ContainerId::parse(name).expect("a name"),
            bundle: self.bundle(args),
            root: Root::Bundle,
            stdio,
            terminal_size: None,
            pid: None,
            placeholder: false,
        }
    }

    fn bundle(&self, args: &[&str]) -> Bundle {
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}]}
        });
        fs::write(self.path("bundle/config.json"), config.to_string()).expect("written");
        Bundle::load(&self.path("bundle")).expect("loaded")
    }

    /// No process, no file.
    fn assert_nothing_is_left(&self) {
        let left: Vec<_> = walk(&self.path("state/default"));
        assert!(left.is_empty(), "{left:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let ours = self.directory.path().to_string_lossy().into_owned();
        assert!(!mounts.contains(&ours), "{mounts}");
        assert_eq!(children(), "");
    }
}

fn id() -> ContainerId {
    ContainerId::parse("web").expect("a name")
}

fn stand_in() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    let target = test.ancestors().nth(2).expect("deps is in the target");
    let program = target.join("examples/stand_in_vmm");
    assert!(program.exists(), "build it: cargo build -p shim --examples");
    program
}

fn walk(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// The ids of this process's children.
fn children() -> String {
    let tasks = fs::read_dir("/proc/self/task").expect("tasks");
    let of = |task: fs::DirEntry| fs::read_to_string(task.path().join("children"));
    tasks.flatten().filter_map(|task| of(task).ok()).collect()
}

async fn run(pod: &Pod, new: NewContainer) -> Result<u32, pod::Error> {
    let first = ProcessId::first(new.id.clone());
    pod.create(new).await?;
    pod.start_process(&first).await?;
    Ok(pod.wait(&first).await?.status)
}

fn first() -> ProcessId {
    ProcessId::first(id())
}

/// The most memory, in KiB, by which an agent that does its worst makes this process grow: what is
/// read from its longest answer, and what the allocator keeps.
const GROWTH_KIB: u64 = 256 << 10;

/// The most memory that this process has had since it was last asked to forget it.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.expect("a peak").parse().expect("a number")
}

/// Does `work`, which takes no longer than `deadline` and costs bounded memory.
async fn bounded<T>(deadline: Duration, work: impl Future<Output = T>) -> T {
    fs::write("/proc/self/clear_refs", "5").expect("the peak is forgotten");
    let before = peak_kib();
    let done = timeout(deadline, work).await.expect("in time");
    let grown = peak_kib() - before;
    println!("it grew by {grown} KiB");
    assert!(grown < GROWTH_KIB, "it grew by {grown} KiB");
    done
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_runs_and_its_status_is_the_processs() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    let new = host.container("web", &["exit", "7"], Stdio::null());
    assert_eq!(run(&pod, new).await.expect("ran"), 7);
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn bytes_go_through_the_guest_and_come_back() {
    let host = Host::with("boot");
    let (input, mut feed) = std::io::pipe().expect("a pipe");
    let (mut result, output) = std::io::pipe().expect("a pipe");
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i * 31 / 7) as u8).collect();
    let expected = sent.clone();
    let feeder = std::thread::spawn(move || std::io::Write::write_all(&mut feed, &sent));
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut result, &mut bytes).map(|_| bytes)
    });

    let pod = host.pod().await;
    let stdio = Stdio {
        stdin: Input::From(OwnedFd::from(input)),
        stdout: Some(OwnedFd::from(output)),
        ..Stdio::default()
    };
    let status = run(&pod, host.container("web", &["cat"], stdio)).await;
    assert_eq!(status.expect("ran"), 0);
    pod.delete(&first(), false).await.expect("deleted");
    feeder.join().expect("joined").expect("written");
    assert!(reader.join().expect("joined").expect("read") == expected);
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_goes_through_its_life_and_tells_of_it_in_order() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    let mut events = pod.events();
    let new = host.container("web", &["wait"], Stdio::null());
    pod.create(new).await.expect("made");
    let status = || pod.state(&first()).map(|state| state.status.word());
    assert_eq!(status().expect("there"), "created");
    pod.start_process(&first()).await.expect("runs");
    assert_eq!(status().expect("there"), "running");

    let twice = pod.start_process(&first()).await.expect_err("refused");
    assert_eq!(twice.kind(), Kind::State);
    let early = pod.delete(&first(), false).await.expect_err("refused");
    assert!(
        early.to_string().contains("not stopped: running"),
        "{early}"
    );
    let taken = host.container("web", &["wait"], Stdio::null());
    let taken = pod.create(taken).await.expect_err("refused");
    assert_eq!(taken.kind(), Kind::Exists);

    pod.kill(&first(), 15, false).await.expect("sent");
    assert_eq!(pod.wait(&first()).await.expect("ended").status, 143);
    assert_eq!(status().expect("there"), "stopped");
    let late = pod.kill(&first(), 15, false).await.expect_err("refused");
    assert_eq!(late.to_string(), "container not running");
    let exit = pod.delete(&first(), false).await.expect("deleted");
    assert_eq!(exit.status, 143);
    let gone = pod.delete(&first(), true).await.expect_err("gone");
    assert_eq!(gone.to_string(), "container does not exist");

    let names = std::iter::from_fn(|| events.try_recv().ok()).map(|event| match event {
        Event::Create { .. } => "create",
        Event::Start { .. } => "start",
        Event::Exit { exit, .. } if exit.status == 143 => "exit",
        Event::Delete { .. } => "delete",
        other => panic!("{other:?}"),
    });
    assert_eq!(
        names.collect::<Vec<_>>(),
        ["create", "start", "exit", "delete"]
    );
}

#[tokio::test(flavor = "current_thread")]
async fn two_containers_of_a_pod_live_and_end_apart() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    let other = ProcessId::first(ContainerId::parse("other").expect("a name"));
    for name in ["web", "other"] {
        let new = host.container(name, &["wait"], Stdio::null());
        pod.create(new).await.expect("made");
    }
    pod.start_process(&first()).await.expect("runs");
    pod.start_process(&other).await.expect("runs");
    pod.kill(&first(), 9, true).await.expect("killed");
    assert_eq!(pod.wait(&first()).await.expect("ended").status, 137);
    assert_eq!(pod.state(&other).expect("there").status, Status::Running);
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn a_volume_of_the_host_is_in_the_shared_tree_and_leaves_with_its_container() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    fs::create_dir_all(host.path("volume")).expect("made");
    fs::write(host.path("volume/hello"), "you").expect("written");
    fs::write(host.path("bundle/rootfs/file"), "root").expect("written");
    let mut new = host.container("web", &["wait"], Stdio::null());
    let config = host.path("bundle/config.json");
    let text = fs::read_to_string(&config).expect("read");
    let mut spec: serde_json::Value = serde_json::from_str(&text).expect("json");
    spec["mounts"] = serde_json::json!([
        {"destination": "/v", "type": "bind", "source": host.path("volume"), "options": ["ro"]}
    ]);
    fs::write(&config, spec.to_string()).expect("written");
    new.bundle = Bundle::load(&host.path("bundle")).expect("loaded");
    pod.create(new).await.expect("made");

    let shared = pod.sandbox().path().join("shared");
    let read = |name: &str| fs::read_to_string(shared.join(name));
    assert_eq!(read("0/rootfs/file").expect("there"), "root");
    assert_eq!(read("1/volume/hello").expect("there"), "you");
    let write = |name: &str| fs::write(shared.join(name), "").map_err(|error| error.kind());
    let read_only = Err(std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(write("1/volume/new"), read_only);
    assert_eq!(write("new"), read_only);
    assert_eq!(write("0/rootfs/new"), Ok(()));

    pod.delete(&first(), true).await.expect("deleted");
    assert!(!shared.join("0").exists() && !shared.join("1").exists());
    assert!(host.path("volume/hello").exists());
    assert!(host.path("bundle/rootfs/file").exists());
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
    assert!(host.path("bundle/rootfs/new").exists());
}

#[tokio::test(flavor = "current_thread")]
async fn a_missing_and_a_forbidden_program_have_their_status_and_harmless_words() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    let error = run(&pod, host.container("web", &["missing"], Stdio::null())).await;
    let error = error.expect_err("refused");
    assert_eq!(error.kind().exit_status(), 127);
    assert!(
        error.to_string().contains("no such\\u{1b}[2J file"),
        "{error}"
    );
    let error = run(&pod, host.container("x", &["forbidden"], Stdio::null())).await;
    assert_eq!(error.expect_err("refused").kind().exit_status(), 126);
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn the_trace_of_a_start_has_its_steps_in_order() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    run(&pod, host.container("web", &["exit", "0"], Stdio::null()))
        .await
        .expect("ran");
    let sandbox = pod.sandbox();
    sandbox.save_trace().expect("saved");
    let saved = fs::read_to_string(sandbox.path().join("trace.json")).expect("read");
    let names = [
        "vmm spawned",
        "vm made, kernel entered",
        "kernel booted",
        "agent ready",
        "agent connected",
        "container created",
        "guest configured",
        "process executed",
    ];
    let record = sandbox.trace().record();
    for pair in names.windows(2) {
        let begin = |name| record.spans.iter().find(|span| span.name == name);
        let (first, second) = (begin(pair[0]), begin(pair[1]));
        let (first, second) = (first.expect(pair[0]), second.expect(pair[1]));
        assert!(first.begin_ns <= second.begin_ns, "{pair:?}");
        assert!(saved.contains(pair[0]), "{saved}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_vmm_that_fails_is_told_with_its_words_and_nothing_is_left() {
    let host = Host::with("exit 1 the kernel is not an ELF file");
    let error = host.start().await.expect_err("failed");
    assert!(
        error
            .to_string()
            .contains("the VMM failed: the kernel is not an ELF file"),
        "{error}"
    );
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn a_vmm_whose_end_is_long_after_its_connections_is_told_with_its_words() {
    // Longer than for a machine that has booted, whose calls have deadlines of their own.
    let host = Host::with("hangup 6000 no memory");
    let error = host.start().await.expect_err("failed");
    assert!(matches!(error, Error::BootDeath { .. }), "{error}");
    let told = error.to_string();
    assert!(told.contains("the VMM failed: no memory"), "{told}");
    assert!(!told.contains("eof"), "{told}");
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_breaks_off_while_its_vmm_lives_on_is_told_as_such() {
    let host = Host::with("hangup 1000000 never");
    let mut plan = host.plan();
    plan.deadline = Duration::from_secs(3);
    let error = Sandbox::start(plan, &Trace::start()).await;
    let error = error.expect_err("failed");
    assert!(matches!(error, Error::BootHangUp { .. }), "{error}");
    assert!(error.to_string().contains("bulkhead check"), "{error}");
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_never_boots_is_given_up_with_its_last_lines() {
    let host = Host::with("silent Kernel panic - not syncing");
    let mut plan = host.plan();
    plan.deadline = Duration::from_secs(3);
    let error = Sandbox::start(plan, &Trace::start()).await;
    let error = error.expect_err("failed");
    assert!(matches!(error, Error::BootDeadline { .. }), "{error}");
    assert!(
        error
            .to_string()
            .ends_with("\n  | Kernel panic - not syncing"),
        "{error}"
    );
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn a_start_that_is_given_up_leaves_nothing() {
    let host = Host::with("silent");
    let given_up = tokio::time::timeout(Duration::from_millis(300), host.start()).await;
    assert!(given_up.is_err());
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_with_another_agent_is_refused() {
    let host = Host::with("stranger");
    let error = host.start().await.expect_err("refused");
    assert!(matches!(error, Error::Hello(_)), "{error}");
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn the_death_of_the_vmm_ends_a_call_at_once_with_its_reason() {
    let host = Host::with("boot then exit");
    let pod = host.pod().await;
    let error = run(&pod, host.container("web", &["exit", "0"], Stdio::null())).await;
    let error = error.expect_err("failed");
    assert!(
        error
            .to_string()
            .contains("creating the container: the VMM failed: as the script says"),
        "{error}"
    );
    assert_eq!(error.kind(), Kind::Dead);
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn a_vmm_that_is_killed_ends_all_waits_with_a_status_and_the_rest_still_answers() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    let mut events = pod.events();
    let new = host.container("web", &["wait"], Stdio::null());
    pod.create(new).await.expect("made");
    pod.start_process(&first()).await.expect("runs");
    let vmm = Pid::from_raw(pod.sandbox().vmm_pid() as i32);
    // The agent is at work: it answers nothing.
    let other = host.container("other", &["work", "1000"], Stdio::null());
    let busy = ProcessId::first(other.id.clone());
    pod.create(other).await.expect("made");
    let killing = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        kill(vmm, Signal::SIGKILL).expect("killed");
        Instant::now()
    };
    let web = first();
    let (ends, starting, counting, killed) = tokio::join!(
        async { (pod.wait(&web).await, pod.wait(&web).await, Instant::now()) },
        async { (pod.start_process(&busy).await, Instant::now()) },
        async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            (pod.stats(&web.container).await, Instant::now())
        },
        killing,
    );
    for at in [ends.2, starting.1, counting.1] {
        let took = at.saturating_duration_since(killed);
        // Much less than a call's deadline.
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
    assert_eq!(ends.0.expect("ended").status, 137);
    assert_eq!(ends.1.expect("ended").status, 137);
    assert_eq!(starting.0.expect_err("dead").kind(), Kind::Dead);
    assert_eq!(counting.0.expect_err("dead").kind(), Kind::Dead);
    assert_eq!(pod.wait(&busy).await.expect("ended").status, 137);
    let told = std::iter::from_fn(|| events.try_recv().ok());
    assert!(
        told.into_iter()
            .any(|event| matches!(event, Event::Exit { .. }))
    );
    let state = pod.state(&first()).expect("there");
    assert_eq!(state.status.word(), "stopped");
    let why = pod.sandbox().failure("running").expect("dead").to_string();
    assert!(why.contains("the VMM was killed by signal 9"), "{why}");
    pod.delete(&first(), false).await.expect("deleted");
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn whatever_is_missing_is_named_and_nothing_is_left() {
    type Change = fn(&mut Plan);
    let changes: [(Change, &str); 4] = [
        (
            |plan| plan.files.kvm = "/nonexistent/kvm".into(),
            "/nonexistent/kvm",
        ),
        (
            |plan| plan.files.kernel = "/nonexistent/vmlinux".into(),
            "--kernel",
        ),
        (|plan| plan.files.image = "/dev/null".into(), "not an EROFS"),
        (|plan| plan.files.vmm = "/nonexistent/vmm".into(), "--vmm"),
    ];
    for (change, words) in changes {
        let host = Host::with("boot");
        let mut plan = host.plan();
        change(&mut plan);
        let error = Sandbox::start(plan, &Trace::start()).await;
        let error = error.expect_err("failed").to_string();
        assert!(error.contains(words), "{error}");
        host.assert_nothing_is_left();
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_second_sandbox_of_the_same_name_is_refused_and_the_first_lives_on() {
    let host = Host::with("boot");
    let first = host.start().await.expect("started");
    let error = host.start().await.expect_err("refused");
    assert!(error.to_string().contains("already exists"), "{error}");
    first.configure(None).await.expect("the first answers");
}

#[tokio::test(flavor = "current_thread")]
async fn an_agent_that_stands_still_is_found_and_ends_every_wait_with_the_reason() {
    let host = Host::with("boot");
    let pod = host.impatient_pod().await;
    let mut events = pod.events();
    let other = host.started(&pod, "other", &["wait"]).await;
    let web = host.started(&pod, "web", &["stand"]).await;

    let ends = async { tokio::join!(pod.wait(&web), pod.wait(&other)) };
    let (web_end, other_end) = timeout(PATIENCE, ends).await.expect("both end");
    assert_eq!(web_end.expect("ended").status, 137);
    assert_eq!(other_end.expect("ended").status, 137);

    let reason = pod.sandbox().failure("running the pod").expect("a failure");
    let reason = reason.to_string();
    assert!(
        reason.contains("the agent has not answered for 1 s, while the virtual machine ran"),
        "{reason}"
    );
    let told = std::iter::from_fn(|| events.try_recv().ok());
    let exits =
        told.filter(|event| matches!(event, Event::Exit { exit, .. } if exit.status == 137));
    assert_eq!(exits.count(), 2);
    for process in [&web, &other] {
        assert_eq!(pod.state(process).expect("there").status.word(), "stopped");
        pod.delete(process, false).await.expect("deleted");
    }
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

/// Leaves a pod to itself for so long that an agent would be dead, and asks it to end by a signal.
async fn lives_on(pod: &Pod, process: &ProcessId, go_on: impl FnOnce()) {
    tokio::time::sleep(3 * SILENCE).await;
    assert!(!pod.sandbox().has_ended(), "it was ended");
    go_on();
    pod.kill(process, 15, false).await.expect("sent");
    assert_eq!(pod.wait(process).await.expect("ended").status, 143);
}

#[tokio::test(flavor = "current_thread")]
async fn a_machine_that_is_stopped_from_outside_is_left_alone_and_goes_on() {
    let host = Host::with("boot");
    let pod = host.impatient_pod().await;
    let web = host.started(&pod, "web", &["wait"]).await;
    let vmm = Pid::from_raw(pod.sandbox().vmm_pid() as i32);
    kill(vmm, Signal::SIGSTOP).expect("stopped");
    lives_on(&pod, &web, || kill(vmm, Signal::SIGCONT).expect("goes on")).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_machine_that_is_paused_is_left_alone_and_goes_on() {
    let host = Host::with("boot");
    let pod = host.impatient_pod().await;
    let web = host.started(&pod, "web", &["wait"]).await;
    let mut vmm = Client::connect(&pod.sandbox().path().join("vmm.sock")).expect("connected");
    vmm.pause().expect("paused");
    lives_on(&pod, &web, || vmm.resume().expect("resumed")).await;
}

#[tokio::test(flavor = "current_thread")]
async fn an_agent_that_is_at_work_is_waited_for() {
    let host = Host::with("boot");
    let pod = host.impatient_pod().await;
    // It answers nothing meanwhile.
    let web = host.started(&pod, "web", &["work", "3"]).await;
    lives_on(&pod, &web, || {}).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_start_whose_hook_fails_when_the_program_has_ended_is_told_with_the_hook() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    let mut new = host.container("web", &["exit", "0"], Stdio::null());
    let config = host.path("bundle/config.json");
    let text = fs::read_to_string(&config).expect("read");
    let mut spec: serde_json::Value = serde_json::from_str(&text).expect("json");
    spec["hooks"] = serde_json::json!({
        "poststart": [{"path": "/bin/sh", "args": ["sh", "-c", "echo a reason >&2; exit 3"]}]
    });
    fs::write(&config, spec.to_string()).expect("written");
    new.bundle = Bundle::load(&host.path("bundle")).expect("loaded");
    let error = run(&pod, new).await.expect_err("failed").to_string();
    assert!(
        error.contains("poststart") && error.contains("a reason"),
        "{error}"
    );
    assert_eq!(pod.wait(&first()).await.expect("ended").status, 0);
}

#[tokio::test(flavor = "current_thread")]
async fn a_limit_above_the_machines_memory_is_refused_before_the_agent_is_asked() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    let web = host.started(&pod, "web", &["wait"]).await;
    let limit = serde_json::json!({"memory": {"limit": 65 << 20}});
    let error = pod
        .update(&web.container, &limit)
        .await
        .expect_err("refused");
    assert_eq!(error.kind(), Kind::Invalid);
    let words = error.to_string();
    assert!(words.contains("65 MiB is more than the 64 MiB"), "{words}");
}

#[tokio::test(flavor = "current_thread")]
async fn an_agent_that_lies_is_heard_of_its_own_containers_and_drops_no_others_events() {
    let host = Host::with("boot then lie");
    let pod = host.pod().await;
    let mut events = pod.events();
    let begin = Instant::now();
    bounded(PATIENCE, async {
        let web = host.started(&pod, "web", &["wait"]).await;
        host.started(&pod, "other", &["wait"]).await;
        tokio::time::sleep(Duration::from_millis(2500)).await;
        pod.kill(&web, 15, false).await.expect("sent");
        assert_eq!(pod.wait(&web).await.expect("ended").status, 255);
        let stats = pod.stats(&web.container).await.expect_err("it has ended");
        assert_eq!(stats.kind(), Kind::State);
        let other = ContainerId::parse("other").expect("a name");
        let stats = pod.stats(&other).await.expect("counted");
        assert_eq!(stats.memory_current_bytes, u64::MAX);
    })
    .await;
    let most = 3 + begin.elapsed().as_secs() as usize;
    let told: Vec<Event> = std::iter::from_fn(|| match events.try_recv() {
        Ok(event) => Some(event),
        Err(broadcast::error::TryRecvError::Lagged(lost)) => panic!("{lost} are lost"),
        Err(_) => None,
    })
    .collect();
    let of = |name: &str| {
        let oom = |event: &&Event| matches!(event, Event::Oom { container } if container.as_str() == name);
        told.iter().filter(oom).count()
    };
    // With one answer a second.
    assert!((2..=most).contains(&of("web")), "{told:?}");
    let all = told
        .iter()
        .filter(|event| matches!(event, Event::Oom { .. }));
    assert_eq!(all.count(), of("web") + of("other"));
    let exits = told
        .iter()
        .filter(|event| matches!(event, Event::Exit { .. }));
    assert_eq!(exits.count(), 1);
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn the_longest_answers_of_an_agent_cost_bounded_memory() {
    let host = Host::with("boot then flood 1000000");
    let pod = host.pod().await;
    bounded(PATIENCE, async {
        let web = host.started(&pod, "web", &["wait"]).await;
        let listed = pod.processes(&web.container).await.expect("listed");
        let told = shim::oci::told::processes(&listed);
        assert_eq!(told.as_array().map(Vec::len), Some(4096));
        drop((listed, told));
        pod.stats(&web.container).await.expect("counted");
        tokio::time::sleep(Duration::from_secs(2)).await;
        pod.kill(&web, 15, false).await.expect("it still answers");
    })
    .await;
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn an_agent_whose_answers_are_too_long_is_not_listened_to_any_more() {
    let host = Host::with("boot then flood 4000000");
    let pod = host.pod().await;
    bounded(PATIENCE, async {
        let web = host.container("web", &["wait"], Stdio::null());
        // Its first news may come before this is answered.
        if pod.create(web).await.is_ok() {
            assert_eq!(pod.wait(&first()).await.expect("ended").status, 137);
            let listed = pod.processes(&first().container).await;
            listed.expect_err("it has ended");
        }
    })
    .await;
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn output_without_an_end_that_nobody_reads_costs_bounded_memory() {
    let host = Host::with("boot");
    let pod = host.pod().await;
    let (_reader, output) = std::io::pipe().expect("a pipe");
    let (terminal, nobody) = {
        let pty = nix::pty::openpty(None, None).expect("a pair");
        (pty.slave, pty.master)
    };
    bounded(PATIENCE, async {
        for (name, output) in [("web", OwnedFd::from(output)), ("other", terminal)] {
            let stdio = Stdio {
                stdout: Some(output),
                ..Stdio::default()
            };
            let new = host.container(name, &["shout"], stdio);
            let process = ProcessId::first(new.id.clone());
            pod.create(new).await.expect("made");
            pod.start_process(&process).await.expect("runs");
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        for name in ["web", "other"] {
            let process = ProcessId::first(ContainerId::parse(name).expect("a name"));
            let exit = pod.delete(&process, true).await.expect("deleted");
            assert_eq!(exit.status, 137);
        }
    })
    .await;
    drop(nobody);
    pod.shutdown().await;
    drop(pod);
    host.assert_nothing_is_left();
}

/// What becomes of a container whose agent babbles in this way.
async fn babbled_at(host: &Host, how: &str) {
    let kernel = host.path(how);
    fs::write(&kernel, format!("boot then babble {how}")).expect("written");
    let mut plan = host.plan();
    plan.id = ContainerId::parse(how).expect("a name");
    plan.files.kernel = kernel;
    let pod = Pod::start(plan, &Trace::start()).await.expect("started");
    let new = host.container(how, &["wait"], Stdio::null());
    let error = pod.create(new).await.expect_err("failed").to_string();
    assert!(
        error.contains("the connection to the guest failed"),
        "{how}: {error}"
    );
    pod.shutdown().await;
}

#[tokio::test(flavor = "current_thread")]
async fn an_agent_that_babbles_fails_what_is_asked_of_it_and_no_more() {
    let host = Host::with("boot");
    bounded(PATIENCE / 2, async {
        tokio::join!(
            Box::pin(babbled_at(&host, "noise")),
            Box::pin(babbled_at(&host, "data")),
            Box::pin(babbled_at(&host, "length")),
            Box::pin(babbled_at(&host, "junk")),
        )
    })
    .await;
    host.assert_nothing_is_left();
}
