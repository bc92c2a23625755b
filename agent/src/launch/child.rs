//! What a process does between clone3 and execve: the recipe, step by step.

use std::{
    convert::Infallible,
    ffi::CString,
    fs, io,
    io::Read as _,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns, unshare},
    sys::stat::{Mode, umask},
    unistd::{Uid, chdir, fchown, getcwd, sethostname, setsid},
};

use super::{
    FailureKind, Launch, Message, NewContainer, Place, Prepared, Running,
    capabilities::Capabilities, control::Report, hooks, namespaces::TIME, program, sysctl, user,
};
use crate::{
    causes,
    rootfs::{self, Rootfs},
    spec::Process,
    sys::{self, Forked},
};

/// Why the process cannot become what it should.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot {doing}")]
    Step {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot change to the working directory {cwd}")]
    WorkingDirectory {
        cwd: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error(transparent)]
    Launch(#[from] super::Error),
    #[error(transparent)]
    Program(#[from] program::Error),
    #[error("the agent gave the process up")]
    GivenUp,
}

/// Says what was being done when a call failed.
fn doing<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Step {
        doing,
        source: source.into(),
    }
}

/// The numbers of the descriptors that the child keeps besides 0, 1 and 2.
const CONTROL: i32 = 3;
const FIRST_PLACE: i32 = 4;

/// Becomes the process, or says over `control` why not.
pub(super) fn run(launch: &Launch<'_>, prepared: &Prepared, control: &OwnedFd) -> ! {
    let failure = match arrange(launch, control) {
        Ok(()) => {
            let report = Report(sys::arranged(CONTROL));
            match become_process(launch, prepared, report) {
                Ok(never) => match never {},
                Err(error) => (report, error),
            }
        }
        Err(error) => (Report(control.as_fd()), error),
    };
    let (report, error) = failure;
    let kind = match &error {
        Error::Program(program::Error::Refused { .. }) => FailureKind::ProgramRefused,
        Error::Program(_) => FailureKind::ProgramMissing,
        _ => FailureKind::Other,
    };
    let _ = report.send(&Message::Failed(kind, causes::line(&error)), None);
    sys::exit_now(1)
}

/// Enters the user namespace `users`, makes the process in it, and ends.
pub(super) fn step_between(
    launch: &Launch<'_>,
    prepared: &Prepared,
    users: BorrowedFd<'_>,
    control: &OwnedFd,
) -> ! {
    let make = || -> io::Result<Forked> {
        if let Place::New(new) = &launch.place
            && let Some(pids) = new.namespaces.joined_pids()
        {
            setns(pids, CloneFlags::CLONE_NEWPID)?;
        }
        setns(users, CloneFlags::CLONE_NEWUSER)?;
        sys::clone_sibling(&sys::CloneFlags {
            namespaces: super::fresh(launch),
            cgroup: None,
        })
    };
    let report = Report(control.as_fd());
    let sent = match make() {
        Ok(Forked::Child) => run(launch, prepared, control),
        Ok(Forked::Parent { pid, pidfd }) => {
            report.send(&Message::Born(pid.unsigned_abs()), Some(pidfd.as_fd()))
        }
        Err(error) => report.send(
            &Message::Failed(FailureKind::Other, error.to_string()),
            None,
        ),
    };
    sys::exit_now(sent.is_err().into())
}

/// Keeps of the agent's descriptors what this process needs, at fixed numbers.
fn arrange(launch: &Launch<'_>, control: &OwnedFd) -> Result<(), Error> {
    let [stdin, stdout, stderr] = launch.stdio;
    let mut kept = vec![stdin, stdout, stderr, control.as_fd()];
    match &launch.place {
        Place::New(new) => {
            kept.extend(new.namespaces.joined().map(|(_, fd)| fd.as_fd()));
            kept.extend(new.granted.descriptors());
        }
        Place::Inside(running) => kept.push(running.first),
    }
    sys::arrange(&kept).map_err(doing("arrange the descriptors"))
}

fn become_process(
    launch: &Launch<'_>,
    prepared: &Prepared,
    report: Report<'_>,
) -> Result<Infallible, Error> {
    let process = launch.process;
    sys::reset_signals().map_err(doing("reset the signals"))?;
    // Until execve this is a copy of the agent, which nobody in the container may look into.
    sys::forbid_inspection().map_err(doing("forbid inspection"))?;
    umask(Mode::empty());
    if let Some(cpus) = &prepared.affinity.initial {
        sys::set_affinity(cpus).map_err(doing("set process.execCPUAffinity.initial"))?;
    }
    let terminal = match &launch.place {
        Place::New(new) => enter_new(new, report)?,
        Place::Inside(running) => enter_existing(running, process)?,
    };
    setsid().map_err(doing("start a session"))?;
    if let Some(master) = &terminal {
        take_terminal(master.as_fd(), process)?;
    }
    for limit in &prepared.limits {
        limit.set().map_err(doing("set process.rlimits"))?;
    }
    prepared.schedule.apply()?;
    sys::join_new_keyring().map_err(doing("make a session keyring"))?;
    let entered = enter_directory(process);
    prepared
        .capabilities
        .bound()
        .map_err(doing("drop capabilities from the bounding set"))?;
    sys::keep_capabilities().map_err(doing("keep capabilities"))?;
    user::become_user(&process.user).map_err(doing("change to process.user"))?;
    // A directory that only its owner may enter is entered as the user.
    entered.or_else(|_| enter_directory(process))?;
    let environment = environment(process);
    // Whoever makes a container of a program that is not there hears of it then, not at the start.
    let path = program::find(&process.args[0], &process.env)?;

    report
        .send(&Message::Ready, terminal.as_ref().map(AsFd::as_fd))
        .map_err(doing("tell the agent"))?;
    drop(terminal);
    if !report.wait().map_err(doing("wait for the start"))? {
        return Err(Error::GivenUp);
    }

    if let Some(cpus) = &prepared.affinity.last {
        sys::set_affinity(cpus).map_err(doing("set process.execCPUAffinity.final"))?;
    }
    confine(launch, prepared)?;
    if let Place::New(new) = &launch.place {
        let start = &new.spec.hooks.start_container;
        hooks::run("startContainer", start, new, "created")?;
    }
    let executing = Message::Executing(sys::boottime_ns());
    report
        .send(&executing, None)
        .map_err(doing("tell the agent"))?;
    Ok(program::execute(&path, &prepared.arguments, &environment)?)
}

/// Builds the container around this process; answers its terminal's master side.
fn enter_new(new: &NewContainer<'_>, report: Report<'_>) -> Result<Option<OwnedFd>, Error> {
    let namespaces = new.namespaces;
    if namespaces.mappings().is_some() {
        // The agent writes them meanwhile.
        if !report
            .wait()
            .map_err(doing("wait for the user namespace"))?
        {
            return Err(Error::GivenUp);
        }
        user::become_root().map_err(doing("become root of the user namespace"))?;
    }
    for ((kind, _), number) in namespaces.joined().zip(FIRST_PLACE..) {
        setns(sys::arranged(number), kind).map_err(doing("join a namespace"))?;
    }
    if namespaces.makes(CloneFlags::CLONE_NEWCGROUP) {
        unshare(CloneFlags::CLONE_NEWCGROUP).map_err(doing("make a cgroup namespace"))?;
    }
    if namespaces.makes(TIME) {
        make_time(namespaces.time_offsets()).map_err(doing("make a time namespace"))?;
    }
    if namespaces.makes(CloneFlags::CLONE_NEWNET) {
        sys::loopback_up().map_err(doing("bring the loopback interface up"))?;
    }
    if namespaces.has(CloneFlags::CLONE_NEWUTS) {
        if let Some(name) = new.spec.hostname.as_deref().filter(|name| !name.is_empty()) {
            sethostname(name).map_err(doing("set the host name"))?;
        }
        if let Some(name) = new
            .spec
            .domainname
            .as_deref()
            .filter(|name| !name.is_empty())
        {
            sys::set_domain_name(name).map_err(doing("set the domain name"))?;
        }
    }
    let joined = namespaces.joined().count() as i32;
    let given = new.granted.given(FIRST_PLACE + joined);
    let tree = Rootfs::build(new.spec, new.source, new.scratch, new.cgroup, &given)?;
    for (name, value) in &new.spec.linux.sysctl {
        sysctl::set(name, value, |kind| namespaces.has(kind))?;
    }
    hooks::run(
        "createContainer",
        &new.spec.hooks.create_container,
        new,
        "creating",
    )?;
    tree.enter()?;
    Ok(tree.terminal)
}

/// Makes a time namespace with its clocks, which execve enters.
fn make_time(offsets: &str) -> io::Result<()> {
    unshare(TIME)?;
    if offsets.is_empty() {
        return Ok(());
    }
    sys::inspectable(|| fs::write("/proc/self/timens_offsets", offsets))
}

/// Joins the container of the first process; answers the new terminal's master side.
fn enter_existing(running: &Running<'_>, process: &Process) -> Result<Option<OwnedFd>, Error> {
    setns(sys::arranged(FIRST_PLACE), running.kinds)
        .map_err(doing("join the container's namespaces"))?;
    if running.kinds.contains(CloneFlags::CLONE_NEWUSER) {
        user::become_root().map_err(doing("become root of the user namespace"))?;
    }
    if !process.terminal {
        return Ok(None);
    }
    let root = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(doing("open the container's root"))?;
    rootfs::open_master(root.as_fd())
        .map(Some)
        .map_err(doing("open a terminal in /dev/pts of the container"))
}

/// Makes the terminal behind `master` this session's, and its standard streams.
fn take_terminal(master: BorrowedFd<'_>, process: &Process) -> Result<(), Error> {
    let take = || {
        if let Some(size) = process.console_size {
            sys::set_size(master, size.width, size.height)?;
        }
        let terminal = sys::open_peer(master)?;
        sys::set_controlling(terminal.as_fd())?;
        // The user may open it again by /proc/self/fd.
        fchown(&terminal, Some(Uid::from_raw(process.user.uid)), None)?;
        sys::become_stdio(terminal.as_fd())
    };
    take().map_err(doing("take the terminal"))
}

fn enter_directory(process: &Process) -> Result<(), Error> {
    let enter = || {
        chdir(Path::new(&process.cwd))?;
        // A directory outside the root has no path here.
        let here = getcwd()?;
        if here.is_absolute() {
            Ok(())
        } else {
            Err(nix::errno::Errno::ENOENT)
        }
    };
    enter().map_err(|error| Error::WorkingDirectory {
        cwd: process.cwd.clone(),
        source: io::Error::from(error),
    })
}

/// The environment, with `HOME` where the configuration has none.
fn environment(process: &Process) -> Vec<CString> {
    let mut environment: Vec<_> = process.env.iter().filter_map(program::c_string).collect();
    if !process.env.iter().any(|entry| entry.starts_with("HOME=")) {
        let home = format!("HOME={}", user::home(&passwd(), process.user.uid));
        environment.extend(program::c_string(home));
    }
    environment
}

/// The container's /etc/passwd, at most a mebibyte of it; nothing where there is none.
fn passwd() -> String {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let Ok(file) = open("/etc/passwd", flags, Mode::empty()) else {
        return String::new();
    };
    let mut bytes = Vec::new();
    let _ = fs::File::from(file).take(1 << 20).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Gives up what the program may not have. A filter of system calls needs either a privilege or
/// the promise to gain none: with the promise it comes last, else before the privileges go.
fn confine(launch: &Launch<'_>, prepared: &Prepared) -> Result<(), Error> {
    let filter = || match launch.seccomp {
        Some(filter) => filter.install().map_err(doing("install linux.seccomp")),
        None => Ok(()),
    };
    let assume = || {
        prepared
            .capabilities
            .assume()
            .map_err(doing("take on process.capabilities"))
    };
    if launch.process.no_new_privileges {
        sys::no_new_privileges().map_err(doing("set no_new_privs"))?;
        assume()?;
        filter()
    } else {
        if launch.seccomp.is_some() {
            Capabilities::keep_all().map_err(doing("keep capabilities for the filter"))?;
        }
        filter()?;
        assume()
    }
}
