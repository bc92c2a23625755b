//! `vmm::launch` from outside: the test starts itself as the jailed program,
//! which tells what it finds there.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::Path,
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use vmm::{
    config::{DeviceConfig, Resource, VmConfig},
    descriptors::{self, Descriptors},
    launch::{Launch, Process},
};

const TESTS: &[(&str, fn())] = &[
    (
        "the_child_is_alone_in_its_namespaces",
        the_child_is_alone_in_its_namespaces,
    ),
    (
        "the_child_has_what_was_passed_and_nothing_else",
        the_child_has_what_was_passed,
    ),
    (
        "the_exit_code_reaches_the_launcher",
        the_exit_code_reaches_the_launcher,
    ),
    ("a_killed_child_is_reaped", a_killed_child_is_reaped),
    ("a_dropped_process_is_gone", a_dropped_process_is_gone),
    (
        "the_child_outlives_the_thread_that_started_it",
        the_child_outlives_the_thread,
    ),
    (
        "the_child_dies_with_its_launcher",
        the_child_dies_with_its_launcher,
    ),
    (
        "without_shared_files_its_user_is_nobody_elses",
        its_user_is_nobody_elses,
    ),
    (
        "with_shared_files_it_knows_every_owner",
        with_shared_files_it_knows_every_owner,
    ),
    (
        "a_program_that_is_none_is_an_error",
        a_program_that_is_none_is_an_error,
    ),
    (
        "a_launcher_without_privileges_can_launch_but_not_share",
        a_launcher_without_privileges_can_launch,
    ),
    (
        "what_the_jailed_program_opens_is_not_for_taking",
        what_the_jailed_program_opens_is_not_for_taking,
    ),
    (
        "what_cannot_be_opened_is_an_error",
        what_cannot_be_opened_is_an_error,
    ),
    (
        "many_threads_can_launch_at_once",
        many_threads_can_launch_at_once,
    ),
    ("stderr_goes_where_it_is_sent", stderr_goes_where_it_is_sent),
];

/// Directories can only be shared, and ids of others only be given, by root.
const NEED_ROOT: &[&str] = &[
    "without_shared_files_its_user_is_nobody_elses",
    "with_shared_files_it_knows_every_owner",
    "a_launcher_without_privileges_can_launch_but_not_share",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("--config-fd") => jailed(&arguments[2]),
        Some("launch-and-die") => launch_and_die(),
        Some("launch-unprivileged") => launch_unprivileged(),
        // What `cargo test` passes to all test programs.
        Some("--list") => ExitCode::SUCCESS,
        filter => run_tests(filter.filter(|text| !text.starts_with('-')).unwrap_or("")),
    }
}

fn run_tests(filter: &str) -> ExitCode {
    let root = nix::unistd::geteuid().is_root();
    for (name, test) in TESTS.iter().filter(|(name, _)| name.contains(filter)) {
        if !root && NEED_ROOT.contains(name) {
            println!("test {name} ... not run, it needs root");
            continue;
        }
        test();
        println!("test {name} ... ok");
    }
    ExitCode::SUCCESS
}

/// The jailed program: does what the command line of its configuration says.
fn jailed(config_fd: &str) -> ExitCode {
    let config = descriptors::read_config(config_fd.parse().unwrap()).unwrap();
    let mut output = config
        .serial
        .map(|serial| File::from(Descriptors::default().take("serial", &serial).unwrap()));
    let mut say = |text: String| output.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    match config.boot.cmdline.as_str() {
        "namespaces" => {
            for kind in ["user", "mnt", "pid", "ipc", "net", "uts", "cgroup"] {
                say(format!(
                    "{:?}\n",
                    fs::read_link(format!("/proc/self/ns/{kind}")).unwrap()
                ));
            }
            say(format!("pid {}\n", std::process::id()));
        }
        "descriptors" => {
            let mut open: Vec<u32> = fs::read_dir("/proc/self/fd")
                .unwrap()
                .map(|entry| {
                    entry
                        .unwrap()
                        .file_name()
                        .to_str()
                        .unwrap()
                        .parse()
                        .unwrap()
                })
                .collect();
            open.sort_unstable();
            say(format!("{open:?}"));
        }
        "owner" => {
            use std::os::unix::fs::MetadataExt;
            let etc = fs::metadata("/etc").unwrap();
            say(format!(
                "{} {}",
                fs::read_to_string("/proc/self/status").unwrap(),
                etc.uid()
            ));
        }
        "sleep" => {
            say("ready".to_owned());
            thread::sleep(Duration::from_secs(60));
        }
        "take-own" => {
            // As a careless library opens things: without close-on-exec.
            let (own, _other) = nix::unistd::pipe().unwrap();
            let resource = Resource::Fd(own.as_raw_fd());
            say(Descriptors::default()
                .take("it", &resource)
                .unwrap_err()
                .to_string());
        }
        "complain" => eprintln!("something is wrong"),
        code => return ExitCode::from(code.parse::<u8>().unwrap()),
    }
    ExitCode::SUCCESS
}

fn program() -> OwnedFd {
    open_program(Path::new("/proc/self/exe"))
}

fn open_program(path: &Path) -> OwnedFd {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .unwrap()
        .into()
}

/// A VM whose resources are anything that opens; `what` is for the jailed program.
fn config(what: &str) -> VmConfig {
    let anything = Resource::Path("/dev/null".into());
    serde_json::from_value(serde_json::json!({
        "boot": {"kernel": anything, "cmdline": what},
        "memory_mib": 64,
        "kvm": anything,
    }))
    .unwrap()
}

fn fs_device() -> DeviceConfig {
    DeviceConfig::Fs {
        tag: "shared".to_owned(),
        directory: Resource::Path("/tmp".into()),
        read_only: false,
    }
}

/// Starts the program with a pipe for its output.
fn start(mut config: VmConfig) -> (Process, File) {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let mut launch = Launch::new(program());
    config.serial = Some(launch.pass(writer));
    (launch.spawn(&config).unwrap(), reader.into())
}

/// Lets the program run to its end and returns what it said.
fn run(config: VmConfig) -> String {
    let (mut process, mut output) = start(config);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert!(process.wait().unwrap().success());
    text
}

fn await_ready(output: &mut File) {
    let mut ready = [0; 5];
    output.read_exact(&mut ready).unwrap();
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn the_child_is_alone_in_its_namespaces() {
    let text = run(config("namespaces"));
    for (kind, theirs) in ["user", "mnt", "pid", "ipc", "net", "uts", "cgroup"]
        .into_iter()
        .zip(text.lines())
    {
        let ours = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert!(theirs.contains(kind), "{theirs}");
        assert_ne!(format!("{ours:?}"), theirs);
    }
    assert!(text.ends_with("pid 1\n"), "{text}");
}

fn the_child_has_what_was_passed() {
    // Something that must not leak.
    let inheritable = nix::unistd::dup(File::open("/dev/null").unwrap()).unwrap();
    // 3 lists the directory: it was the configuration, which is read and closed. 4 is the output,
    // 5 the kernel and 6 KVM.
    assert_eq!(run(config("descriptors")), "[0, 1, 2, 3, 4, 5, 6]");
    drop(inheritable);
}

fn the_exit_code_reaches_the_launcher() {
    let mut process = Launch::new(program()).spawn(&config("42")).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(42));
    assert_eq!(process.try_wait().unwrap().unwrap().code(), Some(42));
}

fn a_killed_child_is_reaped() {
    use std::os::unix::process::ExitStatusExt;
    let (mut process, mut output) = start(config("sleep"));
    await_ready(&mut output);
    assert!(process.try_wait().unwrap().is_none());

    process.kill().unwrap();

    assert_eq!(process.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert!(!exists(process.pid()));
    process.kill().unwrap();
}

fn a_dropped_process_is_gone() {
    let (process, mut output) = start(config("sleep"));
    await_ready(&mut output);
    let pid = process.pid();
    assert!(exists(pid));
    drop(process);
    assert!(!exists(pid));
}

fn the_child_outlives_the_thread() {
    let (mut process, mut output) = thread::spawn(|| start(config("sleep"))).join().unwrap();
    await_ready(&mut output);
    thread::sleep(Duration::from_millis(50));
    assert!(process.try_wait().unwrap().is_none());
}

fn the_child_dies_with_its_launcher() {
    // A launcher that is killed, so that it can do nothing about it.
    let mut launcher = Command::new("/proc/self/exe")
        .arg("launch-and-die")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut pid = String::new();
    launcher
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut pid)
        .unwrap();
    launcher.wait().unwrap();
    let pid: u32 = pid.trim().parse().unwrap();

    // One that has ended is there until whoever it was left to has waited for it.
    let lives = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while lives() {
        assert!(
            Instant::now() < deadline,
            "process {pid} outlived its launcher"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

fn launch_and_die() -> ExitCode {
    let (process, mut output) = start(config("sleep"));
    await_ready(&mut output);
    println!("{}", process.pid());
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
    unreachable!("killed");
}

fn its_user_is_nobody_elses() {
    let (process, mut output) = start(config("sleep"));
    await_ready(&mut output);
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let own = 0x7800_0000 + process.pid();
    assert!(
        status.contains(&format!("Uid:\t{own}\t{own}\t{own}\t{own}\n")),
        "{status}"
    );
    assert!(
        status.contains(&format!("Gid:\t{own}\t{own}\t{own}\t{own}\n")),
        "{status}"
    );
    assert!(status.contains("Groups:\t \n"), "{status}");

    let text = run(config("owner"));
    assert!(text.contains("Uid:\t0\t"), "{text}");
    assert!(text.contains("SigBlk:\t0000000000000000\n"), "{text}");
    // Root of the host is nobody here.
    assert!(text.ends_with(" 65534"), "{text}");
}

fn with_shared_files_it_knows_every_owner() {
    let mut config = config("owner");
    config.devices.push(fs_device());
    let text = run(config);
    assert!(text.ends_with(" 0"), "{text}");
}

fn a_program_that_is_none_is_an_error() {
    let program = open_program(Path::new("/etc/passwd"));
    let error = Launch::new(program).spawn(&config("0")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the VMM's process could not execute the program"
    );
}

fn many_threads_can_launch_at_once() {
    let threads: Vec<_> = (0..8)
        .map(|_| {
            thread::spawn(|| {
                for _ in 0..4 {
                    assert_eq!(run(config("descriptors")), "[0, 1, 2, 3, 4, 5, 6]");
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn stderr_goes_where_it_is_sent() {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let mut launch = Launch::new(program());
    launch.stderr(writer);
    let mut process = launch.spawn(&config("complain")).unwrap();
    process.wait().unwrap();
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).unwrap();
    assert_eq!(text, "something is wrong\n");
}

fn what_the_jailed_program_opens_is_not_for_taking() {
    let said = run(config("take-own"));
    assert!(said.contains("was not started with it"), "{said}");
}

fn what_cannot_be_opened_is_an_error() {
    let mut config = config("0");
    config.boot.kernel = Resource::Path("/nonexistent".into());
    let error = Launch::new(program()).spawn(&config).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot open boot.kernel /nonexistent: check that it exists"
    );
    let mut config = self::config("0");
    config.devices.push(DeviceConfig::Fs {
        tag: "shared".to_owned(),
        directory: Resource::Path("/etc/passwd".into()),
        read_only: true,
    });
    let error = Launch::new(program()).spawn(&config).unwrap_err();
    assert!(
        error.to_string().ends_with("share a directory, not a file"),
        "{error}"
    );
}

fn a_launcher_without_privileges_can_launch() {
    let output = Command::new("/proc/self/exe")
        .arg("launch-unprivileged")
        .uid(12345)
        .gid(12345)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    // Where the host forbids it, it must say what to do.
    assert!(
        said == "launched\nnot shared\n" || said.starts_with("run as root"),
        "{said} {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn launch_unprivileged() -> ExitCode {
    match Launch::new(program()).spawn(&config("7")) {
        Ok(mut process) => assert_eq!(process.wait().unwrap().code(), Some(7)),
        Err(vmm::launch::Error::Namespaces { advice, .. }) => {
            println!("{advice}");
            return ExitCode::SUCCESS;
        }
        Err(error) => panic!("{error}: {error:?}"),
    }
    println!("launched");
    let mut config = config("7");
    config.devices.push(fs_device());
    let error = Launch::new(program()).spawn(&config).unwrap_err();
    assert!(error.to_string().contains("root must share it"), "{error}");
    println!("not shared");
    ExitCode::SUCCESS
}
