//! Requests to the host that are under way at the same time: a ring of io_uring.
//!
//! The ring is made before the jail is shut and then restricted for good: it
//! can read and write its one registered file and nothing else.
//!
//! Requests that are made ready one after the other and go on where the one
//! before ends are one to the host: that is how a guest reads ahead.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

use io_uring::{IoUring, opcode, register::Restriction, squeue, types};
use vm_memory::VolatileSlice;

use super::{MAX_BUFFERS, consume, is_empty, vectors};
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

impl Operation {
    /// The same for what lies `bytes` behind.
    fn after(self, bytes: u64) -> Self {
        match self {
            Self::Read(offset) => Self::Read(offset + bytes),
            Self::Write(offset) => Self::Write(offset + bytes),
        }
    }
}

/// The most bytes that several requests together may have.
const MAX_JOINED_BYTES: u64 = 1 << 20;

/// A ring, whose requests each carry a `T` of the caller's.
pub(in super::super) struct Ring<T> {
    ring: IoUring,
    file: File,
    /// Requests under way, by their numbers in the ring.
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
    /// The one that was made ready last: the kernel has not seen it, it may still grow.
    open: Option<usize>,
    waiting: usize,
    /// Those that are done and not yet told of.
    done: VecDeque<(T, io::Result<()>)>,
}

/// One request to the host.
struct Slot<T> {
    operation: Operation,
    vectors: Vec<libc::iovec>,
    bytes: u64,
    /// The requests that it consists of.
    parts: Vec<Part<T>>,
    /// What the vectors point into.
    _memory: Memory,
}

/// A request of the caller's.
struct Part<T> {
    carried: T,
    /// How many of the vectors are its.
    vectors: usize,
}

impl<T> Slot<T> {
    /// Whether a request goes on where this one ends, and they are not too long together.
    fn takes(&self, operation: Operation, buffers: &[VolatileSlice<'_>], bytes: u64) -> bool {
        self.operation.after(self.bytes) == operation
            && self.bytes + bytes <= MAX_JOINED_BYTES
            && self.vectors.len() + buffers.len() <= MAX_BUFFERS
    }
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
            open: None,
            waiting: 0,
            done: VecDeque::new(),
        })
    }

    /// Whether nothing is under way.
    pub(in super::super) fn is_idle(&self) -> bool {
        self.under_way() == 0
    }

    /// How many are under way.
    pub(in super::super) fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
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
        let bytes = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        let part = Part {
            carried,
            vectors: buffers.len(),
        };
        let open = self.open.and_then(|number| self.slots[number].as_mut());
        if let Some(slot) = open.filter(|slot| slot.takes(operation, buffers, bytes)) {
            slot.vectors.extend(vectors(buffers));
            slot.bytes += bytes;
            slot.parts.push(part);
            return Ok(());
        }
        if self.close().is_err() {
            return Err(part.carried);
        }
        let Some(number) = self.free.pop() else {
            return Err(part.carried);
        };
        self.slots[number] = Some(Slot {
            operation,
            vectors: vectors(buffers),
            bytes,
            parts: vec![part],
            _memory: memory.clone(),
        });
        self.open = Some(number);
        Ok(())
    }

    /// Puts the request that may still grow into the ring.
    fn close(&mut self) -> io::Result<()> {
        let Some(number) = self.open else {
            return Ok(());
        };
        let Some(slot) = &self.slots[number] else {
            return Ok(());
        };
        let len = slot.vectors.len() as u32;
        let at = slot.vectors.as_ptr();
        let entry = match slot.operation {
            Operation::Read(offset) => opcode::Readv::new(DISK, at, len).offset(offset).build(),
            Operation::Write(offset) => opcode::Writev::new(DISK, at, len).offset(offset).build(),
        };
        // SAFETY: the vectors and the memory that they point into are in the slot until the
        // kernel has given the request back: slots are emptied in `next` only, and when the ring
        // is dropped the kernel is waited for. `vectors` keeps its address when the slot moves,
        // and nothing is added to it once it is not `open` any more.
        unsafe { self.ring.submission().push(&entry.user_data(number as u64)) }
            .map_err(io::Error::other)?;
        self.open = None;
        self.waiting += 1;
        Ok(())
    }

    /// Hands everything prepared to the kernel.
    ///
    /// # Errors
    /// When the kernel does not take it; what was prepared stays so.
    pub(in super::super) fn submit(&mut self) -> io::Result<()> {
        self.close()?;
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
        if self.done.is_empty() {
            let done = self.ring.completion().next()?;
            let number = done.user_data() as usize;
            let slot = self.slots.get_mut(number)?.take()?;
            self.free.push(number);
            let result = usize::try_from(done.result())
                .map_err(|_| io::Error::from_raw_os_error(-done.result()));
            finish(&self.file, slot, result, &mut self.done);
        }
        self.done.pop_front()
    }

    /// Waits until nothing is under way, and forgets it.
    pub(in super::super) fn drain(&mut self) {
        // What the ring has no room for yet is put there in a later turn.
        while !self.is_idle() {
            let _ = self.close();
            if self.next().is_none() {
                let _ = self.ring.submit_and_wait(1);
            }
        }
        self.waiting = 0;
        self.done.clear();
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

/// Tells of each part what became of it. The kernel may do less than asked: the rest is done here
/// and now. Of several parts that were not done together, each is done by itself, so that none
/// fails because of another.
fn finish<T>(
    file: &File,
    slot: Slot<T>,
    result: io::Result<usize>,
    done: &mut VecDeque<(T, io::Result<()>)>,
) {
    let Slot {
        mut operation,
        mut vectors,
        bytes,
        parts,
        ..
    } = slot;
    let finished = match (result, &parts[..]) {
        (Ok(len), _) if len as u64 == bytes => {
            done.extend(parts.into_iter().map(|part| (part.carried, Ok(()))));
            return;
        }
        (Err(error), [_]) => {
            let error = |part: Part<T>| (part.carried, Err(error));
            done.extend(parts.into_iter().next().map(error));
            return;
        }
        (Ok(len), [_]) => len,
        _ => 0,
    };
    consume(&mut vectors, finished);
    operation = operation.after(finished as u64);
    let mut vectors = &mut vectors[..];
    for part in parts {
        let (own, rest) = std::mem::take(&mut vectors).split_at_mut(part.vectors);
        let len: usize = own.iter().map(|vector| vector.iov_len).sum();
        let result = match operation {
            _ if is_empty(own) => Ok(()),
            Operation::Read(offset) => super::read_vectors(file, own, offset),
            Operation::Write(offset) => super::write_vectors(file, own, offset),
        };
        done.push_back((part.carried, result));
        operation = operation.after(len as u64);
        vectors = rest;
    }
}
