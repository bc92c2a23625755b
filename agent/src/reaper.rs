//! The ends of processes: of ours, whose status is kept for who waits, and of
//! the orphans that process 1 inherits.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use crate::{guest, sys};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, 128 + n when signal n ended it.
    pub status: u32,
    /// When, in nanoseconds since the epoch.
    pub at_ns: u64,
}

/// Collects every child that ends.
#[derive(Debug)]
pub struct Reaper {
    signals: AsyncFd<OwnedFd>,
    watched: Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>,
}

impl Reaper {
    /// Starts to hold back SIGCHLD, so that [`Self::run`] sees every one.
    ///
    /// # Errors
    /// When the signal cannot be turned into a descriptor.
    pub fn new() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = OwnedFd::from(SignalFd::with_flags(&mask, flags)?);
        Ok(Self {
            signals: sys::watch(signals, Interest::READABLE)?,
            watched: Mutex::default(),
        })
    }

    /// Where the end of the child `pid` will be told. To be asked for before the first await
    /// after the child was made, so that it cannot have been collected yet.
    pub fn watch(&self, pid: i32) -> watch::Receiver<Option<Exit>> {
        let (sender, receiver) = watch::channel(None);
        self.lock().insert(pid, sender);
        receiver
    }

    /// Collects children for ever.
    ///
    /// # Errors
    /// When the signals can no longer be read, which nothing is known to cause.
    pub async fn run(self: Arc<Self>) -> io::Result<()> {
        loop {
            self.signals
                .async_io(Interest::READABLE, |fd| {
                    let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
                    Ok(nix::unistd::read(fd, &mut signal)?)
                })
                .await?;
            self.collect();
        }
    }

    /// Collects all children that have ended: one signal may stand for many.
    fn collect(&self) {
        while let Some((pid, status)) = sys::wait_any() {
            if let Some(watcher) = self.lock().remove(&pid) {
                let at_ns = guest::now_ns();
                // Nobody waiting is no harm: the status is kept for who comes later.
                watcher.send_replace(Some(Exit { status, at_ns }));
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, watch::Sender<Option<Exit>>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
