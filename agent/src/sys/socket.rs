//! Moving bytes and descriptors.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::{Interest, unix::AsyncFd};

use super::checked;

/// Moves up to `length` bytes from `from` to `to`, one of them a pipe, without waiting.
pub(crate) fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
    // SAFETY: null offsets are allowed and no other memory is passed.
    let moved = unsafe {
        libc::splice(
            from.as_raw_fd(),
            std::ptr::null_mut(),
            to.as_raw_fd(),
            std::ptr::null_mut(),
            length,
            libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK,
        )
    };
    checked(moved as libc::c_long).map(|moved| moved as usize)
}

/// Makes `fds`, in order, the descriptors 0, 1, 2 and so on, and closes every other one. The
/// first three stay open across execve.
///
/// Only for a process just forked off to be executed: owners of descriptors that it inherited
/// must be neither used nor dropped after this.
pub(crate) fn arrange(fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    // First out of the way, so that no number is overwritten before it is read.
    let away = fds
        .iter()
        .map(|fd| {
            // SAFETY: the call takes no memory.
            let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100) };
            checked(copy.into()).map(|copy| copy as RawFd)
        })
        .collect::<io::Result<Vec<_>>>()?;
    for (number, copy) in (0..).zip(&away) {
        let flags = if number < 3 { 0 } else { libc::O_CLOEXEC };
        // SAFETY: the call takes no memory; what `number` was is given up by the contract above.
        let answer = unsafe { libc::dup3(*copy, number, flags) };
        checked(answer.into())?;
    }
    // SAFETY: the call takes no memory; what it closes is given up by the contract above.
    let answer = unsafe { libc::syscall(libc::SYS_close_range, fds.len(), u32::MAX, 0) };
    checked(answer).map(drop)
}

/// Makes `fd` the standard input, output and error, open across execve.
pub(crate) fn become_stdio(fd: BorrowedFd<'_>) -> io::Result<()> {
    for number in 0..3 {
        // SAFETY: the call takes no memory; 0 to 2 are nobody's `OwnedFd`.
        let answer = unsafe { libc::dup2(fd.as_raw_fd(), number) };
        checked(answer.into())?;
    }
    Ok(())
}

/// A descriptor by its number, in a process that [`arrange`]d its own.
pub(crate) fn arranged(number: RawFd) -> BorrowedFd<'static> {
    debug_assert!(is_open(number));
    // SAFETY: only -1 is no valid value. The numbers of `arrange` stay open until execve; another
    // number would be an error of the calls it is used in.
    unsafe { BorrowedFd::borrow_raw(number.max(0)) }
}

/// Whether the descriptor number `number` is open.
pub(crate) fn is_open(number: RawFd) -> bool {
    // SAFETY: the call takes no memory.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// Ends this process at once: no destructor, no exit handler of the parent's copy runs.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: the call ends the process.
    unsafe { libc::_exit(status) }
}

/// Has the runtime watch `fd` for `interest`.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor from here to its drop, which is `AsyncFd`'s.
    let watched = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(watched?)
}

/// Accepts a connection, which neither waits nor outlives an execve.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: null for the peer's address is allowed and no other memory is passed.
    let fd = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            flags,
        )
    };
    let fd = checked(fd.into())?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Has a vsock socket wait that long for its peer to answer a connection, rather than 2 seconds.
pub(crate) fn wait_for_peer(socket: BorrowedFd<'_>, time: Duration) -> io::Result<()> {
    // SO_VM_SOCKETS_CONNECT_TIMEOUT of linux/vm_sockets.h, with the old kind of time.
    const CONNECT_TIMEOUT: libc::c_int = 6;
    let time = libc::timeval {
        tv_sec: time.as_secs().cast_signed(),
        tv_usec: time.subsec_micros().into(),
    };
    // SAFETY: the kernel reads as many bytes as a timeval has from the address of one.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            CONNECT_TIMEOUT,
            (&raw const time).cast(),
            size_of_val(&time) as libc::socklen_t,
        )
    };
    checked(answer.into()).map(drop)
}

/// Receives one packet, with one descriptor if it carries one; without waiting when the socket
/// does not wait.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let received = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel made this descriptor for this call; the buffer holds one, so there is
    // no other that would leak.
    let received = received.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((message.bytes, received))
}

/// Brings the loopback interface of this network namespace up.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut name = [0; libc::IFNAMSIZ];
    name[0] = b'l' as libc::c_char;
    name[1] = b'o' as libc::c_char;
    let request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short,
        },
    };
    // SAFETY: the ioctl reads one ifreq, whose name ends with a zero.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    checked(answer.into()).map(drop)
}
