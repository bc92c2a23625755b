//! Files of the host as memory of the guest: each gets a memslot and a place
//! above the RAM.

use std::{io, os::fd::OwnedFd, sync::Arc};

use kvm_ioctls::VmFd;

use super::{
    memory::{self, Image},
    sys::{Backing, add_memory},
};
use crate::arch::x86_64::layout;

/// What a guest's kernel maps such memory by.
const ALIGN: u64 = 2 << 20;

/// The images of a VM, in the order of their addresses.
pub struct Images {
    vm: Arc<VmFd>,
    next_slot: u32,
    next_address: u64,
    images: Vec<Image>,
}

/// Where an image lies in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Guest address.
    pub address: u64,
    /// Length in bytes, a multiple of 2 MiB; what the file does not fill reads as ones.
    pub len: u64,
}

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The process has no descriptor left.
    #[error("cannot duplicate the descriptor of an image")]
    Duplicate(#[source] io::Error),
    /// KVM.
    #[error("kvm refuses to map an image into the guest")]
    Map(#[source] io::Error),
}

impl Images {
    /// No images yet; memslots from `first_slot` on are free.
    pub fn new(vm: Arc<VmFd>, first_slot: u32, ram_bytes: u64) -> Self {
        Self {
            vm,
            next_slot: first_slot,
            next_address: layout::images_start(ram_bytes),
            images: Vec::new(),
        }
    }

    /// Maps a file into the guest; a read-only one without write access in hardware.
    ///
    /// # Errors
    /// When the file is empty or cannot be mapped.
    pub fn add(&mut self, file: OwnedFd, read_only: bool) -> Result<Placed, Error> {
        let image = Image::map(file, read_only)?;
        let placed = Placed {
            address: self.next_address,
            len: image.len().next_multiple_of(ALIGN),
        };
        let backing = Backing::Image(&image, placed.address);
        self.next_slot = add_memory(&self.vm, self.next_slot, &backing).map_err(Error::Map)?;
        self.next_address = (placed.address + placed.len).next_multiple_of(layout::IMAGE_ALIGN);
        self.images.push(image);
        Ok(placed)
    }
}
