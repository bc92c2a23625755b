//! PCI: one bus, one function a slot, modern virtio devices only.
//!
//! A guest's write takes this way: the vCPU thread gets an MMIO exit and calls
//! [`Bus::write`], which finds the slot and calls [`VirtioPci`]. Reads mostly
//! do not come here: configuration space and registers are read-only memslots.
//! A kick does not either: it is an ioeventfd that wakes the device's worker
//! (`virtio/worker.rs`).

use std::{io, sync::Arc};

pub mod common;
mod condition;
pub mod config_space;
pub mod msix;
pub mod pages;
pub mod virtio;

use self::{
    pages::{PAGE, Page, Pages},
    virtio::{Place, VirtioPci},
};
use crate::{
    arch::x86_64::layout,
    counters::DeviceReading,
    virtio::{Kind, Link, Memory, VirtioDevice},
    vm::{interrupts::Interrupts, memory},
};

/// Slots on the bus.
pub const SLOTS: usize = 32;

/// Bytes of configuration space from one slot's function 0 to the next's.
const SLOT_SPAN: usize = 0x8000;

/// What a slot has.
enum Slot {
    Empty,
    Taken(Box<VirtioPci>),
    /// A device was taken out that may still be at work.
    Vacated,
}

impl Slot {
    fn device(&self) -> Option<&VirtioPci> {
        match self {
            Self::Taken(device) => Some(device),
            Self::Empty | Self::Vacated => None,
        }
    }

    fn device_mut(&mut self) -> Option<&mut VirtioPci> {
        match self {
            Self::Taken(device) => Some(device),
            Self::Empty | Self::Vacated => None,
        }
    }
}

/// The bus and its devices.
pub struct Bus {
    slots: [Slot; SLOTS],
    config_space: Arc<Pages>,
    registers: Arc<Pages>,
    /// Slots whose configuration space a memslot serves.
    fast_slots: usize,
    memory: Memory,
    interrupts: Arc<Interrupts>,
}

/// Where a part of the bus's pages is mapped.
pub struct Mapping {
    /// Guest address.
    pub guest: u64,
    /// Address in this process.
    pub host: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Bus {
    /// An empty bus whose first `fast_slots` slots the guest reads without exits.
    ///
    /// # Errors
    /// When the host has no memory for the pages.
    pub fn new(
        fast_slots: usize,
        memory: Memory,
        interrupts: Arc<Interrupts>,
    ) -> Result<Self, memory::Error> {
        Ok(Self {
            slots: [const { Slot::Empty }; SLOTS],
            config_space: Pages::new("pci-config", layout::ECAM_LEN)?,
            registers: Pages::new("pci-registers", (SLOTS * PAGE) as u64)?,
            fast_slots: fast_slots.min(SLOTS),
            memory,
            interrupts,
        })
    }

    /// The read-only memslots of the bus.
    pub fn mappings(&self) -> Vec<Mapping> {
        if self.fast_slots == 0 {
            return Vec::new();
        }
        vec![
            Mapping {
                guest: layout::ECAM,
                host: self.config_space.host_address(),
                len: (self.fast_slots * SLOT_SPAN) as u64,
            },
            Mapping {
                guest: layout::REGISTERS,
                host: self.registers.host_address(),
                len: self.registers.len(),
            },
        ]
    }

    /// Puts a device into the first free slot and returns the slot.
    ///
    /// # Errors
    /// When all slots are taken or the kernel refuses a descriptor.
    pub fn add(&mut self, device: Box<dyn VirtioDevice>) -> io::Result<u8> {
        let slot = self
            .slots
            .iter()
            .position(|slot| matches!(slot, Slot::Empty))
            .ok_or_else(|| io::Error::other("all 32 slots of the PCI bus are taken"))?;
        let place = Place {
            slot: slot as u8,
            config_page: Page::new(&self.config_space, slot * SLOT_SPAN),
            register_page: Page::new(&self.registers, slot * PAGE),
        };
        let device = VirtioPci::new(device, place, self.memory.clone(), &self.interrupts)?;
        self.slots[slot] = Slot::Taken(Box::new(device));
        Ok(slot as u8)
    }

    /// Starts the thread of the device in a slot.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn start(&mut self, slot: u8) -> io::Result<()> {
        let device = self.slots.get_mut(usize::from(slot));
        match device.and_then(Slot::device_mut) {
            Some(device) => device.start(),
            None => Ok(()),
        }
    }

    /// Takes the device out of a slot, if there is one, for the guest and for whoever asks the bus.
    /// Its thread may still be at work: the slot is for another device only after
    /// [`Bus::free`]. Drop it when the bus is locked no more.
    pub fn remove(&mut self, slot: u8) -> Option<VirtioPci> {
        let place = self.slots.get_mut(usize::from(slot))?;
        let device = match std::mem::replace(place, Slot::Vacated) {
            Slot::Taken(device) => *device,
            other => {
                *place = other;
                return None;
            }
        };
        let absent = [0xff; 64];
        Page::new(&self.config_space, usize::from(slot) * SLOT_SPAN).write(0, &absent);
        Some(device)
    }

    /// The device that was taken out of a slot is no more.
    pub fn free(&mut self, slot: u8) {
        if let Some(place @ Slot::Vacated) = self.slots.get_mut(usize::from(slot)) {
            *place = Slot::Empty;
        }
    }

    /// Changes the link of the network card in a slot; false when there is none.
    pub fn set_link(&self, slot: u8, link: Link) -> bool {
        let device = self.slots.get(usize::from(slot)).and_then(Slot::device);
        let card = device.filter(|device| device.kind() == Kind::Net);
        card.map(|card| card.set_link(link)).is_some()
    }

    /// The devices on the bus.
    pub fn devices(&self) -> impl Iterator<Item = &VirtioPci> {
        self.slots.iter().filter_map(Slot::device)
    }

    /// The counters of every device, with slot and name.
    pub fn readings(&self) -> Vec<(u8, &'static str, DeviceReading)> {
        self.devices()
            .map(|device| {
                (
                    device.slot(),
                    device.kind().name(),
                    device.counters().read(),
                )
            })
            .collect()
    }

    /// The guest writes; false when the address is none of the bus's.
    pub fn write(&mut self, address: u64, data: &[u8]) -> bool {
        match Target::of(address) {
            Some(Target::Config { slot, offset }) => {
                if let Some(device) = self.slots[slot].device_mut() {
                    device.write_config_space(offset, data);
                }
            }
            Some(Target::Registers { slot, offset }) => {
                if let Some(device) = self.slots[slot].device_mut() {
                    device.write_registers(offset, data);
                }
            }
            // A kick that no ioeventfd took: of a queue that is not there.
            Some(Target::Nothing) => {}
            None => return false,
        }
        true
    }

    /// The guest reads where no memslot serves it; false when the address is none of the bus's.
    /// What is not there reads as ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match Target::of(address) {
            Some(Target::Config { slot, offset }) => {
                if let Some(device) = self.slots[slot].device() {
                    device.read_config_space(offset, data);
                }
            }
            Some(Target::Registers { slot, offset }) => {
                if let Some(device) = self.slots[slot].device() {
                    device.read_registers(offset, data);
                }
            }
            Some(Target::Nothing) => {}
            None => return false,
        }
        true
    }
}

/// What an address of the bus means.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Config { slot: usize, offset: usize },
    Registers { slot: usize, offset: usize },
    Nothing,
}

impl Target {
    fn of(address: u64) -> Option<Self> {
        match address {
            layout::ECAM..layout::REGISTERS => {
                let offset = (address - layout::ECAM) as usize;
                let (slot, within) = (offset / SLOT_SPAN, offset % SLOT_SPAN);
                // Functions other than 0 do not exist.
                if within < PAGE && slot < SLOTS {
                    Some(Self::Config {
                        slot,
                        offset: within,
                    })
                } else {
                    Some(Self::Nothing)
                }
            }
            layout::REGISTERS..layout::NOTIFY => {
                let offset = (address - layout::REGISTERS) as usize;
                let slot = offset / PAGE;
                if slot < SLOTS {
                    Some(Self::Registers {
                        slot,
                        offset: offset % PAGE,
                    })
                } else {
                    Some(Self::Nothing)
                }
            }
            layout::NOTIFY..layout::PCI_WINDOW_END => Some(Self::Nothing),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn function_1_of_a_slot_does_not_exist() {
        assert_eq!(Target::of(layout::ECAM + 0x1000), Some(Target::Nothing));
        assert_eq!(
            Target::of(layout::ECAM + 0x8004),
            Some(Target::Config { slot: 1, offset: 4 })
        );
    }

    proptest! {
        #[test]
        fn every_address_of_the_window_leads_to_a_slot_or_nothing(
            address in layout::ECAM..layout::PCI_WINDOW_END
        ) {
            match Target::of(address) {
                Some(Target::Config { slot, offset } | Target::Registers { slot, offset }) => {
                    prop_assert!(slot < SLOTS && offset < PAGE);
                }
                Some(Target::Nothing) => {}
                None => prop_assert!(false, "the window has no gap"),
            }
        }
    }
}
