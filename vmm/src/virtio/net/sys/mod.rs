//! The ioctls of taps, and packets that lie in the guest's memory.
#![expect(
    unsafe_code,
    reason = "ioctls of taps, and vectored I/O on guest memory, which no slice of Rust may name"
)]

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    ptr,
};

use vm_memory::{GuestAddress, GuestMemory};

pub(crate) mod vhost;

use super::{header::HEADER_BYTES, tap::Attached};
use crate::virtio::Memory;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;

/// Every request that a card's thread makes of a tap, for the jail.
pub(crate) const REQUESTS: [u32; 4] = [
    TUNGETIFF as u32,
    TUNSETOFFLOAD as u32,
    TUNSETVNETHDRSZ as u32,
    TUNSETQUEUE as u32,
];

/// `struct ifreq` as far as taps use it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

impl InterfaceRequest {
    fn new(name: &str, flags: u16) -> io::Result<Self> {
        let mut request = Self {
            name: [0; libc::IFNAMSIZ],
            flags,
            rest: [0; 22],
        };
        // a zero ends the name
        if name.len() >= libc::IFNAMSIZ || name.contains('\0') {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        Ok(request)
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|byte| *byte == 0);
        String::from_utf8_lossy(&self.name[..end.unwrap_or(libc::IFNAMSIZ)]).into_owned()
    }

    fn call(&mut self, fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<()> {
        // SAFETY: these requests read and write one `struct ifreq` of 40 bytes, which this is.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), request, ptr::from_mut(self)) })
    }
}

/// Makes or joins the tap device `name` and returns its name.
pub(super) fn attach(file: &File, name: &str, flags: u16) -> io::Result<String> {
    let mut request = InterfaceRequest::new(name, flags)?;
    request.call(file.as_fd(), TUNSETIFF)?;
    Ok(request.name())
}

/// The name and flags of the device that a descriptor is a queue of.
pub(super) fn interface(fd: &impl AsFd) -> io::Result<(String, u16)> {
    let mut request = InterfaceRequest::new("", 0)?;
    request.call(fd.as_fd(), TUNGETIFF)?;
    Ok((request.name(), request.flags))
}

/// Lets a queue take part or not; it is no error when it does so already.
pub(super) fn attach_queue(file: &File, to: Attached) -> io::Result<()> {
    let flags = match to {
        Attached::Yes => IFF_ATTACH_QUEUE,
        Attached::No => IFF_DETACH_QUEUE,
    };
    let done = InterfaceRequest::new("", flags)?.call(file.as_fd(), TUNSETQUEUE);
    match done {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        done => done,
    }
}

/// Says what the reader of the tap does for its sender (`TUN_F_*`).
pub(super) fn set_offload(file: &File, offloads: u32) -> io::Result<()> {
    // SAFETY: the request takes a number.
    check(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            TUNSETOFFLOAD,
            libc::c_ulong::from(offloads),
        )
    })
}

/// Sets the length of the header before each packet.
pub(super) fn set_header_len(file: &File, len: u32) -> io::Result<()> {
    let len = len as libc::c_int;
    // SAFETY: the request reads an int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, ptr::from_ref(&len)) })
}

/// The most pieces of memory in one packet, its header not counted.
pub(super) const MAX_PIECES: usize = libc::UIO_MAXIOV as usize - 1;

/// Pieces of the guest's memory, one behind the other, as the kernel takes them. They are kept
/// from call to call, so that nothing is allocated for a packet.
pub(super) struct Pieces {
    /// What the vectors point into lives as long as this.
    memory: Memory,
    /// The first is left free for a header.
    vectors: Vec<libc::iovec>,
    /// Where the pieces begin, at least 1.
    first: usize,
}

// SAFETY: the pointers are into memory that `memory` keeps mapped and that any thread may touch
// at any time, as the guest does; nothing here belongs to a thread.
unsafe impl Send for Pieces {}

/// A piece is not all in the guest's memory, or there are too many.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoPiece;

const EMPTY: libc::iovec = libc::iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
};

impl Pieces {
    /// None yet, of `memory`.
    pub(super) fn new(memory: Memory) -> Self {
        let mut vectors = Vec::with_capacity(2 * MAX_PIECES);
        vectors.push(EMPTY);
        Self {
            memory,
            vectors,
            first: 1,
        }
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.vectors.truncate(1);
        self.first = 1;
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.vectors.len() - self.first
    }

    /// Adds a piece, in as many parts as memory has, and tells how many.
    pub(super) fn add(&mut self, address: GuestAddress, len: usize) -> Result<usize, NoPiece> {
        let mut parts = 0;
        for part in self.memory.get_slices(address, len) {
            let part = part.map_err(|_| NoPiece)?;
            if part.is_empty() {
                continue;
            }
            if self.count() == MAX_PIECES {
                return Err(NoPiece);
            }
            self.vectors.push(libc::iovec {
                iov_base: part.ptr_guard_mut().as_ptr().cast(),
                iov_len: part.len(),
            });
            parts += 1;
        }
        Ok(parts)
    }

    /// Forgets the first `count`.
    pub(super) fn drop_front(&mut self, count: usize) {
        self.first += count.min(self.count());
        if self.first > MAX_PIECES {
            self.vectors.drain(1..self.first);
            self.first = 1;
        }
    }

    /// Forgets the last `count`.
    pub(super) fn drop_back(&mut self, count: usize) {
        let keep = self.vectors.len() - count.min(self.count());
        self.vectors.truncate(keep);
    }

    /// Reads one packet into the pieces and tells its length.
    pub(super) fn read_from(&self, tap: &File) -> io::Result<usize> {
        let pieces = &self.vectors[self.first..];
        // SAFETY: each vector names guest memory that `self.memory` keeps mapped; the kernel
        // writes to it as the guest itself may.
        let count = unsafe {
            libc::readv(
                tap.as_raw_fd(),
                pieces.as_ptr(),
                pieces.len() as libc::c_int,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one packet: `header` and all the pieces.
    pub(super) fn write_to(
        &mut self,
        tap: &File,
        header: &[u8; HEADER_BYTES],
    ) -> io::Result<usize> {
        debug_assert_eq!(
            self.first, 1,
            "nothing is dropped in front of a packet to be sent"
        );
        self.vectors[0] = libc::iovec {
            iov_base: header.as_ptr().cast_mut().cast(),
            iov_len: HEADER_BYTES,
        };
        // SAFETY: the first vector names the header, which is borrowed, the others guest memory
        // that `self.memory` keeps mapped; the kernel only reads.
        let count = unsafe {
            libc::writev(
                tap.as_raw_fd(),
                self.vectors.as_ptr(),
                self.vectors.len() as libc::c_int,
            )
        };
        self.vectors[0] = EMPTY;
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Copies `bytes` to where the pieces' byte `offset` is, as far as there is room.
    pub(super) fn copy_in(&self, mut offset: usize, mut bytes: &[u8]) {
        for piece in &self.vectors[self.first..] {
            if bytes.is_empty() {
                return;
            }
            if offset >= piece.iov_len {
                offset -= piece.iov_len;
                continue;
            }
            let count = bytes.len().min(piece.iov_len - offset);
            let to = piece.iov_base.cast::<u8>().wrapping_add(offset);
            // SAFETY: `to` and the `count` bytes behind it lie within the piece, which
            // `self.memory` keeps mapped; `bytes` is memory of ours, which guest memory is not.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, count) };
            bytes = &bytes[count..];
            offset = 0;
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
