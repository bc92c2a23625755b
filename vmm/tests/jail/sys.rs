//! System calls by name, to see which of them a confined thread may make.

#![expect(
    unsafe_code,
    reason = "calls with harmless arguments that must not reach libc's checks"
)]

use libc::c_long;

/// A call whose arguments do no harm if it is let through.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    number: c_long,
    arguments: [c_long; 6],
}

const NONE: c_long = -1;
const RWX: c_long = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as c_long;
const RW: c_long = (libc::PROT_READ | libc::PROT_WRITE) as c_long;
const PRIVATE: c_long = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as c_long;

const fn call(name: &'static str, number: c_long, arguments: [c_long; 6]) -> Call {
    Call {
        name,
        number,
        arguments,
    }
}

/// No descriptor is -1 and no string is at address 0, so that these fail when they are let
/// through. All are tried by every kind of thread.
pub(crate) const FORBIDDEN: &[Call] = &[
    call("execve", libc::SYS_execve, [0; 6]),
    call("execveat", libc::SYS_execveat, [NONE, 0, 0, 0, 0, 0]),
    call("open", libc::SYS_open, [0; 6]),
    call("socket", libc::SYS_socket, [NONE, NONE, NONE, 0, 0, 0]),
    call("connect", libc::SYS_connect, [NONE, 0, 0, 0, 0, 0]),
    call("bind", libc::SYS_bind, [NONE, 0, 0, 0, 0, 0]),
    call("ptrace", libc::SYS_ptrace, [NONE, 0, 0, 0, 0, 0]),
    call("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
    call(
        "a signal to another process",
        libc::SYS_tgkill,
        [2, 2, 0, 0, 0, 0],
    ),
    call("fork", libc::SYS_fork, [0; 6]),
    call(
        "a process by clone",
        libc::SYS_clone,
        [libc::SIGCHLD as c_long, 0, 0, 0, 0, 0],
    ),
    call("mount", libc::SYS_mount, [0; 6]),
    call("setns", libc::SYS_setns, [NONE, 0, 0, 0, 0, 0]),
    call(
        "a user namespace",
        libc::SYS_unshare,
        [libc::CLONE_NEWUSER as c_long, 0, 0, 0, 0, 0],
    ),
    call("bpf", libc::SYS_bpf, [NONE, 0, 0, 0, 0, 0]),
    call("userfaultfd", libc::SYS_userfaultfd, [NONE, 0, 0, 0, 0, 0]),
    call(
        "executable memory",
        libc::SYS_mmap,
        [0, 4096, RWX, PRIVATE, NONE, 0],
    ),
    call(
        "memory made executable",
        libc::SYS_mprotect,
        [0, 4096, RWX, 0, 0, 0],
    ),
    call(
        "a terminal's ioctl",
        libc::SYS_ioctl,
        [NONE, libc::TIOCSTI as c_long, 0, 0, 0, 0],
    ),
    call("kvm_create_vm", libc::SYS_ioctl, [NONE, 0xae01, 0, 0, 0, 0]),
    call(
        "a name by prctl",
        libc::SYS_prctl,
        [libc::PR_SET_DUMPABLE as c_long, 1, 0, 0, 0, 0],
    ),
];

/// All may be made by every kind of thread.
pub(crate) const ALLOWED: &[Call] = &[
    call("read", libc::SYS_read, [NONE, 0, 0, 0, 0, 0]),
    call("write", libc::SYS_write, [NONE, 0, 0, 0, 0, 0]),
    call("close", libc::SYS_close, [NONE, 0, 0, 0, 0, 0]),
    call("memory", libc::SYS_mmap, [0, 4096, RW, PRIVATE, NONE, 0]),
    call("gettid", libc::SYS_gettid, [0; 6]),
    call("epoll_wait", libc::SYS_epoll_wait, [NONE, 0, 0, 0, 0, 0]),
];

/// Calls of some kinds only: the name of the kind as the test's program takes it, and the call.
pub(crate) const OF_KIND: &[(&str, Call)] = &[
    (
        "fs",
        call("openat", libc::SYS_openat, [NONE, 0, 0, 0, 0, 0]),
    ),
    (
        "fs",
        call("openat2", libc::SYS_openat2, [NONE, 0, 0, 0, 0, 0]),
    ),
    ("fs", call("getxattr", libc::SYS_getxattr, [0; 6])),
    (
        "fs",
        call("linkat", libc::SYS_linkat, [NONE, 0, NONE, 0, 0, 0]),
    ),
    (
        "vcpu",
        call("kvm_run", libc::SYS_ioctl, [NONE, 0xae80, 0, 0, 0, 0]),
    ),
    (
        "blk",
        call(
            "io_uring_enter",
            libc::SYS_io_uring_enter,
            [NONE, 0, 0, 0, 0, 0],
        ),
    ),
    (
        "main",
        call("seccomp", libc::SYS_seccomp, [1, 0, 0, 0, 0, 0]),
    ),
    // These two fail there.
    ("main", call("clone3", libc::SYS_clone3, [0; 6])),
    (
        "main",
        call("io_uring_setup", libc::SYS_io_uring_setup, [0; 6]),
    ),
];

/// Makes the call, whatever comes of it.
pub(crate) fn make(call: &Call) {
    let [a, b, c, d, e, f] = call.arguments;
    // SAFETY: the arguments name no memory of this program and no open descriptor.
    unsafe { libc::syscall(call.number, a, b, c, d, e, f) };
}
