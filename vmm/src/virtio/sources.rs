//! The descriptors a running device listens to beside its queues.

use std::{io, os::fd::AsRawFd, sync::Arc};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// What a descriptor is ready for.
pub type Events = EventSet;

/// The tokens from here on belong to the worker.
pub(crate) const FIRST_WORKER_TOKEN: u64 = 1 << 63;

/// A set of descriptors, each under a token of the device's choice below 2^63.
/// Level-triggered. Closing a descriptor also removes it.
pub struct Sources {
    epoll: Arc<Epoll>,
}

impl Sources {
    /// Listens with `epoll`, whose other tokens are from 2^63 on.
    pub fn new(epoll: Arc<Epoll>) -> Self {
        Self { epoll }
    }

    /// Listens to `fd` for `events`; the device is called with `token`.
    ///
    /// # Errors
    /// When the kernel refuses, for example because the descriptor is in the set already.
    pub fn add(&self, fd: &impl AsRawFd, events: Events, token: u64) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, events, token)
    }

    /// Changes what `fd` is listened to for.
    ///
    /// # Errors
    /// When the descriptor is not in the set.
    pub fn modify(&self, fd: &impl AsRawFd, events: Events, token: u64) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, events, token)
    }

    /// Stops listening to `fd`.
    ///
    /// # Errors
    /// When the descriptor is not in the set.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, EventSet::empty(), 0)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: &impl AsRawFd,
        events: Events,
        token: u64,
    ) -> io::Result<()> {
        debug_assert!(
            token < FIRST_WORKER_TOKEN,
            "the high half belongs to the worker"
        );
        self.epoll
            .ctl(operation, fd.as_raw_fd(), EpollEvent::new(events, token))
    }
}
