//! Packets moved by the host's kernel: vhost-net (linux/vhost.h).
//!
//! The kernel is told where the guest's memory and rings are, takes the kicks
//! and interrupts the guest by itself. It acts with this process's memory and
//! the tap it is given, nothing else.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    sys::vhost::{self, Region, VringAddress},
    tap::Tap,
};
use crate::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Memory, queue::Ring};

/// Why a descriptor cannot move packets.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is something else, or another process has it.
    #[error("it is no /dev/vhost-net of this process's own: open it anew for each queue")]
    NotVhost(#[source] io::Error),
    /// The kernel is too old.
    #[error("the host's vhost-net lacks features {0:#x}; leave vhost away")]
    Features(u64),
    /// The kernel refuses a descriptor.
    #[error("cannot make an eventfd for vhost-net")]
    Event(#[source] io::Error),
    /// More or fewer than there are queues.
    #[error("there are {vhost} vhost descriptors for {taps} queues: pass one for each, or none")]
    Count {
        /// Descriptors of vhost-net.
        vhost: usize,
        /// Queues of the tap.
        taps: usize,
    },
    /// The kernel knows no limits.
    #[error(
        "to_guest and from_guest cannot be limited when vhost moves the packets: leave vhost away"
    )]
    Limits,
}

/// The host's kernel for one pair of queues.
pub struct Vhost {
    file: File,
    features: u64,
    /// Signalled when the kernel gives up on the guest's rings.
    failed: EventFd,
}

/// One ring of the guest and who is told of it.
pub(super) struct Queue {
    pub(super) ring: Ring,
    pub(super) kick: Arc<EventFd>,
}

/// What the rings need.
const NEEDED: u64 = super::features::MRG_RXBUF | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;

impl Vhost {
    /// Takes an open `/dev/vhost-net` into this process's service.
    ///
    /// # Errors
    /// When it is something else or lacks what is needed.
    pub fn new(fd: OwnedFd) -> Result<Self, Error> {
        let file = File::from(fd);
        let features = vhost::features(&file).map_err(Error::NotVhost)?;
        vhost::set_owner(&file).map_err(Error::NotVhost)?;
        if features & NEEDED != NEEDED {
            return Err(Error::Features(NEEDED & !features));
        }
        Ok(Self {
            file,
            features,
            failed: EventFd::new(EFD_NONBLOCK).map_err(Error::Event)?,
        })
    }

    /// Tells the kernel of the guest's memory and of both rings, and lets it begin.
    pub(super) fn start(
        &self,
        memory: &Memory,
        agreed: u64,
        queues: &[Queue; 2],
        tap: &Tap,
    ) -> io::Result<()> {
        vhost::set_features(&self.file, agreed & self.features & NEEDED)?;
        vhost::set_memory(&self.file, &Region::all(memory))?;
        for (index, Queue { ring, kick }) in (0..).zip(queues) {
            vhost::set_size(&self.file, index, ring.size)?;
            vhost::set_base(&self.file, index, ring.next)?;
            let address = VringAddress::of(memory, ring).ok_or(io::ErrorKind::InvalidInput)?;
            vhost::set_address(&self.file, index, address)?;
            vhost::set_kick(&self.file, index, kick)?;
            vhost::set_call(&self.file, index, &ring.interrupt)?;
            vhost::set_error(&self.file, index, &self.failed)?;
        }
        self.run(tap)
    }

    /// Lets the kernel move packets between the rings it was told of and `tap`.
    pub(super) fn run(&self, tap: &Tap) -> io::Result<()> {
        (0..2).try_for_each(|index| vhost::set_backend(&self.file, index, Some(tap.file())))
    }

    /// Stops it; when this returns it touches the guest's memory no more.
    pub(super) fn stop(&self) {
        for index in 0..2 {
            // It fails only when it never began.
            let _ = vhost::set_backend(&self.file, index, None);
        }
    }
}

/// The eventfd that tells of the kernel's giving up.
impl AsRawFd for Vhost {
    fn as_raw_fd(&self) -> RawFd {
        self.failed.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_vhost_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Vhost::new(file.into()), Err(Error::NotVhost(_))));
    }
}
