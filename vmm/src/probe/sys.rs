//! One page of guest memory.
#![expect(unsafe_code, reason = "a memslot hands an address to KVM")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Error, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

const SIZE: usize = 4096;

/// A page that this process and a guest see. It must be dropped after the VM.
pub(super) struct GuestPage {
    memory: GuestMemoryMmap,
    at: GuestAddress,
}

impl GuestPage {
    /// Maps a new page into `vm` at the guest address `at`.
    pub(super) fn map(vm: &VmFd, at: u64) -> Result<Self, Error> {
        let at = GuestAddress(at);
        let memory =
            GuestMemoryMmap::from_ranges(&[(at, SIZE)]).map_err(|_| Error::new(libc::ENOMEM))?;
        let host = memory
            .get_host_address(at)
            .map_err(|_| Error::new(libc::EFAULT))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: at.0,
            memory_size: SIZE as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: the page is one mapping that `self` owns, and `Guest`, which owns both, drops
        // the VM first.
        unsafe { vm.set_user_memory_region(region) }?;
        Ok(Self { memory, at })
    }

    /// Puts `code` at the page's begin; what does not fit is left out.
    pub(super) fn write(&self, code: &[u8]) {
        // A page always takes a page.
        let _ = self.memory.write(&code[..code.len().min(SIZE)], self.at);
    }
}
