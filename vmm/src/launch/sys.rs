//! The one process that is made by hand: `clone3` into new namespaces, and the
//! child's few steps from there to `execveat`.
//!
//! The launcher may have many threads, so the child owns nothing but the
//! calling thread: any lock may be held by a thread that does not exist here.
//! From `clone3` to `execveat` there is therefore no allocation, no lock and no
//! libc call that keeps books on threads; everything is prepared in [`Plan`].

#![expect(unsafe_code, reason = "clone3 and what a forked child may safely do")]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_long},
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use nix::errno::Errno;

/// Everything the child needs, prepared before it exists.
///
/// No source descriptor's number is below `first_free`, so that no `dup2`
/// overwrites one that is still needed.
pub(super) struct Plan {
    /// The program.
    pub(super) program: OwnedFd,
    /// Its arguments, the first being its name.
    pub(super) arguments: Vec<CString>,
    /// Its environment.
    pub(super) environment: Vec<CString>,
    /// What becomes descriptor 0, 1, 2, 3, ... of the child.
    pub(super) descriptors: Vec<OwnedFd>,
    /// Has a byte to read once the id maps are written; its other end closes with the launcher.
    pub(super) go: OwnedFd,
    /// The number of that other end, of which the child must not keep its copy.
    pub(super) go_writer: RawFd,
    /// Where the child reports the step that failed; closed by a successful `execveat`.
    pub(super) report: OwnedFd,
    /// The network namespace that the launching thread has joined; none is a new one.
    pub(super) network: Option<OwnedFd>,
    /// The directory of the cgroup that the child begins in; none is the launcher's.
    pub(super) cgroup: Option<OwnedFd>,
    /// Whether to give up the supplementary groups.
    pub(super) clear_groups: bool,
}

/// A step of the child that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Waiting for the id maps.
    Maps,
    /// Giving up the supplementary groups.
    Groups,
    /// Becoming the namespace's root group.
    Gid,
    /// Becoming the namespace's root user.
    Uid,
    /// Asking to die with the launcher.
    DeathSignal,
    /// Putting descriptors to their numbers.
    Descriptors,
    /// Unblocking signals.
    Signals,
    /// Executing the program.
    Exec,
}

impl Step {
    /// What was being tried.
    pub fn name(self) -> &'static str {
        match self {
            Self::Maps => "wait for its id maps",
            Self::Groups => "give up its supplementary groups",
            Self::Gid => "change its group id",
            Self::Uid => "change its user id",
            Self::DeathSignal => "bind its life to the launcher's",
            Self::Descriptors => "put its descriptors in place",
            Self::Signals => "unblock signals",
            Self::Exec => "execute the program",
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        const ALL: [Step; 8] = [
            Step::Maps,
            Step::Groups,
            Step::Gid,
            Step::Uid,
            Step::DeathSignal,
            Step::Descriptors,
            Step::Signals,
            Step::Exec,
        ];
        ALL.into_iter().find(|step| *step as u8 == byte)
    }
}

/// Bytes of a failure report: the step, then errno.
pub(super) const REPORT_BYTES: usize = 5;

/// Reads what a child reported.
pub(super) fn parse_report(bytes: &[u8; REPORT_BYTES]) -> Option<(Step, io::Error)> {
    let [step, errno @ ..] = *bytes;
    let errno = i32::from_ne_bytes(errno);
    Some((Step::from_byte(step)?, io::Error::from_raw_os_error(errno)))
}

const NAMESPACES: c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// Makes the child in its new namespaces and returns its pid and pidfd.
///
/// # Errors
/// When the kernel refuses the process or one of the namespaces.
pub(super) fn clone_into_jail(plan: &Plan) -> io::Result<(u32, OwnedFd)> {
    let argv = pointers(&plan.arguments);
    let envp = pointers(&plan.environment);
    let sources: Vec<RawFd> = plan.descriptors.iter().map(AsRawFd::as_raw_fd).collect();

    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain numbers, for which zero means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (NAMESPACES | libc::CLONE_PIDFD) as u64 | CLONE_CLEAR_SIGHAND;
    if plan.network.is_none() {
        args.flags |= libc::CLONE_NEWNET as u64;
    }
    if let Some(cgroup) = &plan.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    args.pidfd = ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    let size = size_of::<libc::clone_args>();

    let blocked = Signals::block();
    // SAFETY: without CLONE_VM and without a stack this is fork: the child goes on with a copy of
    // this memory and only calls `child`, which touches nothing that another thread could hold.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, ptr::from_mut(&mut args), size) };
    if pid == 0 {
        let failure = child(plan, &sources, &argv, &envp);
        report_and_exit(plan.report.as_raw_fd(), failure);
    }
    let error = io::Error::last_os_error();
    drop(blocked);
    if pid < 0 {
        return Err(error);
    }
    // SAFETY: clone3 succeeded with CLONE_PIDFD, so it stored a new descriptor of ours.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((pid as u32, pidfd))
}

/// As `execveat` takes them, up to a null pointer.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    let pointers = strings.iter().map(|string| string.as_ptr());
    pointers.chain([ptr::null()]).collect()
}

/// Missing from libc's list for this target's `c_int`: it does not fit into 32 bits.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;

struct Failure {
    step: Step,
    errno: c_int,
}

/// The child's way to `execveat`; returns only on failure.
fn child(
    plan: &Plan,
    sources: &[RawFd],
    argv: &[*const c_char],
    envp: &[*const c_char],
) -> Failure {
    match child_steps(plan, sources, argv, envp) {
        Ok(()) => Failure {
            step: Step::Exec,
            errno: libc::EIO,
        },
        Err(failure) => failure,
    }
}

fn child_steps(
    plan: &Plan,
    sources: &[RawFd],
    argv: &[*const c_char],
    envp: &[*const c_char],
) -> Result<(), Failure> {
    // Else the pipe would never hang up.
    // SAFETY: takes a number; the child's copy of a descriptor that only the launcher uses.
    let done = unsafe { libc::syscall(libc::SYS_close, plan.go_writer) };
    check(Step::Maps, done)?;
    let go = plan.go.as_raw_fd();
    let mut byte = 0u8;
    // SAFETY: the buffer is one byte and one byte is read.
    let got = unsafe { libc::syscall(libc::SYS_read, go, ptr::from_mut(&mut byte), 1usize) };
    if check(Step::Maps, got)? != 1 {
        return Err(Failure {
            step: Step::Maps,
            errno: libc::EPIPE,
        });
    }
    // Its own session: the terminal's signals are for the launcher. It cannot fail in a process
    // that was just made, and would do no harm.
    // SAFETY: takes no arguments.
    unsafe { libc::syscall(libc::SYS_setsid) };

    // By syscall and not by libc, which would want to tell threads that this process has not.
    if plan.clear_groups {
        let none: *const libc::gid_t = ptr::null();
        // SAFETY: an empty list is not read.
        let done = unsafe { libc::syscall(libc::SYS_setgroups, 0usize, none) };
        check(Step::Groups, done)?;
    }
    // SAFETY: takes numbers.
    check(Step::Gid, unsafe {
        libc::syscall(libc::SYS_setresgid, 0, 0, 0)
    })?;
    // SAFETY: takes numbers.
    check(Step::Uid, unsafe {
        libc::syscall(libc::SYS_setresuid, 0, 0, 0)
    })?;

    // After the ids, because changing those takes it back.
    // SAFETY: takes numbers.
    let done = unsafe {
        libc::syscall(
            libc::SYS_prctl,
            libc::PR_SET_PDEATHSIG,
            libc::SIGKILL as c_long,
            0,
            0,
            0,
        )
    };
    check(Step::DeathSignal, done)?;
    die_if_orphaned(go)?;

    let mut first_free = 0;
    for source in sources {
        // SAFETY: takes numbers; the target is below every source that is still needed.
        let done = unsafe { libc::syscall(libc::SYS_dup3, *source, first_free, 0) };
        check(Step::Descriptors, done)?;
        first_free += 1;
    }
    // SAFETY: takes numbers; nothing is closed before execveat, only marked.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first_free,
            c_int::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(Step::Descriptors, done)?;

    let none = 0u64;
    // SAFETY: the mask is eight bytes, as the size says, and outlives the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            ptr::from_ref(&none),
            ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
    check(Step::Signals, done)?;

    let here: &CStr = c"";
    // SAFETY: argv and envp end in a null pointer and point to strings that `plan` keeps alive.
    let done = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            plan.program.as_raw_fd(),
            here.as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    check(Step::Exec, done).map(drop)
}

/// The launcher may have died before the death signal was asked for. It holds
/// the other end of `go`, which then hangs up.
fn die_if_orphaned(go: RawFd) -> Result<(), Failure> {
    let mut poll = libc::pollfd {
        fd: go,
        events: 0,
        revents: 0,
    };
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: one pollfd is passed and its count is one; the time outlives the call; no mask.
    let ready = unsafe {
        libc::syscall(
            libc::SYS_ppoll,
            ptr::from_mut(&mut poll),
            1usize,
            ptr::from_ref(&now),
            ptr::null::<u64>(),
            size_of::<u64>(),
        )
    };
    if check(Step::DeathSignal, ready)? != 0 {
        return Err(Failure {
            step: Step::DeathSignal,
            errno: libc::EPIPE,
        });
    }
    Ok(())
}

fn check(step: Step, result: c_long) -> Result<c_long, Failure> {
    if result >= 0 {
        return Ok(result);
    }
    let errno = Errno::last_raw();
    Err(Failure { step, errno })
}

fn report_and_exit(report: RawFd, failure: Failure) -> ! {
    let mut bytes = [failure.step as u8; REPORT_BYTES];
    bytes[1..].copy_from_slice(&failure.errno.to_ne_bytes());
    // SAFETY: the buffer is REPORT_BYTES long. A launcher that is gone needs no report.
    unsafe { libc::syscall(libc::SYS_write, report, bytes.as_ptr(), REPORT_BYTES) };
    // SAFETY: ends the child without running anything of the launcher's.
    unsafe { libc::_exit(127) }
}

/// All signals of this thread blocked, until dropped: no handler of the
/// launcher's may run in the child.
struct Signals {
    before: u64,
}

impl Signals {
    fn block() -> Self {
        let all = u64::MAX;
        let mut before = 0u64;
        // SAFETY: both masks are eight bytes, as the size says.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                ptr::from_ref(&all),
                ptr::from_mut(&mut before),
                size_of::<u64>(),
            )
        };
        Self { before }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the mask is eight bytes, as the size says.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                ptr::from_ref(&self.before),
                ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
}

/// Sends SIGKILL to the process behind a pidfd.
pub(super) fn pidfd_kill(pidfd: RawFd) -> io::Result<()> {
    let info: *const libc::siginfo_t = ptr::null();
    // SAFETY: takes numbers and no siginfo; a wrong descriptor is an error.
    let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, libc::SIGKILL, info, 0) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The same open file under a number of at least `lowest`.
pub(super) fn duplicate_above(fd: BorrowedFd<'_>, lowest: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers; a new descriptor is returned.
    let new = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fcntl returned a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// What a mount of the VMM's own never lets through.
const HARMLESS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// A copy of the tree of mounts at `directory` that is attached nowhere: there is no way up from
/// its top. What is mounted below the original later comes in (if the original's mount is
/// shared), and nothing goes out.
///
/// # Errors
/// When the launcher may not mount, or `directory` is no directory.
pub(super) fn detached_tree(directory: BorrowedFd<'_>, read_only: bool) -> io::Result<OwnedFd> {
    let tree = clone_mounts(directory, libc::AT_RECURSIVE as u32)?;
    let mut attributes = MountAttributes {
        set: HARMLESS,
        clear: 0,
        propagation: libc::MS_SLAVE,
        user_namespace: 0,
    };
    if read_only {
        attributes.set |= libc::MOUNT_ATTR_RDONLY;
    }
    change_mounts(&tree, &attributes, libc::AT_RECURSIVE)?;
    Ok(tree)
}

/// The same file, opened again by a read-only mount that nothing else is on. Whoever has the
/// descriptor can neither open the file for writing by it, nor a device at all, nor change the
/// file's mode or owner.
///
/// # Errors
/// When the launcher may not mount, or the file is in no tree of mounts.
pub(super) fn opened_apart(file: BorrowedFd<'_>, access: Access) -> io::Result<OwnedFd> {
    let mount = clone_mounts(file, 0)?;
    let apart = File::options()
        .read(true)
        .write(access == Access::ReadWrite)
        .open(format!("/proc/self/fd/{}", mount.as_raw_fd()))?;
    // Only now: a device cannot be opened by such a mount.
    let attributes = MountAttributes {
        set: HARMLESS | libc::MOUNT_ATTR_RDONLY,
        clear: 0,
        propagation: libc::MS_PRIVATE,
        user_namespace: 0,
    };
    change_mounts(&mount, &attributes, 0)?;
    Ok(apart.into())
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// For reading.
    Read,
    /// For reading and writing; only a device is, on a mount that becomes read-only.
    ReadWrite,
}

fn clone_mounts(at: BorrowedFd<'_>, flags: u32) -> io::Result<OwnedFd> {
    let flags =
        flags | libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32;
    // SAFETY: the path is a C string that is not kept.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, at.as_raw_fd(), c"".as_ptr(), flags) };
    if tree < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open_tree returned a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(tree as RawFd) })
}

fn change_mounts(tree: &OwnedFd, attributes: &MountAttributes, flags: c_int) -> io::Result<()> {
    // SAFETY: the structure is of the size that is passed and is only read.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
