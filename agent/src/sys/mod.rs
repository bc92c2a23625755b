//! System calls that no crate wraps: making processes, the mount API by file
//! descriptors, capabilities, terminals, the kernel's random pool.
//!
//! All of the agent's unsafe code is here. What leaves is safe to call with
//! any arguments; a wrong one is an error of the kernel's.
#![expect(unsafe_code, reason = "system calls that neither std nor nix wrap")]

mod bpf;
mod clone;
mod identity;
mod machine;
mod mount;
mod schedule;
mod socket;
mod terminal;

pub(crate) use bpf::attach_device_program;
pub(crate) use clone::{
    CloneFlags, Forked, be_first_process, clone_sibling, clone3, kill, pidfd_open,
    pidfd_send_signal, wait_any,
};
pub(crate) use identity::{
    capset, drop_bounding, forbid_inspection, inspectable, install_seccomp, keep_capabilities,
    last_capability, no_new_privileges, permitted, raise_ambient,
};
pub(crate) use machine::{
    MAX_ENTROPY, add_entropy, boottime_ns, ignore_broken_pipes, reset_signals, set_domain_name,
};
pub(crate) use mount::{FsContext, MountAttr, id_map, mount_setattr, move_mount, open_tree};
pub(crate) use schedule::{
    SchedulerAttributes, join_new_keyring, set_affinity, set_io_priority, set_memory_policy,
    set_personality, set_scheduler,
};
pub(crate) use socket::{
    accept, arrange, arranged, become_stdio, exit_now, is_open, loopback_up, receive, splice,
    wait_for_peer, watch,
};
pub(crate) use terminal::{open_peer, set_controlling, set_size, terminal_number, unlock};

use std::io;

/// The value of a system call that returned `value`, or its error.
fn checked(value: libc::c_long) -> io::Result<libc::c_long> {
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}
