//! `vmm::jail` from outside: the test starts itself as the jailed program,
//! which tries what must be impossible.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::{OpenOptionsExt, PermissionsExt},
            net::UnixListener,
            process::ExitStatusExt,
        },
    },
    path::Path,
    process::{ExitCode, ExitStatus},
    thread,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use vmm::{
    config::{DeviceConfig, Resource, VmConfig},
    control::{
        self, Commands,
        message::{Reply, Request},
    },
    descriptors::{self, Descriptors},
    jail::{self, ThreadKind},
    launch::Launch,
    virtio::Kind,
};
use vmm_sys_util::eventfd::EventFd;

#[path = "jail/sys.rs"]
mod sys;

const TESTS: &[(&str, fn())] = &[
    (
        "the_root_is_empty_and_read_only",
        the_root_is_empty_and_read_only,
    ),
    (
        "of_its_process_only_descriptors_and_mounts_are_there",
        of_its_process_only_descriptors_and_mounts_are_there,
    ),
    ("no_capability_is_left", no_capability_is_left),
    (
        "limits_and_attributes_are_set",
        limits_and_attributes_are_set,
    ),
    (
        "a_shared_directory_has_no_way_up",
        a_shared_directory_has_no_way_up,
    ),
    (
        "a_read_only_share_is_so_in_the_kernel",
        a_read_only_share_is_so_in_the_kernel,
    ),
    (
        "a_disk_that_is_only_read_cannot_be_opened_for_writing",
        a_disk_that_is_only_read_cannot_be_opened_for_writing,
    ),
    (
        "a_disk_that_is_added_to_be_read_cannot_be_opened_for_writing",
        a_disk_that_is_added_to_be_read_cannot_be_opened_for_writing,
    ),
    (
        "what_is_mounted_below_a_share_later_is_seen",
        what_is_mounted_later_is_seen,
    ),
    (
        "only_the_thread_of_a_share_may_act_on_files",
        only_the_thread_of_a_share_may_act_on_files,
    ),
    (
        "forbidden_calls_end_the_process",
        forbidden_calls_end_the_process,
    ),
    ("allowed_calls_pass", allowed_calls_pass),
    (
        "calls_of_one_kind_end_the_others",
        calls_of_one_kind_end_the_others,
    ),
    (
        "the_confined_main_thread_starts_confined_threads",
        main_starts_confined_threads,
    ),
    ("a_panic_is_told_and_ends_the_process", a_panic_is_told),
    (
        "without_namespaces_the_jail_is_not_shut",
        without_namespaces_the_jail_is_not_shut,
    ),
];

const KINDS: &[(&str, ThreadKind)] = &[
    ("main", ThreadKind::Main),
    ("vcpu", ThreadKind::Vcpu),
    ("blk", ThreadKind::Device(Kind::Blk)),
    ("vsock", ThreadKind::Device(Kind::Vsock)),
    ("balloon", ThreadKind::Device(Kind::Balloon)),
    ("rng", ThreadKind::Device(Kind::Rng)),
    ("console", ThreadKind::Device(Kind::Console)),
    ("pmem", ThreadKind::Device(Kind::Pmem)),
    ("net", ThreadKind::Device(Kind::Net)),
    ("fs", ThreadKind::Device(Kind::Fs)),
];

/// Directories can only be shared, and ids of others only be given, by root.
const NEED_ROOT: &[&str] = &[
    "the_root_is_empty_and_read_only",
    "of_its_process_only_descriptors_and_mounts_are_there",
    "no_capability_is_left",
    "limits_and_attributes_are_set",
    "a_shared_directory_has_no_way_up",
    "a_read_only_share_is_so_in_the_kernel",
    "a_disk_that_is_only_read_cannot_be_opened_for_writing",
    "a_disk_that_is_added_to_be_read_cannot_be_opened_for_writing",
    "what_is_mounted_below_a_share_later_is_seen",
    "only_the_thread_of_a_share_may_act_on_files",
    "without_namespaces_the_jail_is_not_shut",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("--config-fd") => jailed(&arguments[2]),
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

/// The jailed program: shuts the jail and does what its command line says.
fn jailed(config_fd: &str) -> ExitCode {
    let config = descriptors::read_config(config_fd.parse().unwrap()).unwrap();
    let mut descriptors = Descriptors::default();
    let mut take =
        |resource: Option<&Resource>| resource.map(|r| descriptors.take("it", r).unwrap());
    let mut output = take(config.serial.as_ref()).map(File::from);
    let mut input = take(config.boot.initrd.as_ref()).map(File::from);
    let shared = config.devices.iter().find_map(|device| match device {
        DeviceConfig::Fs { directory, .. } => Some(directory),
        _ => None,
    });
    let mut say = |text: String| output.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    jail::enter(&config).unwrap();
    let shared = take(shared);
    let share = || shared.as_ref().unwrap();

    let words: Vec<&str> = config.boot.cmdline.split(' ').collect();
    match words[..] {
        ["root"] => {
            say(format!("{:?}\n", names("/")));
            say(format!("{:?}\n", File::create("/new").unwrap_err().kind()));
            say(format!(
                "{:?}\n",
                fs::read("/etc/passwd").unwrap_err().kind()
            ));
        }
        ["wait"] => {
            say("ready".to_owned());
            input.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        }
        ["itself"] => {
            // Not all of /proc, and no way from the part that is there to the rest.
            for path in [
                "/proc",
                "/fd/../mem",
                "/fd/../../self/mem",
                "/fd/../self/exe",
            ] {
                say(format!("{:?}\n", fs::metadata(path).unwrap_err().kind()));
            }
            say(format!("{:?}\n", names("/fd/..")));
            say(format!("{:?}\n", fs::write("/mountinfo", "").is_err()));
            let text = fs::read_to_string("/mountinfo").unwrap();
            let of = |line: &str| line.split(' ').nth(4).map(str::to_owned);
            let mut mounts: Vec<String> = text.lines().filter_map(of).collect();
            mounts.sort();
            say(format!("{mounts:?}\n"));
        }
        ["again"] => {
            let disk = config.devices.iter().find_map(|device| match device {
                DeviceConfig::Blk { disk, .. } => Some(disk),
                _ => None,
            });
            let disk = File::from(descriptors.take("disk", disk.unwrap()).unwrap());
            jail::confine(ThreadKind::Device(Kind::Fs)).unwrap();
            let path = format!("/fd/{}", disk.as_raw_fd());
            let again = File::options().write(true).open(path).map(drop);
            say(format!("{:?}\n", again.map_err(|error| error.kind())));
            let open = fs::Permissions::from_mode(0o666);
            let open = disk.set_permissions(open);
            say(format!("{:?}\n", open.map_err(|error| error.kind())));
            let mut contents = String::new();
            (&disk).read_to_string(&mut contents).unwrap();
            say(contents);
        }
        ["up"] => {
            // As a taken over thread would try.
            let up = |way: &str| {
                let found = open_below(share(), way)
                    .map(|found| names(&format!("/fd/{}", found.as_raw_fd())));
                format!("{way} {found:?}\n")
            };
            for way in [".", "..", "../..", "../../..", "../../fd/..", "../../proc"] {
                say(up(way));
            }
        }
        ["write"] => {
            let path = format!("/fd/{}/new", share().as_raw_fd());
            jail::confine(ThreadKind::Device(Kind::Fs)).unwrap();
            say(format!(
                "{:?}",
                File::create(path).map(drop).map_err(|error| error.kind())
            ));
        }
        ["mounted"] => {
            say("ready".to_owned());
            input.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            say(format!(
                "{:?}",
                names(&format!("/fd/{}/volume", share().as_raw_fd()))
            ));
        }
        ["owner", kind] => {
            let path = format!("/fd/{}/secret", share().as_raw_fd());
            // Other threads cannot open anything once confined; without a filter they lack the
            // privilege, too.
            if kind == "fs" {
                jail::confine(ThreadKind::Device(Kind::Fs)).unwrap();
            }
            say(format!(
                "{:?}",
                fs::read_to_string(path).map_err(|error| error.kind())
            ));
        }
        ["call", kind, index] => {
            jail::confine(kind_named(kind)).unwrap();
            sys::make(&sys::FORBIDDEN[index.parse::<usize>().unwrap()]);
        }
        ["allowed", kind] => {
            jail::confine(kind_named(kind)).unwrap();
            sys::ALLOWED.iter().for_each(sys::make);
        }
        ["of-kind", kind, index] => {
            jail::confine(kind_named(kind)).unwrap();
            sys::make(&sys::OF_KIND[index.parse::<usize>().unwrap()].1);
        }
        ["threads"] => {
            jail::confine(ThreadKind::Main).unwrap();
            for kind in [Kind::Blk, Kind::Vsock, Kind::Rng, Kind::Balloon] {
                thread::Builder::new()
                    .name(format!("virtio-{}", kind.name()))
                    .spawn(move || {
                        jail::confine(ThreadKind::Device(kind)).unwrap();
                        drop(vec![1u8; 1 << 22]);
                    })
                    .unwrap()
                    .join()
                    .unwrap();
            }
            say("all".to_owned());
        }
        ["panic"] => {
            jail::confine(ThreadKind::Device(Kind::Rng)).unwrap();
            panic!("for the test");
        }
        _ => unreachable!("{words:?}"),
    }
    ExitCode::SUCCESS
}

fn kind_named(name: &str) -> ThreadKind {
    KINDS.iter().find(|(known, _)| *known == name).unwrap().1
}

fn names(path: &str) -> Result<Vec<String>, std::io::ErrorKind> {
    let mut names: Vec<String> = fs::read_dir(path)
        .map_err(|error| error.kind())?
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    Ok(names)
}

fn open_below(directory: &OwnedFd, way: &str) -> Result<OwnedFd, nix::errno::Errno> {
    use nix::fcntl::{OFlag, openat};
    openat(
        directory,
        way,
        OFlag::O_PATH | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
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

fn sharing(what: &str, directory: &Path, read_only: bool) -> VmConfig {
    let mut config = config(what);
    config.devices.push(DeviceConfig::Fs {
        tag: "shared".to_owned(),
        directory: Resource::Path(directory.into()),
        read_only,
    });
    config
}

struct Ran {
    said: String,
    complained: String,
    status: ExitStatus,
}

fn launch(mut config: VmConfig) -> (vmm::launch::Process, File, File) {
    let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let program = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open("/proc/self/exe")
        .unwrap();
    let (reader, writer) = pipe();
    let (complaints, stderr) = pipe();
    let mut launch = Launch::new(program.into());
    launch.stderr(stderr);
    config.serial = Some(launch.pass(writer));
    (
        launch.spawn(&config).unwrap(),
        reader.into(),
        complaints.into(),
    )
}

fn run(config: VmConfig) -> Ran {
    let (mut process, mut output, mut complaints) = launch(config);
    let mut ran = Ran {
        said: String::new(),
        complained: String::new(),
        status: ExitStatus::default(),
    };
    output.read_to_string(&mut ran.said).unwrap();
    complaints.read_to_string(&mut ran.complained).unwrap();
    ran.status = process.wait().unwrap();
    ran
}

fn run_well(config: VmConfig) -> String {
    let ran = run(config);
    assert!(ran.status.success(), "{:?}: {}", ran.status, ran.complained);
    ran.said
}

fn the_root_is_empty_and_read_only() {
    assert_eq!(
        run_well(config("root")),
        "Ok([])\nReadOnlyFilesystem\nNotFound\n"
    );
    let shared = tempfile::tempdir().unwrap();
    let said = run_well(sharing("root", shared.path(), false));
    assert_eq!(
        said,
        "Ok([\"fd\", \"mountinfo\", \"shared\"])\nReadOnlyFilesystem\nNotFound\n"
    );
}

fn of_its_process_only_descriptors_and_mounts_are_there() {
    let shared = tempfile::tempdir().unwrap();
    let said = run_well(sharing("itself", shared.path(), false));
    assert_eq!(
        said.lines().collect::<Vec<_>>(),
        [
            "NotFound",
            "NotFound",
            "NotFound",
            "NotFound",
            "Ok([\"fd\", \"mountinfo\", \"shared\"])",
            "true",
            "[\"/\", \"/fd\", \"/mountinfo\", \"/shared/0\"]",
        ]
    );
}

/// What the host says of a jailed process with a shared directory.
fn seen_from_outside(files: &[&str]) -> String {
    let shared = tempfile::tempdir().unwrap();
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let mut config = sharing("wait", shared.path(), false);
    config.boot.initrd = Some(passed(&reader));
    let (mut process, mut output, _complaints) = launch(config);
    output.read_exact(&mut [0; 5]).unwrap();
    let read = |file: &&str| fs::read_to_string(format!("/proc/{}/{file}", process.pid()));
    let said = files.iter().map(|file| read(file).unwrap()).collect();
    File::from(writer).write_all(&[1]).unwrap();
    assert!(process.wait().unwrap().success());
    said
}

/// A descriptor that the jailed program gets. Any way to hand it over will do.
fn passed(descriptor: &OwnedFd) -> Resource {
    Resource::Path(format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into())
}

fn no_capability_is_left() {
    let status = seen_from_outside(&["status"]);
    // What the thread of the share may take up: chown, dac_override, fowner, fsetid, setgid,
    // setuid, mknod, setfcap.
    assert!(status.contains("CapPrm:\t00000000880000db\n"), "{status}");
    for set in ["CapEff", "CapInh", "CapBnd", "CapAmb"] {
        assert!(
            status.contains(&format!("{set}:\t0000000000000000\n")),
            "{status}"
        );
    }
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
}

fn limits_and_attributes_are_set() {
    let status = seen_from_outside(&["status", "limits"]);
    assert!(status.contains("Name:\tbulkhead-vmm\n"), "{status}");
    let inside = status.lines().find(|line| line.starts_with("NSpid:"));
    assert!(inside.unwrap().ends_with("\t1"), "{status}");
    let limit = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let mut words = line[name.len()..].split_whitespace();
        (
            words.next().unwrap().to_owned(),
            words.next().unwrap().to_owned(),
        )
    };
    assert_eq!(
        limit("Max core file size"),
        ("0".to_owned(), "0".to_owned())
    );
    assert_eq!(limit("Max processes").1, "256");
    assert_eq!(limit("Max msgqueue size").1, "0");
}

fn a_shared_directory_has_no_way_up() {
    const ROOT: &str = "Ok(Ok([\"fd\", \"mountinfo\", \"shared\"]))";
    let shared = tempfile::tempdir().unwrap();
    fs::write(shared.path().join("inside"), "").unwrap();
    let said = run_well(sharing("up", shared.path(), false));
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], ". Ok(Ok([\"inside\"]))");
    // The way up ends at the jail's own root.
    for line in &lines[1..4] {
        let (_, found) = line.split_once(' ').unwrap();
        assert!(["Ok(Ok([\"0\"]))", ROOT].contains(&found), "{said}");
    }
    assert_eq!(lines[4], format!("../../fd/.. {ROOT}"));
    assert_eq!(lines[5], "../../proc Err(ENOENT)");
}

fn a_read_only_share_is_so_in_the_kernel() {
    let shared = tempfile::tempdir().unwrap();
    assert_eq!(
        run_well(sharing("write", shared.path(), true)),
        "Err(ReadOnlyFilesystem)"
    );
    assert_eq!(run_well(sharing("write", shared.path(), false)), "Ok(())");
    assert!(shared.path().join("new").exists());
}

fn a_disk_that_is_only_read_cannot_be_opened_for_writing() {
    let shared = tempfile::tempdir().unwrap();
    let disk = tempfile::NamedTempFile::new().unwrap();
    fs::write(&disk, "contents").unwrap();
    let mut config = sharing("again", shared.path(), false);
    config.devices.push(DeviceConfig::Blk {
        disk: Resource::Path(disk.path().into()),
        read_only: true,
        serial: String::new(),
    });
    assert_eq!(
        run_well(config),
        "Err(ReadOnlyFilesystem)\nErr(ReadOnlyFilesystem)\ncontents"
    );
}

/// A VMM that tries to write to what it is given.
struct Writing;

impl Commands for Writing {
    fn carry_out(&mut self, _: Request, descriptors: Vec<OwnedFd>) -> Reply {
        let path = format!("/proc/self/fd/{}", descriptors[0].as_raw_fd());
        let again = File::options().write(true).open(path).map(drop);
        Reply::Failed {
            message: format!("{:?}", again.map_err(|error| error.kind())),
        }
    }
}

fn a_disk_that_is_added_to_be_read_cannot_be_opened_for_writing() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control");
    let listener = UnixListener::bind(&socket).unwrap();
    let ended = EventFd::new(0).unwrap();
    let end = ended.try_clone().unwrap();
    let server = thread::spawn(move || control::serve(listener.into(), &ended, &mut Writing));
    let disk = tempfile::NamedTempFile::new().unwrap();
    let mut client = control::Client::connect(&socket).unwrap();
    let mut add = |read_only| {
        let device = DeviceConfig::Blk {
            disk: Resource::Fd(0),
            read_only,
            serial: String::new(),
        };
        let error = client.add_device(device, &[disk.as_file().as_fd()]);
        error.unwrap_err().to_string()
    };
    assert_eq!(add(true), "the VMM refuses: \"Err(ReadOnlyFilesystem)\"");
    assert_eq!(add(false), "the VMM refuses: \"Ok(())\"");
    end.write(1).unwrap();
    server.join().unwrap().unwrap();
}

/// A mount, undone when dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn bind(from: &Path, to: &'a Path) -> Self {
        mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        Self(to)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

fn what_is_mounted_later_is_seen() {
    let shared = tempfile::tempdir().unwrap();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("data"), "").unwrap();
    let place = shared.path().join("volume");
    fs::create_dir(&place).unwrap();
    // What a launcher does who wants to mount there later.
    let _itself = Mounted::bind(shared.path(), shared.path());
    mount(
        None::<&str>,
        shared.path(),
        None::<&str>,
        MsFlags::MS_SHARED,
        None::<&str>,
    )
    .unwrap();

    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let mut config = sharing("mounted", shared.path(), false);
    config.boot.initrd = Some(passed(&reader));
    let (mut process, mut output, _complaints) = launch(config);
    output.read_exact(&mut [0; 5]).unwrap();
    let _later = Mounted::bind(volume.path(), &place);
    File::from(writer).write_all(&[1]).unwrap();

    let mut said = String::new();
    output.read_to_string(&mut said).unwrap();
    assert!(process.wait().unwrap().success());
    assert_eq!(said, "Ok([\"data\"])");
}

fn only_the_thread_of_a_share_may_act_on_files() {
    let shared = tempfile::tempdir().unwrap();
    let secret = shared.path().join("secret");
    fs::write(&secret, "of another user").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(&secret, Some(1234), Some(1234)).unwrap();

    let by_fs = run_well(sharing("owner fs", shared.path(), false));
    let by_other = run_well(sharing("owner main", shared.path(), false));

    assert_eq!(by_fs, "Ok(\"of another user\")");
    assert_eq!(by_other, "Err(PermissionDenied)");
}

fn forbidden_calls_end_the_process() {
    for (kind, _) in KINDS {
        for (index, call) in sys::FORBIDDEN.iter().enumerate() {
            let ran = run(config(&format!("call {kind} {index}")));
            assert_eq!(
                ran.status.signal(),
                Some(libc::SIGSYS),
                "{kind}: {}",
                call.name
            );
        }
    }
}

fn allowed_calls_pass() {
    for (kind, _) in KINDS {
        let ran = run(config(&format!("allowed {kind}")));
        assert!(
            ran.status.success(),
            "{kind}: {:?} {}",
            ran.status,
            ran.complained
        );
    }
}

fn calls_of_one_kind_end_the_others() {
    for (index, (owner, call)) in sys::OF_KIND.iter().enumerate() {
        for (kind, _) in KINDS {
            let ran = run(config(&format!("of-kind {kind} {index}")));
            // The main thread starts threads of most kinds and has their calls.
            if kind == owner || (*kind == "main" && *owner == "blk") {
                assert!(
                    ran.status.success(),
                    "{kind}: {} {:?}",
                    call.name,
                    ran.status
                );
            } else {
                assert_eq!(
                    ran.status.signal(),
                    Some(libc::SIGSYS),
                    "{kind}: {}",
                    call.name
                );
            }
        }
    }
}

fn main_starts_confined_threads() {
    assert_eq!(run_well(config("threads")), "all");
}

fn a_panic_is_told() {
    let ran = run(config("panic"));
    assert!(!ran.status.success());
    assert_ne!(
        ran.status.signal(),
        Some(libc::SIGSYS),
        "{}",
        ran.complained
    );
    assert!(
        ran.complained.contains("for the test"),
        "{}",
        ran.complained
    );
}

fn without_namespaces_the_jail_is_not_shut() {
    // In mounts of its own, so that a mistake would harm nobody.
    let error = thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        jail::enter(&config("root")).unwrap_err().to_string()
    });
    assert_eq!(
        error.join().unwrap(),
        "the jail is not shut: cannot find itself alone in its namespaces; start it with --config \
         or by vmm::launch"
    );
    assert!(Path::new("/proc/self").exists());
}
