//! The OCI commands against a stand-in for the VMM, see
//! `examples/stand_in_vmm.rs`: what callers of a runtime rely on, and that
//! whatever is killed, and whenever, the next command leaves nothing behind.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{net::UnixListener, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    sys::{
        prctl::set_child_subreaper,
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use serde_json::{Value, json};

/// The tests look for this program's processes and mounts, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

/// Enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What fails at once takes less, also on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(8);

/// How many times something is repeated; more by an environment variable.
fn rounds(few: usize) -> usize {
    let asked = std::env::var("BULKHEAD_ROUNDS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(few)
}

/// A directory with everything that a container is made from, and the state of those made.
struct Host {
    directory: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Host {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // What a command leaves running becomes our child, as it becomes that of an engine's monitor.
        set_child_subreaper(true).expect("a subreaper");
        let host = Self {
            directory: tempfile::tempdir().expect("a directory"),
            _turn: turn,
        };
        fs::write(host.path("kernel"), "boot").expect("written");
        let mut image = vec![0; 8192];
        image[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        image[1036] = 12;
        image[1060] = 2;
        fs::write(host.path("image"), image).expect("written");
        host.bundle("bundle", &["wait"], |_| {});
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    /// A bundle in which the stand-in does as `args` say.
    fn bundle(&self, name: &str, args: &[&str], change: impl FnOnce(&mut Value)) {
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/"},
            "root": {"path": "rootfs"},
            "hostname": "web-0",
            "linux": {"namespaces": [
                {"type": "network"}, {"type": "mount"}, {"type": "pid"}, {"type": "uts"}, {"type": "ipc"}
            ]}
        });
        change(&mut config);
        fs::create_dir_all(self.path(name).join("rootfs/precious")).expect("made");
        fs::write(self.path(name).join("config.json"), config.to_string()).expect("written");
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command
            .arg("--root")
            .arg(self.path("state"))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// `verb` with the files that a machine is made from.
    fn making(&self, verb: &[&str], id: &str) -> Command {
        let mut command = self.command(verb);
        command
            .arg("--vmm")
            .arg(stand_in())
            .arg("--kernel")
            .arg(self.path("kernel"))
            .arg("--image")
            .arg(self.path("image"))
            .arg(id);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("starts")
    }

    /// The output of a command that succeeds.
    fn ok(&self, args: &[&str]) -> String {
        said(&self.run(args))
    }

    /// The complaint of a command that fails.
    fn refused(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Makes a container and returns the pid that stands for it.
    fn create(&self, bundle: &str, id: &str) -> Pid {
        let file = self.text("pid");
        let bundle = self.text(bundle);
        let verb = ["create", "--bundle", &bundle, "--pid-file", &file];
        self.made(self.making(&verb, id));
        let pid = fs::read_to_string(&file).expect("a pid file");
        Pid::from_raw(pid.parse().expect("a number"))
    }

    /// Runs a command whose container keeps its streams, so that there is no end to wait for.
    fn made(&self, mut command: Command) {
        let words = tempfile::NamedTempFile::new().expect("a file");
        let stderr = words.reopen().expect("opened");
        let status = command.stdout(Stdio::null()).stderr(stderr).status();
        let words = fs::read_to_string(words.path()).expect("read");
        assert!(status.expect("starts").success(), "{words}");
    }

    fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.ok(&["state", id])).expect("json")
    }

    fn status(&self, id: &str) -> String {
        self.state(id)["status"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    fn await_status(&self, id: &str, status: &str) {
        eventually(status, || self.status(id) == status);
    }

    /// The process that made the pod of `id`.
    fn owner(&self, id: &str) -> Pid {
        let journal = self.path("state/default").join(id).join("journal");
        let journal = fs::read_to_string(journal).expect("a journal");
        let first: Value =
            serde_json::from_str(journal.lines().next().expect("a line")).expect("json");
        Pid::from_raw(first["owner"].as_i64().expect("a pid") as i32)
    }

    /// No directory, mount, process or cgroup; and the root file systems are whole.
    fn assert_nothing_is_left(&self) {
        let state = self.path("state/default");
        let left = || -> Vec<PathBuf> {
            let entries = fs::read_dir(&state).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect()
        };
        eventually("an empty directory", || left().is_empty());
        let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let unmounted = holds_soon(|| !mounts().contains(&self.text("")));
        assert!(unmounted, "{}", mounts());
        let directory = self.text("");
        let gone = holds_soon(|| {
            reap();
            processes(&directory).is_empty()
        });
        assert!(gone, "processes are left: {:?}", processes(&directory));
        assert!(self.path("bundle/rootfs/precious").exists());
    }
}

impl Drop for Host {
    /// What a test that failed leaves running would be taken for the next one's.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let directory = self.text("");
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let left = processes(&directory);
            if left.is_empty() {
                break;
            }
            left.iter().for_each(|process| end(process.pid));
            reap();
            std::thread::sleep(Duration::from_millis(5));
        }
        // What the killed processes had mounted.
        for name in self.run(&["gc"]).stdout.split(|byte| *byte == b'\n') {
            eprintln!("left: {}", String::from_utf8_lossy(name));
        }
    }
}

fn said(output: &Output) -> String {
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {words}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stand_in() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    let target = test.ancestors().nth(2).expect("deps is in the target");
    target.join("examples/stand_in_vmm")
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    assert!(holds_soon(holds), "waited in vain for {what}");
}

fn holds_soon(holds: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Takes the statuses of what has become our child and ended.
fn reap() {
    while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
    {
    }
}

/// The status with which our child `pid` ends.
fn ended(pid: Pid) -> i32 {
    let mut status = WaitStatus::StillAlive;
    let deadline = Instant::now() + PATIENCE;
    while status == WaitStatus::StillAlive {
        assert!(Instant::now() < deadline, "waited in vain for {pid}'s end");
        std::thread::sleep(Duration::from_millis(5));
        status = waitpid(pid, Some(WaitPidFlag::WNOHANG)).expect("our child");
    }
    match status {
        WaitStatus::Exited(_, status) => status,
        other => panic!("{other:?}"),
    }
}

/// A process that is left.
#[derive(Debug)]
struct Left {
    pid: Pid,
    /// Its command line, as it is told.
    #[expect(dead_code, reason = "it is printed")]
    line: String,
}

/// Relays, pods' processes and stand-ins that have to do with `directory`.
fn processes(directory: &str) -> Vec<Left> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ours = entries.filter_map(|entry| {
        let path = entry.path();
        let line = fs::read_to_string(path.join("cmdline")).ok()?;
        let program = fs::read_link(path.join("exe")).ok()?;
        let name = program.file_name()?.to_string_lossy().into_owned();
        let ours = line.contains(directory)
            || (["bulkhead-relay", "stand_in_vmm"].contains(&name.as_str())
                && parent(&path)? == std::process::id());
        let pid = entry.file_name().to_str()?.parse().ok()?;
        ours.then_some(Left {
            pid: Pid::from_raw(pid),
            line,
        })
    });
    ours.collect()
}

fn parent(process: &Path) -> Option<u32> {
    let status = fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

fn end(pid: Pid) {
    // It may have ended by itself.
    let _ = kill(pid, Signal::SIGKILL);
}

#[test]
fn a_container_goes_through_the_verbs_and_its_pid_is_its() {
    let host = Host::new();
    let pid = host.create("bundle", "web");
    let state = host.state("web");
    assert_eq!(state["status"], "created");
    assert_eq!(state["pid"], pid.as_raw());
    assert_eq!(state["bundle"], host.text("bundle"));
    let namespace =
        |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("there");
    for kind in ["net", "mnt", "pid", "uts", "ipc"] {
        assert_ne!(
            namespace(&pid.to_string(), kind),
            namespace("self", kind),
            "{kind}"
        );
    }
    let line = fs::read(format!("/proc/{pid}/cmdline")).expect("there");
    assert_eq!(line, b"wait\0");

    host.ok(&["start", "web"]);
    assert!(
        host.refused(&["start", "web"])
            .contains("cannot start an already running container")
    );
    let again = host
        .making(&["create", "--bundle", &host.text("bundle")], "web")
        .output();
    let again = String::from_utf8_lossy(&again.expect("starts").stderr).into_owned();
    assert!(
        again.contains("container with given ID already exists"),
        "{again}"
    );
    assert!(
        host.refused(&["delete", "web"])
            .contains("that is not stopped: running")
    );
    let list: Value = serde_json::from_str(&host.ok(&["list", "--format", "json"])).expect("json");
    assert_eq!(list[0]["id"], "web");
    assert_eq!(list[0]["status"], "running");
    assert_eq!(host.ok(&["list", "-q"]), "web\n");
    assert_eq!(host.ok(&["ps", "-f", "json", "web"]), format!("[{pid}]\n"));

    assert!(
        host.refused(&["kill", "web", "FOO"])
            .contains("unknown signal \"FOO\"")
    );
    host.ok(&["kill", "web", "SIGUSR1"]);
    assert_eq!(ended(pid), 128 + 10);
    host.await_status("web", "stopped");
    assert_eq!(host.state("web")["pid"], 0);
    assert!(
        host.refused(&["kill", "web"])
            .contains("container not running")
    );
    assert!(
        host.refused(&["exec", "web", "x"])
            .contains("cannot exec in a stopped container")
    );
    host.ok(&["delete", "web"]);
    assert!(
        host.refused(&["delete", "web"])
            .contains("container does not exist")
    );
    assert!(
        host.refused(&["state", "web"])
            .contains("container does not exist")
    );
    host.ok(&["delete", "--force", "web"]);
    host.assert_nothing_is_left();
}

#[test]
fn the_files_of_the_pid_are_the_containers_and_not_the_hosts() {
    let host = Host::new();
    fs::create_dir(host.path("data")).expect("made");
    fs::write(host.path("data/inside"), "").expect("written");
    let data = host.text("data");
    host.bundle("files", &["wait"], |config| {
        config["mounts"] = json!([
            {"destination": "/precious", "type": "bind", "source": data, "options": ["rbind", "ro"]}
        ]);
    });
    let pid = host.create("files", "web");
    // Engines join the mount namespace of the pid, and so get its root, to copy files.
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    eventually("the container's root", || !root.join("etc/passwd").exists());
    assert!(root.join("precious/inside").exists());
    let written = fs::write(root.join("precious/inside"), "x").expect_err("read-only");
    assert_eq!(written.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mounts");
    assert!(mounts.lines().count() <= 3, "{mounts}");
    let working = fs::read_link(format!("/proc/{pid}/cwd")).expect("a directory");
    assert_eq!(working, Path::new("/"));
    host.ok(&["delete", "--force", "web"]);
    host.assert_nothing_is_left();
}

#[test]
fn signals_to_the_pid_reach_the_process_and_its_status_comes_back() {
    let host = Host::new();
    let pid = host.create("bundle", "web");
    host.ok(&["start", "web"]);
    kill(pid, Signal::SIGTERM).expect("sent");
    assert_eq!(ended(pid), 143);
    host.await_status("web", "stopped");
    host.ok(&["delete", "web"]);
    host.assert_nothing_is_left();
}

#[test]
fn the_output_of_a_container_ends_with_its_process() {
    let host = Host::new();
    let (mut output, end) = std::io::pipe().expect("a pipe");
    let bundle = host.text("bundle");
    let mut create = host.making(&["create", "--bundle", &bundle], "web");
    create.stdout(end.try_clone().expect("a copy")).stderr(end);
    assert!(create.status().expect("starts").success());
    // It holds the ends that it gave to the command.
    drop(create);
    host.ok(&["start", "web"]);
    let (sender, ended) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut words = String::new();
        let read = std::io::Read::read_to_string(&mut output, &mut words);
        sender.send(read.map(|_| words)).expect("heard");
    });
    host.ok(&["kill", "web", "KILL"]);
    // The pod's process is there until the container is deleted, and has none of its streams.
    let words = ended.recv_timeout(PATIENCE).expect("the output's end");
    assert_eq!(words.expect("read"), "");
    host.await_status("web", "stopped");
    host.ok(&["delete", "web"]);
    reader.join().expect("ended");
    host.assert_nothing_is_left();
}

#[test]
fn a_program_that_is_missing_is_told_in_the_words_and_with_the_status_that_engines_know() {
    let host = Host::new();
    host.bundle("missing", &["missing"], |_| {});
    let (log, bundle) = (host.text("log"), host.text("missing"));
    let create = [
        "--log",
        &log,
        "--log-format",
        "json",
        "create",
        "--bundle",
        &bundle,
    ];
    let status = host.making(&create, "web").status().expect("starts");
    assert_eq!(status.code(), Some(127));
    let record: Value =
        serde_json::from_str(&fs::read_to_string(&log).expect("read")).expect("one record");
    assert!(
        record["msg"]
            .as_str()
            .is_some_and(|text| text.contains("no such")),
        "{record}"
    );
    host.assert_nothing_is_left();
    // One that is there and cannot be executed is found at the start.
    host.bundle("forbidden", &["forbidden"], |_| {});
    host.create("forbidden", "web");
    let output = host.run(&["start", "web"]);
    assert_eq!(output.status.code(), Some(126));
    host.ok(&["delete", "--force", "web"]);
    host.assert_nothing_is_left();
}

/// The status of a command that makes a container and fails, which it does at once: not only when
/// the relay, which waits for the pod's end, has been waited for in its cgroup.
fn fails_at_once(mut command: Command) -> Option<i32> {
    let begin = Instant::now();
    let output = command.output().expect("starts");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(begin.elapsed() < AT_ONCE, "{:?}: {words}", begin.elapsed());
    output.status.code()
}

#[test]
fn a_start_that_fails_is_told_at_once() {
    let host = Host::new();
    host.bundle("missing", &["missing"], |_| {});
    let bundle = host.text("missing");
    for verb in ["create", "run"] {
        let command = host.making(&[verb, "--bundle", &bundle], "web");
        assert_eq!(fails_at_once(command), Some(127), "{verb}");
        host.assert_nothing_is_left();
    }
    // Nor do the other members of a pod wait when one fails.
    let sandbox = host.create("bundle", "infra");
    host.ok(&["start", "infra"]);
    host.bundle("missing", &["missing"], |config| {
        config["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": "infra"
        });
        config["linux"]["namespaces"] = json!([
            {"type": "network", "path": format!("/proc/{sandbox}/ns/net")},
            {"type": "mount"}, {"type": "pid"}
        ]);
    });
    let command = host.making(&["create", "--bundle", &bundle], "app");
    assert_eq!(fails_at_once(command), Some(127));
    assert_eq!(host.status("infra"), "running");
    host.ok(&["delete", "--force", "infra"]);
    host.assert_nothing_is_left();
}

#[test]
fn an_exec_in_a_frozen_container_is_refused_or_waits_until_that_is_not() {
    let host = Host::new();
    host.create("bundle", "web");
    host.ok(&["start", "web"]);
    host.ok(&["pause", "web"]);
    let refused = host.refused(&["exec", "web", "exit", "0"]);
    assert!(refused.contains("--ignore-paused"), "{refused}");
    let exec = ["exec", "--ignore-paused", "web", "exit", "3"];
    let waiting = || {
        let mut exec = host.command(&exec).spawn().expect("starts");
        std::thread::sleep(Duration::from_millis(500));
        assert!(
            exec.try_wait().expect("looked at").is_none(),
            "it did not wait"
        );
        exec
    };
    // One that is ended while it waits leaves nothing to be waited for.
    let mut given_up = waiting();
    kill(Pid::from_raw(given_up.id() as i32), Signal::SIGTERM).expect("sent");
    assert_eq!(given_up.wait().expect("ends").code(), None);
    let mut exec = waiting();
    host.ok(&["resume", "web"]);
    assert_eq!(exec.wait().expect("ends").code(), Some(3));
    host.ok(&["delete", "--force", "web"]);
    host.assert_nothing_is_left();
}

#[test]
fn a_pod_without_descriptors_waits_for_some_and_takes_commands_then() {
    let host = Host::new();
    host.create("bundle", "web");
    let pod = host.owner("web").to_string();
    let listed = || -> BTreeSet<u32> {
        let open = fs::read_dir(format!("/proc/{pod}/fd")).expect("descriptors");
        open.flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    };
    // Those that it has for a moment only are not there twice.
    let mut open = listed();
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let before = std::mem::replace(&mut open, listed());
        if open == before {
            break;
        }
    }
    let free = (0..)
        .find(|number| !open.contains(number))
        .expect("a number");
    let limit = |limit: &str| {
        let arguments = ["--pid", &pod, &format!("--nofile={limit}")];
        said(
            &Command::new("prlimit")
                .args(arguments)
                .output()
                .expect("starts"),
        );
    };
    let ticks = || -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pod}/stat")).expect("there");
        let fields = stat.rsplit(')').next().expect("fields").split_whitespace();
        fields
            .skip(11)
            .take(2)
            .map(|ticks| ticks.parse::<u64>().expect("a number"))
            .sum()
    };
    limit(&format!("{free}:"));
    let mut state = host.command(&["state", "web"]);
    let mut state = state.stdout(Stdio::null()).spawn().expect("starts");
    let before = ticks();
    std::thread::sleep(Duration::from_secs(1));
    // Of a hundred.
    let used = ticks() - before;
    assert!(
        used < 40,
        "{used} hundredths of a second were spent on waiting"
    );
    assert!(state.try_wait().expect("looked at").is_none());
    limit("1024:");
    assert!(state.wait().expect("ends").success());
    host.ok(&["delete", "--force", "web"]);
    host.assert_nothing_is_left();
}

#[test]
fn a_list_tells_of_all_but_the_one_that_cannot_be_asked() {
    let host = Host::new();
    host.create("bundle", "web");
    let broken = host.path("state/default/broken");
    fs::create_dir(&broken).expect("made");
    let listener = UnixListener::bind(broken.join("control.sock")).expect("bound");
    let babbler = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accepted");
        std::io::Write::write_all(&mut stream, &[0xff; 64]).expect("written");
        // It is read, or its end is a reset.
        let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
    });
    let output = host.run(&["list", "-q"]);
    assert_eq!(said(&output), "web\n");
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.starts_with("bulkhead: broken: "), "{words}");
    babbler.join().expect("over");
    fs::remove_dir_all(broken).expect("removed");
    host.ok(&["delete", "--force", "web"]);
    host.assert_nothing_is_left();
}

#[test]
fn the_console_socket_gets_the_terminal() {
    let host = Host::new();
    host.bundle("terminal", &["cat"], |config| {
        config["process"]["terminal"] = json!(true)
    });
    let socket = host.text("console.sock");
    let listener = UnixListener::bind(&socket).expect("bound");
    let bundle = host.text("terminal");
    let verb = ["create", "--bundle", &bundle, "--console-socket", &socket];
    host.made(host.making(&verb, "web"));
    let (stream, _) = listener.accept().expect("accepted");
    let mut master = fs::File::from(sys::received(&stream));
    host.ok(&["start", "web"]);
    std::io::Write::write_all(&mut master, b"hello\n").expect("written");
    let mut echo = [0; 6];
    std::io::Read::read_exact(&mut master, &mut echo).expect("read");
    assert_eq!(&echo, b"hello\n");
    let bare = host
        .making(&["create", "--bundle", &bundle], "other")
        .output();
    let bare = String::from_utf8_lossy(&bare.expect("starts").stderr).into_owned();
    assert!(bare.contains("without setting console socket"), "{bare}");
    host.ok(&["delete", "-f", "web"]);
    host.assert_nothing_is_left();
}

#[test]
fn hooks_of_the_host_run_in_their_turn_with_the_state() {
    let host = Host::new();
    let log = host.text("hooks");
    let hook = |name: &str| {
        let script = format!("echo {name} >> {log}; cat >> {log}; echo >> {log}");
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}])
    };
    host.bundle("hooked", &["wait"], |config| {
        config["hooks"] = json!({
            "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
            "poststart": hook("poststart"), "poststop": hook("poststop")
        });
    });
    let pid = host.create("hooked", "web");
    host.ok(&["start", "web"]);
    host.ok(&["delete", "--force", "web"]);
    let text = fs::read_to_string(&log).expect("written");
    let lines: Vec<&str> = text.lines().collect();
    let names: Vec<&str> = lines.iter().step_by(2).copied().collect();
    assert_eq!(
        names,
        ["prestart", "createRuntime", "poststart", "poststop"]
    );
    let told: Value = serde_json::from_str(lines[1]).expect("json");
    assert_eq!(told["status"], "creating");
    assert_eq!(told["pid"], pid.as_raw());
    assert_eq!(told["id"], "web");
    host.assert_nothing_is_left();

    host.bundle("hooked", &["wait"], |config| {
        config["hooks"] = json!({"prestart": [{"path": "/bin/false"}]});
    });
    let bundle = host.text("hooked");
    let output = host
        .making(&["create", "--bundle", &bundle], "web")
        .output();
    let words = String::from_utf8_lossy(&output.expect("starts").stderr).into_owned();
    assert!(words.contains("error running prestart hook #0"), "{words}");
    host.assert_nothing_is_left();
}

#[test]
fn a_member_joins_the_pod_of_its_sandbox_and_both_live_and_end_apart() {
    let host = Host::new();
    let sandbox = host.create("bundle", "infra");
    host.ok(&["start", "infra"]);
    let joins = |config: &mut Value| {
        config["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": "infra"
        });
        config["linux"]["namespaces"] = json!([
            {"type": "network", "path": format!("/proc/{sandbox}/ns/net")},
            {"type": "ipc", "path": format!("/proc/{sandbox}/ns/ipc")},
            {"type": "uts", "path": format!("/proc/{sandbox}/ns/uts")},
            {"type": "mount"}, {"type": "pid"}
        ]);
    };
    host.bundle("member", &["wait"], joins);
    let member = host.create("member", "app");
    host.ok(&["start", "app"]);
    let namespace = |pid: Pid| fs::read_link(format!("/proc/{pid}/ns/net")).expect("there");
    assert_eq!(namespace(sandbox), namespace(member));
    assert_eq!(host.ok(&["list", "-q"]), "app\ninfra\n");
    let owner = host.owner("infra");
    assert_eq!(owner, host.owner("app"), "one process for the pod");

    // One that may use more than the machine of the pod has is refused, and nothing is left of it.
    host.bundle("large", &["wait"], |config| {
        joins(config);
        config["linux"]["resources"] = json!({"memory": {"limit": 300 << 20}});
    });
    let large = host
        .making(&["create", "--bundle", &host.text("large")], "large")
        .output();
    let large = String::from_utf8_lossy(&large.expect("starts").stderr).into_owned();
    assert!(
        large.contains("linux.resources.memory.limit in config.json is 300 MiB"),
        "{large}"
    );
    assert_eq!(host.ok(&["list", "-q"]), "app\ninfra\n");

    host.ok(&["kill", "infra", "9"]);
    assert_eq!(ended(sandbox), 137);
    assert_eq!(host.status("app"), "running");
    host.ok(&["delete", "infra"]);
    host.ok(&["delete", "--force", "app"]);
    assert_eq!(ended(member), 137);
    host.assert_nothing_is_left();

    let bundle = host.text("member");
    fs::write(
        host.path("member/config.json"),
        fs::read_to_string(host.path("member/config.json"))
            .expect("read")
            .replace(&format!("/proc/{sandbox}/"), "/proc/self/"),
    )
    .expect("written");
    let alone = host
        .making(&["create", "--bundle", &bundle], "app")
        .output();
    let alone = String::from_utf8_lossy(&alone.expect("starts").stderr).into_owned();
    assert!(
        alone.contains("the sandbox infra of the container does not run"),
        "{alone}"
    );
    host.assert_nothing_is_left();
}

#[test]
fn whichever_process_is_killed_the_others_tell_and_nothing_is_left() {
    let host = Host::new();
    // The VMM: the pod's process lives on and knows.
    let pid = host.create("bundle", "web");
    host.ok(&["start", "web"]);
    let children = format!("/proc/{0}/task", host.owner("web"));
    let vmms = fs::read_dir(children)
        .expect("tasks")
        .flatten()
        .filter_map(|task| {
            let text = fs::read_to_string(task.path().join("children")).ok()?;
            text.split_whitespace().next()?.parse().ok()
        });
    vmms.for_each(|vmm| end(Pid::from_raw(vmm)));
    assert_eq!(ended(pid), 137);
    host.await_status("web", "stopped");
    host.ok(&["delete", "web"]);
    host.assert_nothing_is_left();

    // The relay: what it stood for is killed.
    let pid = host.create("bundle", "web");
    host.ok(&["start", "web"]);
    end(pid);
    host.await_status("web", "stopped");
    host.ok(&["delete", "web"]);
    host.assert_nothing_is_left();

    // The pod's process: everything dies, and the records tell of it.
    let pid = host.create("bundle", "web");
    host.ok(&["start", "web"]);
    end(host.owner("web"));
    assert_eq!(ended(pid), 137);
    host.await_status("web", "stopped");
    assert_eq!(host.state("web")["pid"], 0);
    assert!(
        host.refused(&["start", "web"])
            .contains("container not running")
    );
    host.ok(&["delete", "web"]);
    host.assert_nothing_is_left();

    // And without a name: by the collection, and by the next container of that name.
    host.create("bundle", "web");
    end(host.owner("web"));
    eventually("an abandoned pod", || host.ok(&["gc"]) == "web\n");
    host.assert_nothing_is_left();
    host.create("bundle", "web");
    end(host.owner("web"));
    host.await_status("web", "stopped");
    host.create("bundle", "web");
    host.ok(&["delete", "--force", "web"]);
    host.assert_nothing_is_left();
}

/// Kills the command, or the pod's process that it has made, after ever longer times.
fn killed_at_each_point(host: &Host, which: impl Fn(&Host, Pid) -> Option<Pid>) {
    let mut at = Duration::ZERO;
    let begin = Instant::now();
    host.create("bundle", "web");
    host.ok(&["delete", "--force", "web"]);
    let step = begin.elapsed() / 2 / rounds(12) as u32;
    for _ in 0..rounds(12) {
        let bundle = host.text("bundle");
        let mut command = host.making(&["create", "--bundle", &bundle], "web");
        // A group of its own, as engines start it.
        command
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn().expect("starts");
        std::thread::sleep(at);
        if let Some(pid) = which(host, Pid::from_raw(child.id() as i32)) {
            end(pid);
        }
        let _ = child.wait();
        host.ok(&["delete", "--force", "web"]);
        host.assert_nothing_is_left();
        at += step;
    }
}

#[test]
fn a_create_that_is_killed_at_any_point_leaves_nothing() {
    let host = Host::new();
    killed_at_each_point(&host, |_, command| Some(command));
}

#[test]
fn a_pod_that_is_killed_at_any_point_of_its_start_leaves_nothing() {
    let host = Host::new();
    killed_at_each_point(&host, |host, _| {
        let journal = fs::read_to_string(host.path("state/default/web/journal")).ok()?;
        let first: Value = serde_json::from_str(journal.lines().next()?).ok()?;
        Some(Pid::from_raw(first["owner"].as_i64()? as i32))
    });
}

#[test]
fn many_cycles_and_many_at_once_leave_nothing() {
    let host = Host::new();
    for _ in 0..rounds(10) {
        host.create("bundle", "web");
        host.ok(&["start", "web"]);
        host.ok(&["delete", "--force", "web"]);
        reap();
    }
    host.assert_nothing_is_left();

    let names: Vec<String> = (0..8).map(|number| format!("web-{number}")).collect();
    std::thread::scope(|scope| {
        for name in &names {
            let host = &host;
            scope.spawn(move || {
                let bundle = host.text("bundle");
                host.made(host.making(&["create", "--bundle", &bundle], name));
                host.ok(&["start", name]);
                // Twice at once is as good as once.
                std::thread::scope(|both| {
                    for _ in 0..2 {
                        both.spawn(|| host.ok(&["delete", "--force", name]));
                    }
                });
            });
        }
    });
    host.assert_nothing_is_left();
}

/// What the compiler cannot check.
#[expect(unsafe_code, reason = "descriptors come as numbers")]
mod sys {
    use std::{
        io::IoSliceMut,
        os::{
            fd::{AsRawFd, FromRawFd, OwnedFd},
            unix::net::UnixStream,
        },
    };

    use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

    /// The descriptor that comes with a message.
    pub(super) fn received(stream: &UnixStream) -> OwnedFd {
        let mut bytes = [0; 64];
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let mut space = nix::cmsg_space!([i32; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags);
        let message = message.expect("received");
        let mut controls = message.cmsgs().expect("whole");
        match controls.next() {
            // SAFETY: the kernel has just made the descriptor for this process.
            Some(ControlMessageOwned::ScmRights(fds)) => unsafe { OwnedFd::from_raw_fd(fds[0]) },
            other => panic!("{other:?}"),
        }
    }
}
