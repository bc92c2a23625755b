//! What a process may do: capabilities, seccomp, no_new_privs, its descriptors.

use std::{io, sync::OnceLock};

use super::checked;

fn prctl(option: libc::c_int, argument: u64, second: u64) -> io::Result<libc::c_int> {
    // SAFETY: every option that this module passes takes numbers only.
    let answer = unsafe { libc::prctl(option, argument, second, 0, 0) };
    checked(answer.into()).map(|value| value as libc::c_int)
}

/// Removes `capability` from the bounding set.
pub(crate) fn drop_bounding(capability: u8) -> io::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, capability.into(), 0).map(drop)
}

/// The highest capability this kernel knows, found once.
pub(crate) fn last_capability() -> u8 {
    static LAST: OnceLock<u8> = OnceLock::new();
    *LAST.get_or_init(|| {
        let known = |number: &u64| prctl(libc::PR_CAPBSET_READ, *number, 0).is_ok();
        (0..64).take_while(known).last().unwrap_or(0) as u8
    })
}

/// Keeps the permitted capabilities through a change of the user.
pub(crate) fn keep_capabilities() -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, 1, 0).map(drop)
}

/// Makes `capability` ambient.
pub(crate) fn raise_ambient(capability: u8) -> io::Result<()> {
    prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_RAISE as u64,
        capability.into(),
    )
    .map(drop)
}

/// No execve of this process or its children gains privileges from now on.
pub(crate) fn no_new_privileges() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).map(drop)
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// Version 3, of this thread: capabilities of 64 bits in two groups of 32.
const HEADER: Header = Header {
    version: 0x2008_0522,
    pid: 0,
};

/// The permitted capabilities of this thread.
pub(crate) fn permitted() -> io::Result<u64> {
    let mut header = HEADER;
    let mut data = [0_u32; 6];
    // SAFETY: version 3 reads and may write one header, and writes two groups of three u32.
    checked(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    Ok(u64::from(data[1]) | u64::from(data[4]) << 32)
}

/// No other process may trace this one or look into it, until it executes a program.
pub(crate) fn forbid_inspection() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0, 0).map(drop)
}

/// Calls `act` while this process's own files in /proc are its user's, which root of a user
/// namespace needs to write them.
pub(crate) fn inspectable<T>(act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    prctl(libc::PR_SET_DUMPABLE, 1, 0)?;
    let answer = act();
    forbid_inspection()?;
    answer
}

/// Sets the effective, permitted and inheritable capabilities of this thread.
pub(crate) fn capset(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let mut header = HEADER;
    let data = [
        effective as u32,
        permitted as u32,
        inheritable as u32,
        (effective >> 32) as u32,
        (permitted >> 32) as u32,
        (inheritable >> 32) as u32,
    ];
    // SAFETY: version 3 reads and may write one header, and reads two groups of three u32.
    checked(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) }).map(drop)
}

/// Installs the BPF program `filter` on this thread, with seccomp(2)'s `flags`.
pub(crate) fn install_seccomp(filter: &[libc::sock_filter], flags: u64) -> io::Result<()> {
    let length = u16::try_from(filter.len())
        .map_err(|_| io::Error::other("the seccomp program is too long"))?;
    let program = libc::sock_fprog {
        len: length,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program's pointer and length describe `filter`, which the kernel only reads.
    checked(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })
    .map(drop)
}
