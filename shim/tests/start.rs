//! The sandbox's recipe against a stand-in for the VMM, see
//! `examples/stand_in_vmm.rs`: what works, and that whatever fails leaves
//! nothing behind.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use shim::{
    bundle::Bundle,
    container::{self, Wiring},
    id::{ContainerId, Namespace},
    sandbox::{Error, Files, Plan, Sandbox, Size, Trace, open_directory},
};

/// The tests look at this process's children, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

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
        let root = open_directory(&self.path("bundle/rootfs")).expect("opened");
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
            root: Some(shim::sandbox::Share {
                directory: root,
                read_only: true,
            }),
            hostname: "web-0".to_owned(),
            deadline: Duration::from_secs(20),
        }
    }

    async fn start(&self) -> Result<Sandbox, Error> {
        Sandbox::start(self.plan(), &Trace::start()).await
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

async fn run(sandbox: &Sandbox, bundle: &Bundle, wiring: Wiring) -> Result<u8, container::Error> {
    let configured = async { sandbox.configure().await.map_err(container::Error::from) };
    let spec = bundle.for_guest(None);
    let name = id();
    let created = container::create(sandbox, &name, &spec, wiring);
    let (_, created) = tokio::try_join!(configured, created)?;
    let running = created.start().await?;
    let status = running.wait().await?;
    running.drained().await;
    Ok(status)
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_runs_and_its_status_is_the_processs() {
    let host = Host::with("boot");
    let sandbox = host.start().await.expect("started");
    let status = run(&sandbox, &host.bundle(&["exit", "7"]), Wiring::none()).await;
    assert_eq!(status.expect("ran"), 7);
    drop(sandbox);
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

    let sandbox = host.start().await.expect("started");
    let wiring = Wiring::of(Some(input.as_fd()), Some(output.as_fd()), None).expect("wired");
    drop((OwnedFd::from(input), OwnedFd::from(output)));
    let status = run(&sandbox, &host.bundle(&["cat"]), wiring).await;
    assert_eq!(status.expect("ran"), 0);
    feeder.join().expect("joined").expect("written");
    assert!(reader.join().expect("joined").expect("read") == expected);
}

#[tokio::test(flavor = "current_thread")]
async fn a_signal_reaches_the_process() {
    let host = Host::with("boot");
    let sandbox = host.start().await.expect("started");
    sandbox.configure().await.expect("configured");
    let spec = host.bundle(&["wait"]).for_guest(None);
    let created = container::create(&sandbox, &id(), &spec, Wiring::none()).await;
    let running = created.expect("made").start().await.expect("runs");
    running.signal(15).await.expect("sent");
    assert_eq!(running.wait().await.expect("ended"), 143);
}

#[tokio::test(flavor = "current_thread")]
async fn a_missing_and_a_forbidden_program_have_their_status_and_harmless_words() {
    let host = Host::with("boot");
    let sandbox = host.start().await.expect("started");
    let error = run(&sandbox, &host.bundle(&["missing"]), Wiring::none()).await;
    let error = error.expect_err("refused");
    assert_eq!(error.exit_status(), 127);
    assert!(
        error.to_string().contains("no such\\u{1b}[2J file"),
        "{error}"
    );
    drop(sandbox);

    let sandbox = host.start().await.expect("started");
    let error = run(&sandbox, &host.bundle(&["forbidden"]), Wiring::none()).await;
    assert_eq!(error.expect_err("refused").exit_status(), 126);
    drop(sandbox);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn the_trace_of_a_start_has_its_steps_in_order() {
    let host = Host::with("boot");
    let sandbox = host.start().await.expect("started");
    run(&sandbox, &host.bundle(&["exit", "0"]), Wiring::none())
        .await
        .expect("ran");
    sandbox.save_trace().expect("saved");
    let saved = fs::read_to_string(sandbox.path().join("trace.json")).expect("read");
    let names = [
        "vmm spawned",
        "vm made, kernel entered",
        "kernel booted",
        "agent ready",
        "agent connected",
        "guest configured",
        "container created",
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
async fn a_guest_that_never_boots_is_given_up_with_its_last_lines() {
    let host = Host::with("silent Kernel panic - not syncing");
    let mut plan = host.plan();
    plan.deadline = Duration::from_millis(300);
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
    let sandbox = host.start().await.expect("started");
    let error = run(&sandbox, &host.bundle(&["exit", "0"]), Wiring::none()).await;
    let error = error.expect_err("failed");
    assert!(
        error
            .to_string()
            .contains("creating the container: the VMM failed: as the script says"),
        "{error}"
    );
    assert_eq!(error.exit_status(), 125);
    drop(sandbox);
    host.assert_nothing_is_left();
}

#[tokio::test(flavor = "current_thread")]
async fn a_vmm_that_is_killed_ends_the_wait_for_the_process() {
    let host = Host::with("boot");
    let sandbox = host.start().await.expect("started");
    let vmm = nix::unistd::Pid::from_raw(sandbox.vmm_pid() as i32);
    let bundle = host.bundle(&["wait"]);
    let killing = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        nix::sys::signal::kill(vmm, nix::sys::signal::Signal::SIGKILL).expect("killed");
    };
    let (status, ()) = tokio::join!(run(&sandbox, &bundle, Wiring::none()), killing);
    let error = status.expect_err("failed").to_string();
    assert!(error.contains("the VMM was killed by signal 9"), "{error}");
    drop(sandbox);
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
    first.configure().await.expect("the first answers");
}
