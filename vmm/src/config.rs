//! What a VM is made of: one JSON document. Every resource in it is an open
//! descriptor by its number, or, for people, a path that is opened before the
//! jail is shut.
//!
//! ```
//! let text = r#"{
//!     "boot": {"kernel": {"path": "/boot/vmlinux"}, "cmdline": "quiet"},
//!     "cpus": 2,
//!     "memory_mib": 256,
//!     "devices": [{"kind": "rng"}]
//! }"#;
//! let config: vmm::config::VmConfig = serde_json::from_str(text)?;
//! assert_eq!(config.memory_mib, 256);
//! # Ok::<(), serde_json::Error>(())
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::virtio::net::config::{Bucket, Mac, NetConfig, Rate};

/// One microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What it boots.
    pub boot: BootConfig,
    /// CPUs declared to the guest, 1 to 32. The guest decides which it brings online
    /// (`maxcpus=` on the kernel's command line).
    #[serde(default = "one")]
    pub cpus: u8,
    /// Guest memory in MiB, 64 to 524288.
    pub memory_mib: u64,
    /// `/dev/kvm`, opened; by default the path `/dev/kvm` is opened before the jail is shut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kvm: Option<Resource>,
    /// A memfd or file of a power of two of at least 8 KiB for the kernel's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_log: Option<Resource>,
    /// A listening unix stream socket for commands, see `control`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<Resource>,
    /// Where a serial port's output goes; without it the guest has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Resource>,
    /// The virtio devices, in the order of their PCI slots.
    #[serde(default)]
    pub devices: Vec<DeviceConfig>,
}

fn urandom() -> Resource {
    Resource::Path("/dev/urandom".into())
}

fn one() -> u8 {
    1
}

/// The kernel and what it is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// An ELF vmlinux or a bzImage.
    pub kernel: Resource,
    /// A read-only image that becomes `/dev/pmem0`, shared by all VMs that map it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Resource>,
    /// An initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<Resource>,
    /// The kernel's command line, at most 2047 bytes.
    #[serde(default)]
    pub cmdline: String,
}

/// Something of the host that the VM may touch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// A descriptor that the process was started with.
    Fd(i32),
    /// A path, opened before the jail is shut. For people; programs pass descriptors.
    Path(PathBuf),
}

/// A virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DeviceConfig {
    /// A disk: a raw image file or a block device.
    Blk {
        /// The file or block device.
        disk: Resource,
        /// Whether the guest may only read it.
        #[serde(default)]
        read_only: bool,
        /// What the guest reads as the disk's serial number, at most 20 bytes.
        #[serde(default)]
        serial: String,
    },
    /// Sockets between host and guest.
    Vsock {
        /// The guest's context id, 3 or more.
        cid: u32,
        /// A listening unix stream socket that takes `CONNECT port`.
        listener: Resource,
        /// Ports of the host that the guest may connect to.
        #[serde(default)]
        guest_ports: Vec<GuestPort>,
    },
    /// A directory of the host, shared by FUSE.
    Fs {
        /// The name by which the guest mounts it, at most 36 bytes.
        tag: String,
        /// The directory.
        directory: Resource,
        /// Whether the guest may only read it.
        #[serde(default)]
        read_only: bool,
    },
    /// Entropy from the host.
    Rng {
        /// Where it comes from; by default the path `/dev/urandom`.
        #[serde(default = "urandom")]
        source: Resource,
    },
    /// A console (hvc0).
    Console {
        /// Where the guest's output goes.
        output: Resource,
        /// Where the guest's input comes from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        input: Option<Resource>,
    },
    /// A file as memory, shared by all VMs that map it.
    Pmem {
        /// The file; its size is rounded up to 2 MiB.
        file: Resource,
        /// Whether the guest may only read it; then the memslot has no write access.
        #[serde(default)]
        read_only: bool,
    },
    /// A network card.
    Net(NetConfig),
    /// Gives memory back to the host.
    Balloon {
        /// MiB to take from the guest at first.
        #[serde(default)]
        inflate_mib: u64,
    },
}

/// A port of the host that the guest may connect to, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPort {
    /// The port's number.
    pub port: u32,
    /// A connected stream socket that the guest's connection is joined to.
    pub socket: Resource,
}
