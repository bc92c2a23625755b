#![expect(
    unsafe_code,
    reason = "reading and writing a file straight from and to guest memory"
)]
//! Vectored file I/O on guest memory, which no slice of Rust may stand for.

use std::{fs::File, io, os::fd::AsRawFd};

use vm_memory::VolatileSlice;

/// As many buffers as the kernel takes at once.
const MAX_BUFFERS: usize = libc::UIO_MAXIOV as usize;

/// Fills all of `buffers` from `offset` on.
pub(super) fn read_at(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    transfer(buffers, offset, |vectors, offset| {
        // SAFETY: each vector is guest memory that `buffers` borrows; the kernel writes to it
        // as the guest itself may at any time.
        unsafe {
            libc::preadv64(
                file.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as i32,
                offset,
            )
        }
    })
}

/// Writes all of `buffers` from `offset` on.
pub(super) fn write_at(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    transfer(buffers, offset, |vectors, offset| {
        // SAFETY: each vector is guest memory that `buffers` borrows; the kernel only reads it.
        unsafe {
            libc::pwritev64(
                file.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as i32,
                offset,
            )
        }
    })
}

fn transfer(
    buffers: &[VolatileSlice<'_>],
    offset: u64,
    call: impl Fn(&[libc::iovec], i64) -> isize,
) -> io::Result<()> {
    let mut vectors: Vec<libc::iovec> = buffers
        .iter()
        .map(|buffer| libc::iovec {
            iov_base: buffer.ptr_guard_mut().as_ptr().cast(),
            iov_len: buffer.len(),
        })
        .collect();
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
