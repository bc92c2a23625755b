//! Vectored I/O between a stream socket and guest memory.
#![expect(
    unsafe_code,
    reason = "recvmsg and sendmsg on guest memory, which no Rust slice may name"
)]

use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
};

use vm_memory::VolatileSlice;

/// The most pieces of memory in one call; what lies beyond is left for the next call.
pub(super) const MAX_PIECES: usize = 64;

/// Receives into `room`; 0 bytes mean the end of the stream, unless `room` is empty.
pub(super) fn receive(socket: &UnixStream, room: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut pieces = [EMPTY; MAX_PIECES];
    transfer(fill(&mut pieces, room), |message| {
        // SAFETY: the message names only memory of `room`, which is mapped and writable while
        // `room` is borrowed and is not seen by references of Rust; it names no other buffer.
        unsafe { libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT) }
    })
}

/// Looks at the bytes that come next without taking them.
pub(super) fn peek(socket: &UnixStream, room: &mut [u8]) -> io::Result<usize> {
    let room = [VolatileSlice::from(room)];
    let mut pieces = [EMPTY; 1];
    transfer(fill(&mut pieces, &room), |message| {
        let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
        // SAFETY: the message names only memory of `room`, which is borrowed mutably.
        unsafe { libc::recvmsg(socket.as_raw_fd(), message, flags) }
    })
}

/// Sends the bytes of `data`, as many as the socket takes now.
pub(super) fn send(socket: &UnixStream, data: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut pieces = [EMPTY; MAX_PIECES];
    send_pieces(socket, fill(&mut pieces, data))
}

/// Sends `bytes`, as many as the socket takes now.
pub(super) fn send_bytes(socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    let mut piece = [libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }];
    send_pieces(socket, &mut piece)
}

const EMPTY: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

fn fill<'p>(pieces: &'p mut [libc::iovec], slices: &[VolatileSlice<'_>]) -> &'p mut [libc::iovec] {
    let count = pieces.len().min(slices.len());
    for (piece, slice) in pieces.iter_mut().zip(slices) {
        // The guard of a plain mapping guards nothing: the pointer stays good after it.
        piece.iov_base = slice.ptr_guard_mut().as_ptr().cast();
        piece.iov_len = slice.len();
    }
    &mut pieces[..count]
}

/// `pieces` must name memory that is readable for as long as the call lasts.
fn send_pieces(socket: &UnixStream, pieces: &mut [libc::iovec]) -> io::Result<usize> {
    transfer(pieces, |message| {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: both callers in this module name memory that they borrow; the kernel only
        // reads it, and the message names no other buffer.
        unsafe { libc::sendmsg(socket.as_raw_fd(), message, flags) }
    })
}

fn transfer(
    pieces: &mut [libc::iovec],
    call: impl Fn(&mut libc::msghdr) -> isize,
) -> io::Result<usize> {
    // SAFETY: a msghdr is integers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    loop {
        let count = call(&mut message);
        if let Ok(count) = usize::try_from(count) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
