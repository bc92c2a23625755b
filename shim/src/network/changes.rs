//! That the settings of a pod's network namespace have changed.
//!
//! Who makes an interface does it in many steps, each of which the kernel announces: so it is told
//! when no more have come for a moment. However many come, what waits is bounded, and they are told
//! as one.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use netlink::Heard;
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, sleep},
};

use super::Namespace;
use crate::sys::watch_readable;

/// How long nothing more may have come.
const QUIET: Duration = Duration::from_millis(100);

/// How long it is waited for that.
const LONGEST: Duration = Duration::from_secs(1);

/// Announcements of a namespace's changes. It is held by this.
#[derive(Debug)]
pub struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    /// Listens, in the calling runtime.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let socket = namespace.run(netlink::listen)?;
        Ok(Self(watch_readable(socket)?))
    }

    /// Waits until something has changed and then been left alone for a moment, or has kept changing
    /// for longer than that.
    ///
    /// # Errors
    /// When no more can be heard.
    pub async fn settled(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let heard = self.take()?;
            if heard != Heard::Some {
                ready.clear_ready();
            }
            if heard != Heard::Nothing {
                break;
            }
        }
        let end = Instant::now() + LONGEST;
        loop {
            sleep(QUIET).await;
            let quiet = self.take()? == Heard::Nothing;
            if quiet || Instant::now() >= end {
                return Ok(());
            }
        }
    }

    fn take(&self) -> io::Result<Heard> {
        Heard::take(self.0.get_ref().as_fd())
    }
}
