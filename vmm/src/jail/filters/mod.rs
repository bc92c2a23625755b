//! What each kind of thread may ask the kernel for: one allow-list per kind.
//!
//! Every list is [`everyone`] and a few calls more. None has a call that runs a
//! program, makes a socket, looks at another process or makes memory
//! executable, and only the thread of a shared directory has calls that take a
//! path. Anything else ends the process.
//!
//! A thread inherits its maker's lists, so [`ThreadKind::Main`], which starts
//! the threads of devices that are added later, has theirs too, but for that
//! of a shared directory: those cannot be added later.

use std::io;

use seccompiler::{BpfProgram, SeccompAction, apply_filter};

mod list;
mod program;

use list::{Argument, List};

use crate::virtio::{Kind, net};

/// The kinds of thread, each with a filter of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// The first thread: serves the control socket and starts the threads of devices that are
    /// added.
    Main,
    /// Runs guest code.
    Vcpu,
    /// Serves a device.
    Device(Kind),
}

impl ThreadKind {
    /// The kind of a device's thread.
    pub fn of(kind: Kind) -> Self {
        Self::Device(kind)
    }
}

/// Puts the list of `kind` into force for the calling thread.
pub(super) fn install(kind: ThreadKind) -> io::Result<()> {
    if kind == ThreadKind::Main {
        apply(&unknown_calls())?;
    }
    apply(&compile(&list(kind)))
}

fn apply(program: &BpfProgram) -> io::Result<()> {
    apply_filter(program).map_err(|error| match error {
        seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
        other => io::Error::other(other),
    })
}

fn compile(list: &List) -> BpfProgram {
    list.compile(SeccompAction::KillProcess, SeccompAction::Allow)
}

/// Calls that fail in the main thread as if the kernel did not know them, for which there is
/// another way. The C library then starts threads by `clone`, whose arguments, unlike those of
/// `clone3`, a filter can see; and a disk that is added does without io_uring.
const UNKNOWN: [libc::c_long; 2] = [libc::SYS_clone3, libc::SYS_io_uring_setup];

fn unknown_calls() -> BpfProgram {
    let mut list = List::default();
    list.allow(&UNKNOWN);
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    list.compile(SeccompAction::Allow, unknown)
}

fn list(kind: ThreadKind) -> List {
    let mut list = everyone();
    match kind {
        ThreadKind::Main => main(&mut list),
        ThreadKind::Vcpu => vcpu(&mut list),
        ThreadKind::Device(kind) => device(&mut list, kind),
    }
    list
}

/// What any thread needs: to work with what is open, wait, take and give back memory, and end.
fn everyone() -> List {
    let mut list = List::default();
    list.allow(&[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_close,
        // Waiting; a device does so anew each time that its driver starts it.
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_pwait,
        libc::SYS_futex,
        libc::SYS_sched_yield,
        libc::SYS_restart_syscall,
        libc::SYS_clock_gettime,
        // Memory.
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        // The allocator asks how many processors there are.
        libc::SYS_sched_getaffinity,
        libc::SYS_getrandom,
        // Starting and ending.
        libc::SYS_rseq,
        libc::SYS_set_robust_list,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]);
    #[cfg(target_arch = "x86_64")]
    list.allow(&[libc::SYS_epoll_wait]);
    let no_code = [Argument::Without(2, libc::PROT_EXEC as u64)];
    list.allow_if(libc::SYS_mmap, &no_code);
    list.allow_if(libc::SYS_mprotect, &no_code);
    // Flags, which the standard library checks when it closes, and duplicates.
    for command in [libc::F_GETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC] {
        list.allow_if(libc::SYS_fcntl, &[Argument::Is(1, command as u32)]);
    }
    // To itself alone: the end of a panic, and kicks of vCPU threads.
    list.allow_if(libc::SYS_tgkill, &[Argument::Is(0, super::sys::own_pid())]);
    list
}

/// Requests that change what is connected to the guest, by their numbers in linux/kvm.h.
mod kvm {
    pub(super) const RUN: u32 = 0xae80;
    pub(super) const SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
    pub(super) const SET_GSI_ROUTING: u32 = 0x4008_ae6a;
    pub(super) const IRQFD: u32 = 0x4020_ae76;
    pub(super) const IOEVENTFD: u32 = 0x4040_ae79;
}

fn requests(list: &mut List, requests: &[u32]) {
    for request in requests {
        list.allow_if(libc::SYS_ioctl, &[Argument::Is(1, *request)]);
    }
}

/// Guest code, and the registers of devices: a driver's writes route interrupts.
fn vcpu(list: &mut List) {
    requests(list, &[kvm::RUN, kvm::SET_GSI_ROUTING, kvm::IRQFD]);
}

/// Commands come with descriptors; devices come and go, each with its memory and thread.
fn main(list: &mut List) {
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Fs) {
        device(list, kind);
    }
    requests(
        list,
        &[
            kvm::SET_USER_MEMORY_REGION,
            kvm::SET_GSI_ROUTING,
            kvm::IRQFD,
            kvm::IOEVENTFD,
        ],
    );
    list.allow(&[
        libc::SYS_accept4,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_pread64,
        libc::SYS_lseek,
        libc::SYS_fstat,
        libc::SYS_statx,
        libc::SYS_eventfd2,
        libc::SYS_timerfd_create,
        // This and the next two only take rights away.
        libc::SYS_capset,
    ]);
    list.allow_if(
        libc::SYS_seccomp,
        &[Argument::Is(0, libc::SECCOMP_SET_MODE_FILTER)],
    );
    list.allow_if(
        libc::SYS_prctl,
        &[Argument::Is(0, libc::PR_SET_NO_NEW_PRIVS as u32)],
    );
    list.allow_if(
        libc::SYS_prctl,
        &[Argument::Is(0, libc::PR_SET_NAME as u32)],
    );
    for command in [libc::F_SETFD, libc::F_SETFL] {
        list.allow_if(libc::SYS_fcntl, &[Argument::Is(1, command as u32)]);
    }
    // Threads, not processes, and in no namespace of their own.
    list.allow_if(libc::SYS_clone, &[Argument::IsLong(0, THREAD_FLAGS)]);
    // Of two filters the stricter counts: these fail and do no harm.
    list.allow(&UNKNOWN);
    // The C library's own signal, which it prepares with the first thread.
    list.allow_if(libc::SYS_rt_sigaction, &[Argument::Is(0, 33)]);
}

/// How the C library makes a thread.
const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

fn device(list: &mut List, kind: Kind) {
    match kind {
        Kind::Blk => {
            list.allow(&[
                libc::SYS_pread64,
                libc::SYS_pwrite64,
                libc::SYS_preadv,
                libc::SYS_pwritev,
                libc::SYS_fdatasync,
                libc::SYS_fallocate,
                // Its ring was made and restricted before; no list has io_uring_setup.
                libc::SYS_io_uring_enter,
            ]);
        }
        Kind::Vsock => {
            list.allow(&[
                libc::SYS_accept4,
                libc::SYS_recvmsg,
                libc::SYS_recvfrom,
                libc::SYS_sendmsg,
                libc::SYS_sendto,
                libc::SYS_shutdown,
            ]);
            requests(list, &[libc::FIONBIO as u32]);
        }
        Kind::Pmem => list.allow(&[libc::SYS_fdatasync]),
        Kind::Fs => shared_directory(list),
        Kind::Net => {
            list.allow(&[libc::SYS_readv, libc::SYS_timerfd_settime]);
            requests(list, &net::requests().collect::<Vec<_>>());
        }
        // Memory is given back by madvise, which everyone may.
        Kind::Balloon | Kind::Console | Kind::Rng => {}
    }
}

/// Files below the directory, on behalf of the guest's users.
fn shared_directory(list: &mut List) {
    list.allow(&[
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_symlinkat,
        libc::SYS_linkat,
        libc::SYS_unlinkat,
        // The C library's renameat2 is this one when there are no flags.
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_readlinkat,
        libc::SYS_statx,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statfs,
        libc::SYS_fstatfs,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_fchown,
        libc::SYS_fchownat,
        libc::SYS_utimensat,
        libc::SYS_truncate,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_copy_file_range,
        libc::SYS_lseek,
        libc::SYS_getdents64,
        libc::SYS_flock,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_syncfs,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_getxattr,
        libc::SYS_lgetxattr,
        libc::SYS_setxattr,
        libc::SYS_listxattr,
        libc::SYS_llistxattr,
        libc::SYS_removexattr,
        libc::SYS_fgetxattr,
        libc::SYS_fsetxattr,
        libc::SYS_flistxattr,
        libc::SYS_fremovexattr,
        // Whose the files are that it makes.
        libc::SYS_setfsuid,
        libc::SYS_setfsgid,
        libc::SYS_umask,
        libc::SYS_fchdir,
    ]);
    list.allow_if(libc::SYS_fcntl, &[Argument::Is(1, libc::F_SETFL as u32)]);
    // A working directory of its own, and no namespace.
    list.allow_if(
        libc::SYS_unshare,
        &[Argument::IsLong(0, libc::CLONE_FS as u64)],
    );
}

#[cfg(test)]
mod tests;
