//! Places of the guest that a container's configuration names for what it
//! shares with others: namespaces, memory.

use std::fmt;

/// The pod's /dev/shm: the `source` of a bind mount. It is made when the first container names it.
pub const POD_SHM: &str = "/run/bulkhead/pod/shm";

const POD: &str = "/run/bulkhead/pod/ns/";
const CONTAINERS: &str = "/run/bulkhead/containers/";
const DISKS: &str = "/run/bulkhead/disks/";

/// A namespace that a container joins. Its text is what stands in `linux.namespaces[].path` of
/// the configuration: a name that the agent knows, no file.
///
/// ```
/// use protocol::Namespace;
/// let shared = Namespace::Pod("ipc").to_string();
/// assert_eq!(Namespace::parse(&shared), Some(Namespace::Pod("ipc")));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace<'a> {
    /// The pod's, of the kinds `network`, `ipc`, `uts` and `pid`. The first three are the guest's
    /// own; the fourth has a first process of the agent's, which collects orphans.
    Pod(&'a str),
    /// That of another container's first process, or of what a placeholder stands for; of any
    /// kind but `mount`.
    Container {
        /// The container.
        id: &'a str,
        /// The kind, as `linux.namespaces[].type` has it.
        kind: &'a str,
    },
}

impl<'a> Namespace<'a> {
    /// Reads the text; nothing where it is another path.
    pub fn parse(path: &'a str) -> Option<Self> {
        if let Some(kind) = path.strip_prefix(POD) {
            return is_word(kind).then_some(Self::Pod(kind));
        }
        let (id, kind) = path.strip_prefix(CONTAINERS)?.split_once("/ns/")?;
        (is_word(id) && is_word(kind)).then_some(Self::Container { id, kind })
    }
}

impl fmt::Display for Namespace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(kind) => write!(f, "{POD}{kind}"),
            Self::Container { id, kind } => write!(f, "{CONTAINERS}{id}/ns/{kind}"),
        }
    }
}

/// A disk of the host that was plugged into the machine for a container. Its text is what stands
/// for the device file in a mount's `source` or as a root's device: a name that the agent knows,
/// no file.
///
/// ```
/// use protocol::Disk;
/// let disk = Disk::in_slot(11).expect("a slot");
/// assert_eq!(Disk::parse(&disk.to_string()), Some(disk));
/// assert_eq!(disk.address(), "0000:00:0b.0");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk(u8);

impl Disk {
    /// The one in a slot of the PCI bus, 0 to 31; nothing for other numbers.
    pub fn in_slot(slot: u8) -> Option<Self> {
        (slot < 32).then_some(Self(slot))
    }

    /// Reads the text; nothing where it is another path.
    pub fn parse(path: &str) -> Option<Self> {
        let slot = path.strip_prefix(DISKS)?.parse().ok()?;
        // Only the text that is written, no `+1` or `01`.
        Self::in_slot(slot).filter(|disk| disk.to_string() == path)
    }

    /// The one at a PCI address.
    pub fn of_address(address: &str) -> Option<Self> {
        let slot = address.strip_prefix("0000:00:")?.strip_suffix(".0")?;
        Self::in_slot(u8::from_str_radix(slot, 16).ok()?).filter(|disk| disk.address() == address)
    }

    /// Its slot.
    pub fn slot(self) -> u8 {
        self.0
    }

    /// Its address: domain, bus, device and function.
    pub fn address(self) -> String {
        pci_address(self.0)
    }
}

/// The address of the device in a slot of the guest's PCI bus: domain, bus, device and function.
pub fn pci_address(slot: u8) -> String {
    format!("0000:00:{slot:02x}.0")
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{DISKS}{}", self.0)
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.contains('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_survives_its_text() {
        for namespace in [
            Namespace::Pod("uts"),
            Namespace::Container {
                id: "web-0",
                kind: "pid",
            },
        ] {
            assert_eq!(Namespace::parse(&namespace.to_string()), Some(namespace));
        }
    }

    #[test]
    fn other_paths_are_none() {
        for path in [
            "/proc/1/ns/pid",
            "/run/bulkhead/pod/ns/",
            "/run/bulkhead/pod/ns/a/b",
            "/run/bulkhead/containers//ns/pid",
            "/run/bulkhead/containers/a/b/ns/pid",
        ] {
            assert_eq!(Namespace::parse(path), None, "{path}");
        }
    }

    #[test]
    fn a_disk_survives_its_text_and_its_address() {
        for slot in 0..32 {
            let disk = Disk::in_slot(slot).expect("a slot");
            assert_eq!(Disk::parse(&disk.to_string()), Some(disk));
            assert_eq!(Disk::of_address(&disk.address()), Some(disk));
        }
    }

    #[test]
    fn other_paths_and_addresses_are_no_disks() {
        for path in [
            "/dev/vda",
            "/run/bulkhead/disks/",
            "/run/bulkhead/disks/32",
            "/run/bulkhead/disks/01",
        ] {
            assert_eq!(Disk::parse(path), None, "{path}");
        }
        for address in [
            "0000:00:20.0",
            "0000:01:03.0",
            "0000:00:3.0",
            "0000:00:03.1",
        ] {
            assert_eq!(Disk::of_address(address), None, "{address}");
        }
    }
}
