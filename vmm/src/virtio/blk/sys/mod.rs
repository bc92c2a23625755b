#![expect(
    unsafe_code,
    reason = "reading and writing a file straight to and from guest memory, by call or by io_uring"
)]
//! Vectored file I/O on guest memory, which no slice of Rust may stand for.

use std::{fs::File, io, os::fd::AsRawFd};

use vm_memory::VolatileSlice;

pub(super) mod ring;

/// As many buffers as the kernel takes at once.
const MAX_BUFFERS: usize = libc::UIO_MAXIOV as usize;

/// Fills all of `buffers` from `offset` on.
pub(super) fn read_at(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    read_vectors(file, &mut vectors(buffers), offset)
}

/// Writes all of `buffers` from `offset` on.
pub(super) fn write_at(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    write_vectors(file, &mut vectors(buffers), offset)
}

/// Buffers as the kernel takes them. Good for as long as `buffers` is.
fn vectors(buffers: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    buffers
        .iter()
        .map(|buffer| libc::iovec {
            iov_base: buffer.ptr_guard_mut().as_ptr().cast(),
            iov_len: buffer.len(),
        })
        .collect()
}

fn read_vectors(file: &File, vectors: &mut [libc::iovec], offset: u64) -> io::Result<()> {
    transfer(vectors, offset, |vectors, offset| {
        let count = vectors.len() as i32;
        // SAFETY: each vector is guest memory that the caller borrows; the kernel writes to it
        // as the guest itself may at any time.
        unsafe { libc::preadv64(file.as_raw_fd(), vectors.as_ptr(), count, offset) }
    })
}

fn write_vectors(file: &File, vectors: &mut [libc::iovec], offset: u64) -> io::Result<()> {
    transfer(vectors, offset, |vectors, offset| {
        let count = vectors.len() as i32;
        // SAFETY: each vector is guest memory that the caller borrows; the kernel only reads it.
        unsafe { libc::pwritev64(file.as_raw_fd(), vectors.as_ptr(), count, offset) }
    })
}

fn transfer(
    vectors: &mut [libc::iovec],
    offset: u64,
    call: impl Fn(&[libc::iovec], i64) -> isize,
) -> io::Result<()> {
    let mut first = 0;
    let mut offset =
        i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    loop {
        first += skip_empty(&vectors[first..]);
        if first == vectors.len() {
            return Ok(());
        }
        let last = vectors.len().min(first + MAX_BUFFERS);
        match call(&vectors[first..last], offset) {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            done @ 1.. => {
                offset += done as i64;
                consume(&mut vectors[first..], done as usize);
            }
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn is_empty(vectors: &[libc::iovec]) -> bool {
    skip_empty(vectors) == vectors.len()
}

fn skip_empty(vectors: &[libc::iovec]) -> usize {
    vectors
        .iter()
        .take_while(|vector| vector.iov_len == 0)
        .count()
}

/// Takes `done` bytes away from the front.
fn consume(vectors: &mut [libc::iovec], mut done: usize) {
    for vector in vectors {
        let here = done.min(vector.iov_len);
        vector.iov_base = vector.iov_base.wrapping_byte_add(here);
        vector.iov_len -= here;
        done -= here;
        if done == 0 {
            return;
        }
    }
}
