//! Sockets that see an interface's frames.
#![expect(
    unsafe_code,
    reason = "packet sockets and their filters have no safe wrapper"
)]

use std::{
    ffi::c_int,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use netlink::Instruction;

/// A socket that receives the frames of the interface `index` that `program` wants, in the
/// calling thread's namespace, and sends frames there, each with `mark`.
///
/// It is one for both: the end of each such socket waits until no processor of the host can see
/// it any more, which is 10 ms and more.
///
/// # Errors
/// When the caller may not, or the kernel refuses.
pub(super) fn frames(index: u32, program: &[Instruction], mark: u32) -> io::Result<OwnedFd> {
    let socket = packet_socket()?;
    let mut instructions: Vec<_> = program
        .iter()
        .map(|instruction| libc::sock_filter {
            code: instruction.code,
            jt: instruction.yes,
            jf: instruction.no,
            k: instruction.value,
        })
        .collect();
    let filter = libc::sock_fprog {
        len: instructions.len() as u16,
        filter: instructions.as_mut_ptr(),
    };
    set(&socket, libc::SO_ATTACH_FILTER, &filter)?;
    set(&socket, libc::SO_MARK, &mark)?;
    bind(&socket, index, libc::ETH_P_ALL as u16)?;
    Ok(socket)
}

fn packet_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes numbers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set<T>(socket: &OwnedFd, option: c_int, value: &T) -> io::Result<()> {
    // SAFETY: the options used here read a value of the type that they are given, and the
    // instructions that a filter points to live in the caller.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })
}

fn bind(socket: &OwnedFd, index: u32, protocol: u16) -> io::Result<()> {
    // SAFETY: an address of the packet family is numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index as c_int;
    // SAFETY: the call reads one address of the length that it is given.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
