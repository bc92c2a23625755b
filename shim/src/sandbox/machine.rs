//! What the virtual machine of a sandbox is: its size, devices and kernel
//! command line.

use std::os::fd::OwnedFd;

use protocol::READY_PORT;
use vmm::{
    config::{BootConfig, DeviceConfig, GuestPort, Resource, VmConfig},
    launch::Launch,
};

use super::{Resources, shared};
use crate::network::Card;

/// The guest's vsock address; every guest has the same, each has its own host side.
const GUEST_CID: u32 = 3;

/// The fewest MiB in which the guest's kernel, its agent and a small program run.
pub const MIN_MEMORY_MIB: u64 = 64;

/// The most CPUs a machine can have.
pub const MAX_CPUS: u8 = 32;

/// How large a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// CPUs, 1 to [`MAX_CPUS`]. One boots, the agent brings up the others.
    pub cpus: u8,
    /// Memory.
    pub memory_mib: u64,
}

/// Files of the host that the machine has as memory and as disks.
#[derive(Debug, Default)]
pub struct Media {
    /// Read-only images, shared by all machines that have them: `/dev/pmem1` and so on.
    pub images: Vec<OwnedFd>,
    /// Disks of this machine's own: `/dev/vda` and so on.
    pub disks: Vec<OwnedFd>,
}

/// The host's ends of what the machine is wired to, and the descriptors it is made from.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) resources: Resources,
    pub(super) console: OwnedFd,
    pub(super) vsock: OwnedFd,
    pub(super) control: OwnedFd,
    pub(super) ready: OwnedFd,
    /// The network's.
    pub(super) cards: Vec<Card>,
    /// The top of the shared tree.
    pub(super) shared: Option<OwnedFd>,
    pub(super) media: Media,
}

/// Gives the parts to `launch` and returns the configuration that names them.
pub(super) fn compose(launch: &mut Launch, size: Size, parts: Parts) -> VmConfig {
    let mut devices = vec![DeviceConfig::Vsock {
        cid: GUEST_CID,
        listener: launch.pass(parts.vsock),
        guest_ports: vec![GuestPort {
            port: READY_PORT,
            socket: launch.pass(parts.ready),
        }],
    }];
    if let Some(directory) = parts.shared {
        devices.push(DeviceConfig::Fs {
            tag: shared::TAG.to_owned(),
            directory: launch.pass(directory),
            read_only: false,
        });
    }
    devices.extend(
        parts
            .media
            .images
            .into_iter()
            .map(|image| DeviceConfig::Pmem {
                file: launch.pass(image),
                read_only: true,
            }),
    );
    devices.extend(parts.media.disks.into_iter().map(|disk| DeviceConfig::Blk {
        disk: launch.pass(disk),
        read_only: false,
        serial: String::new(),
    }));
    for card in parts.cards {
        devices.push(DeviceConfig::Net(card.config(|fd| launch.pass(fd))));
    }
    devices.push(DeviceConfig::Rng {
        // Opened by the launch, before the jail is shut.
        source: Resource::Path("/dev/urandom".into()),
    });
    devices.push(DeviceConfig::Balloon { inflate_mib: 0 });
    VmConfig {
        boot: BootConfig {
            kernel: launch.pass(parts.resources.kernel),
            image: Some(launch.pass(parts.resources.image)),
            initrd: None,
            cmdline: cmdline(),
        },
        cpus: size.cpus,
        memory_mib: size.memory_mib,
        kvm: Some(launch.pass(parts.resources.kvm)),
        console_log: Some(launch.pass(parts.console)),
        control: Some(launch.pass(parts.control)),
        serial: None,
        devices,
    }
}

/// The slots of the bus that the network cards come into: the VMM fills them in the devices' order.
pub(super) fn card_slots(config: &VmConfig) -> impl Iterator<Item = u8> {
    let devices = (0..).zip(&config.devices);
    devices.filter_map(|(slot, device)| matches!(device, DeviceConfig::Net(_)).then_some(slot))
}

/// The kernel's command line. The VMM adds what depends on its own layout, such as where the
/// console's ring lies.
pub fn cmdline() -> String {
    [
        // The log goes to the ring alone, without a console that costs exits.
        "quiet loglevel=4 console=ttynull 8250.nr_uarts=0",
        // A kernel that fails ends the machine at once.
        "panic=-1 reboot=t",
        // The agent brings the other CPUs online; no device needs bounce buffers.
        "maxcpus=1 swiotlb=noforce",
        // The image is memory that all machines share.
        "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/init",
    ]
    .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_the_golden_one() {
        assert_eq!(
            cmdline() + "\n",
            include_str!("../../tests/golden/cmdline.txt")
        );
    }
}
