//! A pod's network namespace.
//!
//! A thread is in one network namespace, so whatever must be made in the pod's
//! is made by a thread that lives for that alone. A netlink socket, once made,
//! stays in its namespace.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread,
};

use netlink::{Change, Socket};
use nix::sched::{CloneFlags, setns, unshare};

/// A pod's network namespace, which lives at least as long as this.
#[derive(Debug, Clone)]
pub struct Namespace {
    fd: Arc<OwnedFd>,
    kernel: Arc<Socket>,
}

impl Namespace {
    /// The namespace that `fd`, a descriptor of an `nsfs` file, stands for.
    ///
    /// # Errors
    /// When it stands for no network namespace, or the caller may not enter it.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        let kernel = on_a_thread(|| {
            setns(&fd, CloneFlags::CLONE_NEWNET)?;
            Socket::open()
        })?;
        Ok(Self {
            fd: fd.into(),
            kernel: kernel.into(),
        })
    }

    /// A namespace with nothing but a loopback.
    ///
    /// # Errors
    /// When the caller may not make one.
    pub fn fresh() -> io::Result<Self> {
        let (fd, kernel) = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let fd = File::open("/proc/thread-self/ns/net")?;
            Ok((fd.into(), Socket::open()?))
        })?;
        let this = Self {
            fd: Arc::new(fd),
            kernel: kernel.into(),
        };
        this.loopback_up()?;
        Ok(this)
    }

    /// Switches the loopback on, which whoever made the namespace may have left to us.
    ///
    /// # Errors
    /// The kernel's.
    pub fn loopback_up(&self) -> io::Result<()> {
        let up = Change {
            up: Some(true),
            ..Change::default()
        };
        let links = self.kernel.links()?;
        let down = |link: &&netlink::Link| link.flags.is_loopback() && !link.flags.is_up();
        match links.iter().find(down) {
            Some(link) => self.kernel.change_link(link.index, &up),
            None => Ok(()),
        }
    }

    /// Does `work` in the namespace, on a thread of its own.
    ///
    /// # Errors
    /// The work's, or when the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_a_thread(|| {
            setns(&*self.fd, CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }

    /// Its network settings.
    pub(super) fn kernel(&self) -> &Arc<Socket> {
        &self.kernel
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".to_owned())
            .stack_size(64 << 10)
            .spawn_scoped(scope, work)?;
        let panicked = |_| Err(io::Error::other("the thread in the namespace panicked"));
        thread.join().unwrap_or_else(panicked)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(Namespace::open(file.into()).is_err());
    }
}
