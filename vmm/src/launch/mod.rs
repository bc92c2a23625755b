//! Starts `bulkhead-vmm` so that it is jailed from its first instruction: in
//! its own user, mount, pid, ipc, net, uts and cgroup namespaces, with nothing
//! open but what it was passed.
//!
//! ```text
//!   launcher                                 child
//!   ────────                                 ─────
//!   config to a sealed memfd
//!   clone3(new namespaces, pidfd) ─────────► waits
//!   writes its id maps, then "go" ─────────► becomes uid 0 of its namespace,
//!                                            dies with the launcher from now on,
//!   waits for a report                       descriptors 0, 1, 2, 3 … in place
//!   end of file: it runs ◄────────────────── execveat closes the report
//! ```
//!
//! ```no_run
//! # fn example(program: std::os::fd::OwnedFd, config: vmm::config::VmConfig, kernel: std::os::fd::OwnedFd) -> Result<(), Box<dyn std::error::Error>> {
//! let mut launch = vmm::launch::Launch::new(program);
//! let mut config = config;
//! config.boot.kernel = launch.pass(kernel);
//! let mut vmm = launch.spawn(&config)?;
//! println!("process {} ended: {}", vmm.pid(), vmm.wait()?);
//! # Ok(()) }
//! ```

use std::{
    ffi::CString,
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    process::ExitStatus,
    sync::mpsc,
    thread,
};

use nix::{
    fcntl::{FcntlArg, OFlag, SealFlag, fcntl},
    sched::{CloneFlags, setns},
    sys::memfd::{MFdFlags, memfd_create},
    sys::stat::{SFlag, fstat},
    sys::wait::{Id, WaitPidFlag, waitid},
    unistd::{getegid, geteuid, pipe2},
};

mod identity;
mod process;
mod sys;

pub use process::Process;
use sys::Access;
pub use sys::Step;

use crate::{
    config::{DeviceConfig, Resource, VmConfig},
    descriptors,
};
use identity::Launcher;

/// The number at which the VMM finds its configuration.
const CONFIG_FD: RawFd = 3;
/// The number of the first descriptor that [`Launch::pass`] gives.
const FIRST_PASSED_FD: RawFd = CONFIG_FD + 1;
/// All threads of the VMM share one heap: each further one would cost memory in every pod.
const ENVIRONMENT: &[&str] = &["MALLOC_ARENA_MAX=1"];
/// More than any VM can have devices for.
const MAX_PASSED: usize = 1024;
/// The thread that a VMM's life is bound to does nothing but wait.
const PARENT_STACK_BYTES: usize = 64 * 1024;

/// A VMM that is about to start.
#[derive(Debug)]
pub struct Launch {
    program: OwnedFd,
    passed: Vec<OwnedFd>,
    stderr: Option<OwnedFd>,
    network: Option<OwnedFd>,
    cgroup: Option<OwnedFd>,
}

impl Launch {
    /// `program` is the `bulkhead-vmm` binary, opened, `O_PATH` being enough.
    pub fn new(program: OwnedFd) -> Self {
        Self {
            program,
            passed: Vec::new(),
            stderr: None,
            network: None,
            cgroup: None,
        }
    }

    /// Gives `fd` to the VMM and returns how its configuration names it.
    pub fn pass(&mut self, fd: OwnedFd) -> Resource {
        self.passed.push(fd);
        Resource::Fd(FIRST_PASSED_FD + self.passed.len() as RawFd - 1)
    }

    /// Where the VMM's one line about a failure goes; by default the launcher's own stderr.
    pub fn stderr(&mut self, fd: OwnedFd) {
        self.stderr = Some(fd);
    }

    /// The network namespace that the VMM is in; by default one of its own.
    pub fn network(&mut self, namespace: OwnedFd) {
        self.network = Some(namespace);
    }

    /// The directory of the cgroup v2 that the VMM is in; by default the launcher's.
    pub fn cgroup(&mut self, directory: OwnedFd) {
        self.cgroup = Some(directory);
    }

    /// Starts the VMM. What `config` names by path is opened first, by the launcher.
    ///
    /// Returns when the program is about to run. The process dies with the launcher's process,
    /// whichever of its threads called this.
    ///
    /// # Errors
    /// When a path cannot be opened, the host does not permit the namespaces, or the program
    /// cannot be executed.
    pub fn spawn(mut self, config: &VmConfig) -> Result<Process, Error> {
        let mut config = config.clone();
        descriptors::open(&mut config, |fd| self.pass(fd))?;
        if self.passed.len() > MAX_PASSED {
            return Err(Error::TooMany(self.passed.len()));
        }
        self.detach_shares(&config)?;
        let shares_files = config
            .devices
            .iter()
            .any(|device| matches!(device, DeviceConfig::Fs { .. }));
        if shares_files {
            self.set_apart(&config);
        }
        let document = sealed_memfd(&config).map_err(Error::Config)?;
        let (prepared, child) = self.prepare(document).map_err(Error::Prepare)?;
        start(prepared, child, shares_files)
    }

    /// Puts a detached copy in the place of each shared directory: from a directory of the host's
    /// tree the way up leads to the whole of it.
    fn detach_shares(&mut self, config: &VmConfig) -> Result<(), Error> {
        for device in &config.devices {
            let DeviceConfig::Fs {
                tag,
                directory: Resource::Fd(number),
                read_only,
            } = device
            else {
                continue;
            };
            let passed = self.passed(*number).ok_or_else(|| Error::NotPassed {
                tag: tag.clone(),
                number: *number,
            })?;
            *passed =
                sys::detached_tree(passed.as_fd(), *read_only).map_err(|source| Error::Share {
                    tag: tag.clone(),
                    source,
                })?;
        }
        Ok(())
    }

    /// Sets apart what stays open for the VMM's life and that is not its pod's alone: who shares
    /// files can open descriptors again, and is privileged on the files behind them.
    fn set_apart(&mut self, config: &VmConfig) {
        let kvm = config.kvm.iter().map(|kvm| (kvm, Access::ReadWrite));
        let devices = config.devices.iter().flat_map(of_all_pods);
        for (resource, access) in kvm.chain(devices) {
            if let Resource::Fd(number) = resource
                && let Some(passed) = self.passed(*number)
                && let Some(apart) = apart(passed.as_fd(), access)
            {
                *passed = apart;
            }
        }
    }

    /// What the VMM finds at `number`.
    fn passed(&mut self, number: RawFd) -> Option<&mut OwnedFd> {
        let index = usize::try_from(number.checked_sub(FIRST_PASSED_FD)?).ok()?;
        self.passed.get_mut(index)
    }

    /// Moves everything that the child touches above the numbers that it will fill.
    fn prepare(self, document: OwnedFd) -> io::Result<(Prepared, ChildEnds)> {
        let null = || fs::File::options().read(true).write(true).open("/dev/null");
        let stderr = match self.stderr {
            Some(fd) => fd,
            None => io::stderr().as_fd().try_clone_to_owned()?,
        };
        let mut descriptors = vec![null()?.into(), null()?.into(), stderr, document];
        descriptors.extend(self.passed);
        let first_free = descriptors.len() as RawFd;

        let (go, go_writer) = pipe2(OFlag::O_CLOEXEC)?;
        let (report_reader, report) = pipe2(OFlag::O_CLOEXEC)?;
        let descriptors = descriptors
            .into_iter()
            .map(|fd| above(fd, first_free))
            .collect::<io::Result<_>>()?;
        let plan = sys::Plan {
            program: above(self.program, first_free)?,
            arguments: c_strings(&["bulkhead-vmm", "--config-fd", &format!("{CONFIG_FD}")]),
            environment: c_strings(ENVIRONMENT),
            descriptors,
            go: above(go, first_free)?,
            go_writer: go_writer.as_raw_fd(),

            report: above(report, first_free)?,
            network: self.network,
            cgroup: self.cgroup,
            clear_groups: geteuid().is_root(),
        };
        let ours = Prepared {
            go: go_writer.into(),
            report: report_reader.into(),
        };
        Ok((ours, ChildEnds(plan)))
    }
}

/// For a device that is added later, whose resources `Fd(n)` are the n-th of `descriptors`: those
/// that [`Launch::spawn`] would set apart, with their places.
pub(crate) fn set_apart(
    device: &DeviceConfig,
    descriptors: &[BorrowedFd<'_>],
) -> Vec<(usize, OwnedFd)> {
    let resources = of_all_pods(device).into_iter();
    let apart = resources.filter_map(|(resource, access)| match resource {
        Resource::Fd(number) => {
            let index = usize::try_from(*number).ok()?;
            Some((index, apart(*descriptors.get(index)?, access)?))
        }
        Resource::Path(_) => None,
    });
    apart.collect()
}

/// A device of the host by a mount of its own, where that can be.
pub(crate) fn device_apart(device: BorrowedFd<'_>) -> Option<OwnedFd> {
    apart(device, Access::ReadWrite)
}

/// The files and devices of the host that a VM's device uses and other pods may use too.
fn of_all_pods(device: &DeviceConfig) -> Vec<(&Resource, Access)> {
    match device {
        DeviceConfig::Blk {
            disk,
            read_only: true,
            ..
        } => vec![(disk, Access::Read)],
        DeviceConfig::Rng { source } => vec![(source, Access::Read)],
        DeviceConfig::Net(card) => {
            let vhost = card.vhost.iter();
            vhost.map(|vhost| (vhost, Access::ReadWrite)).collect()
        }
        _ => Vec::new(),
    }
}

/// `None` where the launcher may not mount, or for what is no file or device in a file system: it
/// is then passed on as it is.
fn apart(file: BorrowedFd<'_>, access: Access) -> Option<OwnedFd> {
    let kind = SFlag::from_bits_truncate(fstat(file).ok()?.st_mode) & SFlag::S_IFMT;
    let is_named = matches!(kind, SFlag::S_IFREG | SFlag::S_IFBLK | SFlag::S_IFCHR);
    is_named.then(|| sys::opened_apart(file, access).ok())?
}

/// What `bulkhead-vmm --config FILE` does: starts this very program again, jailed, and waits for
/// its end.
///
/// # Errors
/// As [`Launch::spawn`].
pub fn run(config: &VmConfig) -> Result<ExitStatus, Error> {
    let program = fs::File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open("/proc/self/exe")
        .map_err(Error::Prepare)?;
    let mut process = Launch::new(program.into()).spawn(config)?;
    process.wait().map_err(Error::Prepare)
}

/// The launcher's ends of the two pipes.
struct Prepared {
    go: fs::File,
    report: fs::File,
}

/// What only the child needs; dropped by the launcher once the child is made.
struct ChildEnds(sys::Plan);

fn c_strings(strings: &[&str]) -> Vec<CString> {
    strings
        .iter()
        .map(|string| CString::new(*string).expect("none has a zero byte"))
        .collect()
}

/// The same open file under a number of at least `lowest`.
fn above(fd: OwnedFd, lowest: RawFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() >= lowest {
        return Ok(fd);
    }
    sys::duplicate_above(fd.as_fd(), lowest)
}

/// The configuration as the VMM reads it, beyond anybody's change.
fn sealed_memfd(config: &VmConfig) -> io::Result<OwnedFd> {
    let text = serde_json::to_vec(config)?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = fs::File::from(memfd_create(c"vm.json", flags)?);
    file.write_all(&text)?;
    let seals = SealFlag::F_SEAL_SEAL
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    // The offset is shared with the child.
    io::Seek::rewind(&mut file)?;
    Ok(file.into())
}

/// Makes the child on a thread of its own: the kernel binds the child's life to
/// the thread that made it, and the caller's may end before the process does.
fn start(ours: Prepared, child: ChildEnds, shares_files: bool) -> Result<Process, Error> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let parent = thread::Builder::new()
        .name("vmm-parent".to_owned())
        .stack_size(PARENT_STACK_BYTES)
        .spawn(move || {
            let started = start_child(ours, child, shares_files);
            let watched = started.as_ref().ok().map(|(_, pidfd)| pidfd.try_clone());
            // The receiver waits for exactly this.
            let _ = sender.send(started);
            if let Some(Ok(pidfd)) = watched {
                wait_without_reaping(&pidfd);
            }
        })
        .map_err(Error::Prepare)?;
    let (pid, pidfd) = receiver
        .recv()
        .map_err(|_| Error::Prepare(io::ErrorKind::Other.into()))??;
    Ok(Process::new(pid, pidfd, parent))
}

fn wait_without_reaping(pidfd: &OwnedFd) {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    while waitid(Id::PIDFd(pidfd.as_fd()), flags) == Err(nix::errno::Errno::EINTR) {}
}

fn start_child(
    mut ours: Prepared,
    child: ChildEnds,
    shares_files: bool,
) -> Result<(u32, OwnedFd), Error> {
    if let Some(network) = &child.0.network {
        // This thread is there for the child alone, which is born into it.
        setns(network, CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Network(errno.into()))?;
    }
    let (pid, pidfd) = sys::clone_into_jail(&child.0).map_err(Error::namespaces)?;
    drop(child);
    let outcome = write_maps(pid, shares_files).and_then(|()| {
        // A child that is gone says why in its report.
        let _ = ours.go.write_all(&[1]);
        await_exec(&mut ours.report)
    });
    // From here on a hang-up of `go` means nothing: the child has asked to die with us.
    match outcome {
        Ok(()) => Ok((pid, pidfd)),
        Err(error) => {
            let _ = process::kill(pidfd.as_fd());
            let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
            Err(error)
        }
    }
}

fn write_maps(pid: u32, shares_files: bool) -> Result<(), Error> {
    let launcher = Launcher {
        uid: geteuid().as_raw(),
        gid: getegid().as_raw(),
        uid_map: &read("/proc/self/uid_map".to_owned())?,
        gid_map: &read("/proc/self/gid_map".to_owned())?,
        shares_files,
    };
    let maps = launcher.maps(pid);
    if !launcher.is_root() {
        // Without this the kernel lets nobody but root write a gid map.
        write(format!("/proc/{pid}/setgroups"), "deny")?;
    }
    write(format!("/proc/{pid}/gid_map"), &maps.gid)?;
    write(format!("/proc/{pid}/uid_map"), &maps.uid)
}

fn read(path: String) -> Result<String, Error> {
    fs::read_to_string(&path).map_err(|source| Error::IdMap { path, source })
}

fn write(path: String, text: &str) -> Result<(), Error> {
    fs::write(&path, text).map_err(|source| Error::IdMap { path, source })
}

/// Waits until the child executes the program or says why it cannot.
fn await_exec(report: &mut fs::File) -> Result<(), Error> {
    let mut bytes = [0; sys::REPORT_BYTES];
    let mut filled = 0;
    while filled < bytes.len() {
        match report.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(Error::Prepare(source)),
        }
    }
    if filled == 0 {
        return Ok(());
    }
    match sys::parse_report(&bytes) {
        Some((step, source)) => Err(Error::Child {
            step: step.name(),
            source,
        }),
        None => Err(Error::Prepare(io::ErrorKind::InvalidData.into())),
    }
}

/// Why a VMM did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path in the configuration cannot be opened.
    #[error(transparent)]
    Open(#[from] descriptors::Error),
    /// More descriptors than a VM can use.
    #[error("{0} descriptors are passed to the VMM; at most {MAX_PASSED} can be")]
    TooMany(usize),
    /// A shared directory that the VMM would not have.
    #[error("descriptor {number} of the directory shared as {tag:?} is not one that was passed")]
    NotPassed {
        /// The share's tag.
        tag: String,
        /// The number.
        number: RawFd,
    },
    /// A directory cannot be shared.
    #[error("cannot share a directory as {tag:?}; it must be a directory, and root must share it")]
    Share {
        /// The share's tag.
        tag: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The configuration could not be put where the VMM reads it.
    #[error("cannot write the VMM's configuration to memory")]
    Config(#[source] io::Error),
    /// The launcher ran out of something.
    #[error("cannot prepare the VMM's process")]
    Prepare(#[source] io::Error),
    /// The network namespace cannot be joined.
    #[error("cannot put the VMM into its network namespace")]
    Network(#[source] io::Error),
    /// The host does not permit the jail.
    #[error("cannot make the namespaces of the VMM's jail; {advice}")]
    Namespaces {
        /// What to do about it.
        advice: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The ids of the VMM's user namespace could not be set.
    #[error("cannot set the ids of the VMM's user namespace in {path}")]
    IdMap {
        /// The file of /proc.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The new process failed before the program ran.
    #[error("the VMM's process could not {step}")]
    Child {
        /// What it was trying.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Error {
    fn namespaces(source: io::Error) -> Self {
        let is = |path: &str, value: &str| {
            fs::read_to_string(path).is_ok_and(|text| text.trim() == value)
        };
        let advice = match source.raw_os_error() {
            Some(libc::EPERM) if is("/proc/sys/kernel/unprivileged_userns_clone", "0") => {
                "run as root or set sysctl kernel.unprivileged_userns_clone=1"
            }
            Some(libc::EPERM)
                if is(
                    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
                    "1",
                ) =>
            {
                "run as root or set sysctl kernel.apparmor_restrict_unprivileged_userns=0"
            }
            Some(libc::EPERM) => {
                "user namespaces are forbidden here: run as root, outside of any chroot and of any \
                 container that filters clone3"
            }
            Some(libc::ENOSPC | libc::EUSERS) => {
                "too many namespaces: raise sysctl user.max_user_namespaces (0 forbids them) and \
                 its neighbours under user.max_*_namespaces"
            }
            Some(libc::EINVAL | libc::ENOSYS) => {
                "the kernel lacks user namespaces (CONFIG_USER_NS) or is older than 5.11"
            }
            _ => "see the cause",
        };
        Self::Namespaces { advice, source }
    }
}

#[cfg(test)]
mod tests {
    use nix::{
        poll::{PollFd, PollFlags, PollTimeout, poll},
        sys::wait::WaitStatus,
    };

    use super::*;

    #[test]
    fn a_child_whose_launcher_dies_before_it_may_go_ends() {
        let program = fs::File::open("/bin/true").unwrap();
        let config = fs::File::open("/dev/null").unwrap();
        let (ours, child) = Launch::new(program.into()).prepare(config.into()).unwrap();
        let (_, pidfd) = sys::clone_into_jail(&child.0).unwrap();
        drop(child);

        // As the kernel does when the launcher is killed.
        drop(ours);

        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(5000u16)).unwrap();
        if ready == 0 {
            process::kill(pidfd.as_fd()).unwrap();
        }
        let end = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED).unwrap();
        assert!(matches!(end, WaitStatus::Exited(_, 127)), "{end:?}");
    }
}
