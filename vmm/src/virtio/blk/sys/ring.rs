//! Requests to the host that are under way at the same time: a ring of io_uring.
//!
//! The ring is made before the jail is shut and then restricted for good: it
//! can read and write its one registered file and nothing else.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

use io_uring::{IoUring, opcode, register::Restriction, squeue, types};
use vm_memory::VolatileSlice;

use super::{consume, is_empty, vectors};
use crate::virtio::Memory;

/// The place of the one file among the registered ones.
const DISK: types::Fixed = types::Fixed(0);

/// What the host is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Operation {
    /// Fill buffers from an offset on.
    Read(u64),
    /// Write buffers from an offset on.
    Write(u64),
}

/// A ring, whose requests each carry a `T` of the caller's.
pub(in super::super) struct Ring<T> {
    ring: IoUring,
    file: File,
    /// Requests under way, by their numbers in the ring.
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
    waiting: usize,
}

struct Slot<T> {
    carried: T,
    operation: Operation,
    vectors: Vec<libc::iovec>,
    /// What the vectors point into.
    _memory: Memory,
}

// SAFETY: the pointers in `vectors` are into `_memory`, which may be used from any thread.
unsafe impl<T: Send> Send for Slot<T> {}

impl<T> Ring<T> {
    /// A ring for at most `size` requests at a time.
    ///
    /// # Errors
    /// When the kernel has no io_uring, does not let the process use it, or cannot restrict it.
    pub(in super::super) fn new(file: File, size: u16) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(u32::from(size))?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        let fixed = squeue::Flags::FIXED_FILE.bits();
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_flags_allowed(fixed),
            Restriction::sqe_flags_required(fixed),
        ])?;
        submitter.register_enable_rings()?;
        if !ring.params().is_feature_submit_stable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            file,
            slots: (0..size).map(|_| None).collect(),
            free: (0..usize::from(size)).collect(),
            waiting: 0,
        })
    }

    /// Whether nothing is under way.
    pub(in super::super) fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// How many more can be put under way.
    pub(in super::super) fn room(&self) -> usize {
        self.free.len()
    }

    /// Makes a request ready for [`Ring::submit`]; gives `carried` back when the ring is full.
    pub(in super::super) fn prepare(
        &mut self,
        memory: &Memory,
        operation: Operation,
        buffers: &[VolatileSlice<'_>],
        carried: T,
    ) -> Result<(), T> {
        let Some(number) = self.free.pop() else {
            return Err(carried);
        };
        let slot = self.slots[number].insert(Slot {
            carried,
            operation,
            vectors: vectors(buffers),
            _memory: memory.clone(),
        });
        let len = slot.vectors.len() as u32;
        let at = slot.vectors.as_ptr();
        let entry = match operation {
            Operation::Read(offset) => opcode::Readv::new(DISK, at, len).offset(offset).build(),
            Operation::Write(offset) => opcode::Writev::new(DISK, at, len).offset(offset).build(),
        };
        // SAFETY: the vectors and the memory that they point into are in the slot until the
        // kernel has given the request back: slots are emptied in `next` only, and when the ring
        // is dropped the kernel is waited for. `vectors` keeps its address when the slot moves.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(number as u64)) };
        match (pushed, &mut self.slots[number]) {
            (Ok(()), _) => {
                self.waiting += 1;
                Ok(())
            }
            (Err(_), slot) => {
                self.free.push(number);
                match slot.take() {
                    Some(slot) => Err(slot.carried),
                    None => Ok(()),
                }
            }
        }
    }

    /// Hands everything prepared to the kernel.
    ///
    /// # Errors
    /// When the kernel does not take it; what was prepared stays so.
    pub(in super::super) fn submit(&mut self) -> io::Result<()> {
        while self.waiting > 0 {
            match self.ring.submit() {
                Ok(taken) => self.waiting = self.waiting.saturating_sub(taken.max(1)),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next request that is done, if there is one.
    pub(in super::super) fn next(&mut self) -> Option<(T, io::Result<()>)> {
        let done = self.ring.completion().next()?;
        let number = done.user_data() as usize;
        let mut slot = self.slots.get_mut(number)?.take()?;
        self.free.push(number);
        let result = match usize::try_from(done.result()) {
            Ok(len) => finish(&self.file, &mut slot, len),
            Err(_) => Err(io::Error::from_raw_os_error(-done.result())),
        };
        Some((slot.carried, result))
    }

    /// Waits until nothing is under way, and forgets it.
    pub(in super::super) fn drain(&mut self) {
        while !self.is_idle() {
            if self.next().is_none() {
                let _ = self.ring.submit_and_wait(1);
            }
        }
        self.waiting = 0;
    }
}

impl<T> AsRawFd for Ring<T> {
    /// Ready for reading when a request is done.
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        self.drain();
    }
}

/// The kernel may do less than asked: the rest is done here and now.
fn finish<T>(file: &File, slot: &mut Slot<T>, len: usize) -> io::Result<()> {
    consume(&mut slot.vectors, len);
    if is_empty(&slot.vectors) {
        return Ok(());
    }
    let rest = len as u64;
    match slot.operation {
        Operation::Read(offset) => super::read_vectors(file, &mut slot.vectors, offset + rest),
        Operation::Write(offset) => super::write_vectors(file, &mut slot.vectors, offset + rest),
    }
}
