//! A device's PCI configuration space (PCI 3.0, section 6): a page that the
//! guest reads by itself, and the few registers it may write.
//!
//! The memory ranges are fixed by an Enhanced Allocation capability (PCIe 4.0,
//! section 7.8.5): no BAR can be moved, at boot or on hotplug.

use super::pages::Page;
use crate::{arch::x86_64::layout, virtio::Kind};

const VENDOR_ID: usize = 0x00;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CLASS: usize = 0x08;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const CAPABILITY_EA: u8 = 0x14;

/// PCI vendor of virtio devices (virtio 1.2, section 4.1.2).
const VIRTIO_VENDOR: u16 = 0x1af4;
/// Added to the virtio device id (virtio 1.2, section 4.1.2.1).
const VIRTIO_DEVICE_BASE: u16 = 0x1040;

/// Where a device's structures lie in its register page.
pub mod registers {
    /// Common configuration (virtio 1.2, section 4.1.4.3).
    pub const COMMON: usize = 0x000;
    /// Its size.
    pub const COMMON_LEN: usize = 0x40;
    /// Interrupt status, which stays 0: interrupts are messages.
    pub const ISR: usize = 0x040;
    /// Device-specific configuration.
    pub const DEVICE: usize = 0x100;
    /// Its largest size.
    pub const DEVICE_LEN: usize = 0x700;
    /// The MSI-X table.
    pub const MSIX_TABLE: usize = 0x800;
    /// The most interrupt vectors of a device.
    pub const MSIX_MAX: usize = 64;
    /// MSI-X pending bits.
    pub const MSIX_PENDING: usize = 0xc00;
}

/// The BAR that stands for the register page.
const REGISTERS_BAR: u8 = 0;
/// The BAR that stands for the notify page.
const NOTIFY_BAR: u8 = 2;

/// Bytes between the notify addresses of two queues.
pub const NOTIFY_MULTIPLIER: u32 = 4;

/// What a write to the configuration space changed.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing that has consequences.
    Nothing,
    /// The MSI-X control register.
    Msix(MsixControl),
}

/// The MSI-X message control register (PCI 3.0, section 6.8.2.3).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MsixControl {
    /// Whether the device uses MSI-X.
    pub enabled: bool,
    /// Whether all vectors are masked.
    pub masked: bool,
}

/// The configuration space of one device.
pub struct ConfigSpace {
    page: Page,
    msix_control: usize,
}

impl ConfigSpace {
    /// Fills the page for a virtio device in `slot` with `vectors` interrupt vectors.
    pub fn new(page: Page, slot: u8, kind: Kind, vectors: u16) -> Self {
        let device = VIRTIO_DEVICE_BASE + kind as u16;
        // Another device may have been here.
        page.clear();
        // The command register starts at 0: a kernel that finds memory decoding on switches it
        // off and on around each BAR that it sizes, fourteen exits for nothing.
        page.write(VENDOR_ID, &VIRTIO_VENDOR.to_le_bytes());
        page.write(VENDOR_ID + 2, &device.to_le_bytes());

        page.write(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        // Revision 1 or more: no transitional device; class "other".
        page.write(CLASS, &[1, 0, 0x80, 0xff]);
        page.write(SUBSYSTEM, &VIRTIO_VENDOR.to_le_bytes());
        page.write(SUBSYSTEM + 2, &device.to_le_bytes());
        let mut list = CapabilityList {
            page: &page,
            link: CAPABILITIES,
            next: FIRST_CAPABILITY,
        };
        list.put(&virtio_capability(
            1,
            REGISTERS_BAR,
            registers::COMMON,
            registers::COMMON_LEN,
        ));
        list.put(&virtio_capability(3, REGISTERS_BAR, registers::ISR, 1));
        list.put(&virtio_capability(
            4,
            REGISTERS_BAR,
            registers::DEVICE,
            registers::DEVICE_LEN,
        ));
        let mut notify = virtio_capability(2, NOTIFY_BAR, 0, 0x1000);
        notify.extend_from_slice(&NOTIFY_MULTIPLIER.to_le_bytes());
        list.put(&notify);
        let msix = list.put(&msix_capability(vectors));
        list.put(&allocation_capability(slot));
        Self {
            page,
            msix_control: msix + 2,
        }
    }

    /// The guest writes `data` at `offset`.
    pub fn write(&self, offset: usize, data: &[u8]) -> Change {
        for (i, byte) in data.iter().enumerate() {
            let at = offset + i;
            let writable = self.writable(at);
            if writable != 0 {
                let mut old = [0];
                self.page.read(at, &mut old);
                self.page.write(at, &[old[0] & !writable | byte & writable]);
            }
        }
        let touched = offset..offset + data.len();
        if touched.contains(&(self.msix_control + 1)) {
            Change::Msix(self.msix())
        } else {
            Change::Nothing
        }
    }

    /// The guest reads: only where no memslot serves it.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        self.page.read(offset, data);
    }

    fn msix(&self) -> MsixControl {
        let mut high = [0];
        self.page.read(self.msix_control + 1, &mut high);
        MsixControl {
            enabled: high[0] & 0x80 != 0,
            masked: high[0] & 0x40 != 0,
        }
    }

    /// Which bits of a byte the guest may change.
    fn writable(&self, at: usize) -> u8 {
        match at {
            COMMAND => COMMAND_WRITABLE as u8,
            at if at == COMMAND + 1 => (COMMAND_WRITABLE >> 8) as u8,
            at if at == self.msix_control + 1 => 0xc0,
            // Cache line size, latency timer and interrupt line mean nothing here.
            0x0c | 0x0d | 0x3c => 0xff,
            _ => 0,
        }
    }
}

/// Links capabilities one behind the other.
struct CapabilityList<'a> {
    page: &'a Page,
    link: usize,
    next: usize,
}

impl CapabilityList<'_> {
    /// Writes a capability and returns where it lies. Its second byte becomes the link.
    fn put(&mut self, capability: &[u8]) -> usize {
        let at = self.next;
        self.page.write(at, capability);
        self.page.write(at + 1, &[0]);
        self.page.write(self.link, &[at as u8]);
        self.link = at + 1;
        self.next = (at + capability.len()).next_multiple_of(4);
        at
    }
}

/// `struct virtio_pci_cap` (virtio 1.2, section 4.1.4).
fn virtio_capability(structure: u8, bar: u8, offset: usize, len: usize) -> Vec<u8> {
    let size = if structure == 2 { 20 } else { 16 };
    let mut bytes = vec![CAPABILITY_VENDOR, 0, size, structure, bar, 0, 0, 0];
    bytes.extend_from_slice(&(offset as u32).to_le_bytes());
    bytes.extend_from_slice(&(len as u32).to_le_bytes());
    bytes
}

/// MSI-X capability (PCI 3.0, section 6.8.2).
fn msix_capability(vectors: u16) -> Vec<u8> {
    let mut bytes = vec![CAPABILITY_MSIX, 0];
    bytes.extend_from_slice(&(vectors - 1).to_le_bytes());
    let place = |offset: usize| (offset as u32 | u32::from(REGISTERS_BAR)).to_le_bytes();
    bytes.extend_from_slice(&place(registers::MSIX_TABLE));
    bytes.extend_from_slice(&place(registers::MSIX_PENDING));
    bytes
}

/// Enhanced Allocation with two fixed ranges of 4 KiB (PCIe 4.0, section 7.8.5).
fn allocation_capability(slot: u8) -> Vec<u8> {
    const ENABLED: u32 = 1 << 31;
    const NO_SECONDARY: u32 = 0xff << 16;
    const DWORDS_FOLLOWING: u32 = 2;
    let mut bytes = vec![CAPABILITY_EA, 0, 2, 0];
    for (bar, address) in [
        (REGISTERS_BAR, registers_address(slot)),
        (NOTIFY_BAR, notify_address(slot)),
    ] {
        let head = ENABLED | NO_SECONDARY | u32::from(bar) << 4 | DWORDS_FOLLOWING;
        for dword in [head, address as u32, 0xffc] {
            bytes.extend_from_slice(&dword.to_le_bytes());
        }
    }
    bytes
}

/// Guest address of a slot's register page.
pub fn registers_address(slot: u8) -> u64 {
    layout::REGISTERS + 0x1000 * u64::from(slot)
}

/// Guest address of a slot's notify page.
pub fn notify_address(slot: u8) -> u64 {
    layout::NOTIFY + 0x1000 * u64::from(slot)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::pages::Pages, *};

    fn space() -> ConfigSpace {
        let pages = Pages::new("test-config", 0x1000).unwrap();
        ConfigSpace::new(Page::new(&pages, 0), 3, Kind::Blk, 2)
    }

    #[test]
    fn it_is_a_modern_virtio_device() {
        let space = space();
        assert_eq!(space.page.u32_at(0), 0x1042_1af4);
    }

    #[test]
    fn the_capabilities_end_and_none_is_met_twice() {
        let space = space();
        let mut at = (space.page.u32_at(CAPABILITIES) & 0xff) as usize;
        let mut kinds = Vec::new();
        while at != 0 {
            let head = space.page.u32_at(at);
            kinds.push(head as u8);
            assert!(kinds.len() < 16);
            at = (head >> 8 & 0xff) as usize;
        }
        assert_eq!(kinds, [9, 9, 9, 9, 0x11, 0x14]);
    }

    #[test]
    fn nothing_is_left_of_a_device_that_was_here() {
        let pages = Pages::new("test-config", 0x1000).unwrap();
        let page = Page::new(&pages, 0);
        page.write(0, &[0xff; 0x1000]);
        ConfigSpace::new(page.clone(), 3, Kind::Blk, 2);
        assert_eq!(page.u32_at(COMMAND) & 0xffff, 0);
        assert_eq!(page.u32_at(0x0c) >> 16 & 0xff, 0, "a header of type 0");
    }

    #[test]
    fn bars_cannot_be_written() {
        let space = space();
        assert_eq!(space.write(0x10, &[0xff; 4]), Change::Nothing);
        assert_eq!(space.page.u32_at(0x10), 0);
    }

    #[test]
    fn enabling_msix_is_told() {
        let space = space();
        let at = space.msix_control;
        let change = space.write(at, &[0, 0x80]);
        assert_eq!(
            change,
            Change::Msix(MsixControl {
                enabled: true,
                masked: false
            })
        );
    }

    proptest! {
        #[test]
        fn no_write_changes_more_than_its_writable_bits(
            offset in 0usize..0x1000,
            data in proptest::collection::vec(any::<u8>(), 1..8),
        ) {
            let space = space();
            let mut before = [0; 0x1000];
            space.page.read(0, &mut before);
            space.write(offset, &data);
            let mut after = [0; 0x1000];
            space.page.read(0, &mut after);
            for at in 0..0x1000 {
                prop_assert_eq!(before[at] & !space.writable(at), after[at] & !space.writable(at));
            }
        }
    }
}
