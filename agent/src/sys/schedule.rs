//! What the kernel's schedulers know of a process.

use std::io;

use super::checked;

/// `struct sched_attr` of sched_setattr(2), its first version.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct SchedulerAttributes {
    /// Set by the call.
    pub(crate) size: u32,
    /// SCHED_...
    pub(crate) policy: u32,
    /// SCHED_FLAG_...
    pub(crate) flags: u64,
    /// The nice value.
    pub(crate) nice: i32,
    /// The real-time priority.
    pub(crate) priority: u32,
    /// Nanoseconds in each period.
    pub(crate) runtime: u64,
    /// Nanoseconds.
    pub(crate) deadline: u64,
    /// Nanoseconds.
    pub(crate) period: u64,
}

/// Sets how this thread shares CPUs with others.
pub(crate) fn set_scheduler(attributes: &SchedulerAttributes) -> io::Result<()> {
    let attributes = SchedulerAttributes {
        size: size_of::<SchedulerAttributes>() as u32,
        ..*attributes
    };
    // SAFETY: the structure has the size that it says, and the kernel reads that much.
    checked(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
        .map(drop)
}

/// Sets the class and level by which this thread shares block devices with others.
pub(crate) fn set_io_priority(priority: i32) -> io::Result<()> {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: the call takes numbers.
    checked(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, priority) }).map(drop)
}

/// A set of up to 1024 CPUs or memory nodes, as the kernel reads it. Higher numbers are left out.
fn set(numbers: &[u32]) -> [u64; 16] {
    let mut set = [0; 16];
    for number in numbers {
        if let Some(word) = set.get_mut(*number as usize / 64) {
            *word |= 1 << (number % 64);
        }
    }
    set
}

/// Sets on which memory nodes this thread gets memory.
pub(crate) fn set_memory_policy(mode: i32, nodes: &[u32]) -> io::Result<()> {
    let mask = set(nodes);
    let (pointer, bits) = if nodes.is_empty() {
        (std::ptr::null(), 0)
    } else {
        // The kernel takes one bit less than it is told.
        (mask.as_ptr(), 1025)
    };
    // SAFETY: the pointer is null, or the kernel reads 1024 bits, which `mask` has.
    checked(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, pointer, bits) }).map(drop)
}

/// Sets the CPUs that this thread runs on.
pub(crate) fn set_affinity(cpus: &[u32]) -> io::Result<()> {
    let mask = set(cpus);
    // SAFETY: the kernel reads as many bytes as `mask` has.
    checked(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            size_of_val(&mask),
            mask.as_ptr(),
        )
    })
    .map(drop)
}

/// Sets the execution domain of this thread.
pub(crate) fn set_personality(domain: u64) -> io::Result<()> {
    // SAFETY: the call takes a number.
    let answer = unsafe { libc::personality(domain) };
    checked(answer.into()).map(drop)
}

/// Gives this thread a session keyring of its own, where the kernel has any.
pub(crate) fn join_new_keyring() -> io::Result<()> {
    const JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: a null name asks for a new keyring without one.
    let answer = checked(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    });
    match answer {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => other.map(drop),
    }
}
