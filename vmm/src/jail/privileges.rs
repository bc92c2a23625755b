//! Capabilities, limits and the process's other attributes.

use std::io;

use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};

use super::{Files, ThreadKind, sys};
use crate::virtio::Kind;

/// Capabilities by their numbers (capabilities(7)), as far as a shared
/// directory needs them: to act on files of any owner as the guest asks.
/// They hold for this user namespace only: for files whose owner it knows.
const FILE_CAPABILITIES: u64 = 1 << CAP_CHOWN
    | 1 << CAP_DAC_OVERRIDE
    | 1 << CAP_FOWNER
    | 1 << CAP_FSETID
    | 1 << CAP_SETGID
    | 1 << CAP_SETUID
    | 1 << CAP_MKNOD
    | 1 << CAP_SETFCAP;
const CAP_CHOWN: u8 = 0;
const CAP_DAC_OVERRIDE: u8 = 1;
const CAP_FOWNER: u8 = 3;
const CAP_FSETID: u8 = 4;
const CAP_SETGID: u8 = 6;
const CAP_SETUID: u8 = 7;
const CAP_MKNOD: u8 = 27;
const CAP_SETFCAP: u8 = 31;

/// Descriptors of a VM without a shared directory: some ten a device, and one
/// for each connection of its socket device.
const MAX_DESCRIPTORS: u64 = 4096;
/// With a shared directory, each file that the guest's kernel remembers is one.
const MAX_SHARED_DESCRIPTORS: u64 = 1 << 20;
/// 32 vCPUs, 31 devices with a thread or two, and the kernel's for io_uring.
const MAX_THREADS: u64 = 256;
/// The rings of io_uring, on kernels that count them.
const MAX_LOCKED_BYTES: u64 = 8 << 20;

/// The name that tools show; otherwise it is that of a descriptor.
pub(super) fn name_process() -> io::Result<()> {
    Ok(prctl::set_name(c"bulkhead-vmm")?)
}

/// The launcher asked for this before it executed us; it costs nothing to be sure.
pub(super) fn die_with_launcher() -> io::Result<()> {
    Ok(prctl::set_pdeathsig(Signal::SIGKILL)?)
}

/// Lowers the limits, for good.
pub(super) fn limit(files: Files) -> io::Result<()> {
    let descriptors = match files {
        Files::None => MAX_DESCRIPTORS,
        Files::Shared => MAX_SHARED_DESCRIPTORS,
    };
    for (resource, most) in [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_NOFILE, descriptors),
        (Resource::RLIMIT_NPROC, MAX_THREADS),
        (Resource::RLIMIT_MEMLOCK, MAX_LOCKED_BYTES),
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_SIGPENDING, MAX_THREADS),
    ] {
        let (_, hard) = getrlimit(resource)?;
        let most = most.min(hard);
        setrlimit(resource, most, most)?;
    }
    Ok(())
}

/// Gives up every capability but those on files, and those too unless they are needed; and what
/// could bring any back.
pub(super) fn give_up(files: Files) -> io::Result<()> {
    sys::clear_bounding_set()?;
    sys::clear_ambient_set()?;
    let kept = match files {
        Files::None => 0,
        Files::Shared => FILE_CAPABILITIES,
    };
    // Kept is not in force: the thread that needs them takes them up.
    sys::set_capabilities(sys::Capabilities {
        permitted: kept,
        effective: 0,
    })?;
    prctl::set_no_new_privs()?;
    // No core dump, and nobody but the host's root looks inside.
    prctl::set_dumpable(false)?;
    Ok(())
}

/// Leaves the calling thread what its kind needs.
pub(super) fn for_thread(kind: ThreadKind) -> io::Result<()> {
    let kept = match kind {
        ThreadKind::Device(Kind::Fs) => FILE_CAPABILITIES & sys::permitted()?,
        _ => 0,
    };
    sys::set_capabilities(sys::Capabilities {
        permitted: kept,
        effective: kept,
    })
}
