//! The host's side of a network card: one queue of a tap device. Knows nothing
//! of virtio's rings.
//!
//! Each packet is one `readv` or `writev`, straight to or from the guest's
//! memory, with a virtio header in front.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::{features, header::HEADER_BYTES, sys};
use crate::launch;

/// `TUN_F_*` of linux/if_tun.h: what the reader of a tap does for its sender.
const F_CSUM: u32 = 0x01;
const F_TSO4: u32 = 0x02;
const F_TSO6: u32 = 0x04;
const F_TSO_ECN: u32 = 0x08;
const F_USO4: u32 = 0x20;
const F_USO6: u32 = 0x40;

/// `IFF_*` of linux/if_tun.h.
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// What every tap of ours has.
const BASIC: u16 = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;

/// Why a descriptor cannot be a queue of a network card.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is something else.
    #[error("it is no tap device: open /dev/net/tun and attach it to an interface")]
    NotTap(#[source] io::Error),
    /// It is a tap of another kind.
    #[error("the tap {name} was not made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags {
        /// The interface.
        name: String,
    },
    /// Several descriptors, but not queues of one device.
    #[error("{name} and {other} are not queues of one tap made with IFF_MULTI_QUEUE")]
    Different {
        /// One interface.
        name: String,
        /// The other.
        other: String,
    },
    /// The kernel refuses to set it up.
    #[error("cannot set up the tap {name}")]
    SetUp {
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One queue of a tap device.
pub struct Tap {
    file: File,
    kind: Kind,
}

enum Kind {
    Tap {
        several: bool,
    },
    /// A socket whose messages are packets, which needs no setting up.
    Packets,
}

/// What a tap can do beyond checksums and TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// UDP packets to be segmented.
    pub udp_segments: bool,
}

impl Tap {
    /// The queues of one tap device, in their order. Only the first stays attached to it.
    ///
    /// # Errors
    /// When a descriptor is something else or they do not belong together.
    pub fn queues(fds: Vec<OwnedFd>) -> Result<(Vec<Self>, Abilities), Error> {
        let several = fds.len() > 1;
        let mut taps = Vec::new();
        let mut first: Option<String> = None;
        for fd in fds {
            let (tap, name) = Self::new(fd, several)?;
            let other = first.get_or_insert_with(|| name.clone());
            if *other != name {
                let other = other.clone();
                return Err(Error::Different { name, other });
            }
            taps.push(tap);
        }
        let probe = F_CSUM | F_TSO4 | F_TSO6 | F_USO4 | F_USO6;
        let udp_segments = taps
            .first()
            .is_some_and(|tap| sys::set_offload(&tap.file, probe).is_ok());
        Ok((taps, Abilities { udp_segments }))
    }

    fn new(fd: OwnedFd, several: bool) -> Result<(Self, String), Error> {
        let (name, flags) = sys::interface(&fd).map_err(Error::NotTap)?;
        if flags & BASIC != BASIC {
            return Err(Error::Flags { name });
        }
        if several && flags & IFF_MULTI_QUEUE == 0 {
            let other = name.clone();
            return Err(Error::Different { name, other });
        }
        let set_up = |source| Error::SetUp {
            name: name.clone(),
            source,
        };
        let file = File::from(fd);
        sys::set_header_len(&file, HEADER_BYTES as u32).map_err(set_up)?;
        set_nonblocking(&file).map_err(set_up)?;
        let kind = Kind::Tap { several };
        Ok((Self { file, kind }, name))
    }

    /// A socket whose messages are packets with a virtio header: a cable without a host.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn packets(socket: OwnedFd) -> io::Result<Self> {
        let file = File::from(socket);
        set_nonblocking(&file)?;
        let kind = Kind::Packets;
        Ok(Self { file, kind })
    }

    /// Lets the host send what a driver with `features` understands.
    pub(super) fn agree(&self, agreed: u64) -> io::Result<()> {
        match self.kind {
            Kind::Tap { .. } => sys::set_offload(&self.file, offloads(agreed)),
            Kind::Packets => Ok(()),
        }
    }

    /// Whether the host should give packets to this queue at all.
    pub(super) fn attach(&self, to: Attached) -> io::Result<()> {
        match (&self.kind, to) {
            (Kind::Tap { several: true }, to) => sys::attach_queue(&self.file, to),
            _ => Ok(()),
        }
    }

    /// Reads a packet into memory of our own.
    pub(super) fn read(&self, packet: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(packet)
    }

    /// The descriptor.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Whether a queue takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attached {
    /// It does.
    Yes,
    /// It does not.
    No,
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// The `TUN_F_*` for what a driver agreed to.
fn offloads(agreed: u64) -> u32 {
    let has = |feature| agreed & feature == feature;
    if !has(features::GUEST_CSUM) {
        return 0;
    }
    let mut offloads = F_CSUM;
    let both_udp = features::GUEST_USO4 | features::GUEST_USO6;
    for (feature, flags) in [
        (features::GUEST_TSO4, F_TSO4),
        (features::GUEST_TSO6, F_TSO6),
        (both_udp, F_USO4 | F_USO6),
    ] {
        if has(feature) {
            offloads |= flags;
        }
    }
    // the kernel takes it only beside the segments that it is about
    if has(features::GUEST_ECN) && offloads & (F_TSO4 | F_TSO6) != 0 {
        offloads |= F_TSO_ECN;
    }
    offloads
}

/// Whether a read or write failed because the interface is gone for good.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADFD | libc::ENODEV | libc::ENXIO | libc::ECONNREFUSED | libc::ENOTCONN)
    )
}

/// Opens `count` queues of the tap device `name`, which is made if it is not there. `%d` in a name
/// becomes a number. Returns the name that it has.
///
/// The device belongs to the network namespace of the calling thread.
///
/// # Errors
/// When the caller may not, there is no `/dev/net/tun`, or the name is taken by something else.
pub fn open(name: &str, count: usize) -> io::Result<(String, Vec<OwnedFd>)> {
    let several = if count > 1 { IFF_MULTI_QUEUE } else { 0 };
    let flags = BASIC | several;
    let mut name = name.to_owned();
    let mut queues = Vec::with_capacity(count);
    for _ in 0..count {
        let file = open_device()?;
        name = sys::attach(&file, &name, flags)?;
        queues.push(file.into());
    }
    Ok((name, queues))
}

/// What becomes a queue. It stays open in the VMM, and the device behind it is the host's: it is set
/// apart before, since it cannot be opened again afterwards.
fn open_device() -> io::Result<File> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let apart = launch::device_apart(device.as_fd());
    Ok(apart.map_or(device, File::from))
}

/// Opens a further queue of the tap device `name`, however many it may have.
///
/// # Errors
/// `NotFound` when there is none; as [`open`].
pub fn open_existing(name: &str) -> io::Result<OwnedFd> {
    // to attach would make it
    nix::net::if_::if_nametoindex(name)?;
    match open(name, 1) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let file = open_device()?;
            sys::attach(&file, name, BASIC | IFF_MULTI_QUEUE)?;
            Ok(file.into())
        }
        Err(error) => Err(error),
        Ok((_, mut queues)) => queues.pop().ok_or(io::ErrorKind::NotFound.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_without_checksums_gets_whole_packets() {
        assert_eq!(offloads(!features::GUEST_CSUM), 0);
    }

    #[test]
    fn udp_is_segmented_for_both_versions_or_none() {
        let tcp = features::GUEST_CSUM | features::GUEST_TSO4;
        assert_eq!(offloads(tcp | features::GUEST_USO4), F_CSUM | F_TSO4);
        let udp = features::GUEST_USO4 | features::GUEST_USO6;
        assert_eq!(offloads(tcp | udp), F_CSUM | F_TSO4 | F_USO4 | F_USO6);
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(
            Tap::queues(vec![file.into()]),
            Err(Error::NotTap(_))
        ));
    }
}
