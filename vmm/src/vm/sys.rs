//! Memslots and the signal that ends a vCPU's run.
#![expect(
    unsafe_code,
    reason = "memslots hand addresses to KVM; signals are handled in C"
)]

use std::{
    cell::Cell,
    ffi::c_int,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd},
        unix::thread::JoinHandleExt,
    },
    ptr, thread,
};

use kvm_bindings::{KVM_MEM_READONLY, kvm_run, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemory, GuestMemoryRegion, MmapRegion};

use super::memory::Image;
use crate::{pci::Bus, virtio::Memory};

/// Memory that stays mapped as long as the VM runs.
pub(super) enum Backing<'a> {
    /// The guest's RAM.
    Ram(&'a Memory),
    /// An image of the host at a guest address.
    Image(&'a Image, u64),
    /// The pages of the PCI bus.
    Bus(&'a Bus),
    /// Memory that both sides write, at a guest address.
    Shared(&'a MmapRegion, u64),
}

/// Gives the VM a memory, in memslots from `first` on; returns the next free one.
///
/// The caller keeps what backs it mapped until the VM is closed: [`super::Vm`] owns both and
/// drops the VM first.
///
/// # Errors
/// When KVM refuses.
pub(super) fn add_memory(vm: &VmFd, first: u32, backing: &Backing<'_>) -> io::Result<u32> {
    let regions: Vec<(u64, u64, u64, bool)> = match backing {
        Backing::Ram(memory) => memory
            .iter()
            .map(|region| {
                (
                    region.start_addr().0,
                    region.as_ptr() as u64,
                    region.len(),
                    false,
                )
            })
            .collect(),
        Backing::Image(image, at) => {
            vec![(*at, image.host_address(), image.len(), image.read_only())]
        }
        Backing::Bus(bus) => bus
            .mappings()
            .into_iter()
            .map(|mapping| (mapping.guest, mapping.host, mapping.len, true))
            .collect(),
        Backing::Shared(mapping, at) => {
            vec![(*at, mapping.as_ptr() as u64, mapping.size() as u64, false)]
        }
    };
    let mut slot = first;
    for (guest, host, len, read_only) in regions {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: `host..host + len` is one mapping that its owner above keeps alive as long as
        // the VM, and a read-only one is only ever a read-only memslot.
        unsafe { vm.set_user_memory_region(region) }?;
        slot += 1;
    }
    Ok(slot)
}

/// KVM behind a descriptor that is open already.
pub(super) fn kvm_from(fd: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is owned and given up here; ioctls on one that is not /dev/kvm fail.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// Random bytes of the host's kernel.
///
/// # Errors
/// When the kernel has none, which is before the host is up.
pub(super) fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    // SAFETY: the buffer is 32 bytes and so many are asked for.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got == 32 {
        Ok(bytes)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What KVM counts of a vCPU; none on kernels before 5.14.
pub(super) fn statistics(vcpu: &VcpuFd) -> Option<File> {
    /// `KVM_GET_STATS_FD`, `_IO(0xAE, 0xce)`.
    const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
    // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
    let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the descriptor was just made and nobody else knows it.
    Some(unsafe { File::from_raw_fd(fd) })
}

/// A page of the second level, which both the host's and the guest's page tables map at once.
pub(super) const LARGE_PAGE: usize = 2 << 20;

/// Anonymous memory at a multiple of 2 MiB, for which large pages are asked.
///
/// The mapping stays until the process ends, as the VM does: a guest's RAM is reached from many
/// threads, and nothing is won by unmapping it before.
///
/// # Errors
/// When the address space has no room.
pub(super) fn map_large(len: usize) -> io::Result<MmapRegion> {
    let room = len
        .checked_add(LARGE_PAGE)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: asks for addresses that nobody has; nothing is replaced.
    let start = unsafe { libc::mmap(ptr::null_mut(), room, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let aligned = start.wrapping_byte_add(start.align_offset(LARGE_PAGE));
    // SAFETY: advice on a range within the mapping changes none of its contents. A kernel
    // without large pages refuses, and the guest runs with small ones.
    unsafe { libc::madvise(aligned, len, libc::MADV_HUGEPAGE) };
    // SAFETY: `len` bytes from `aligned` lie within the mapping, which is never unmapped.
    unsafe { MmapRegion::build_raw(aligned.cast(), len, protection, flags) }
        .map_err(io::Error::other)
}

/// The first `len` bytes of a file as shared memory. Unlike [`MmapRegion::from_file`] this keeps no
/// descriptor.
///
/// The mapping stays until the process ends, as [`map_large`]'s does.
///
/// # Errors
/// When the file cannot be mapped so.
pub(super) fn map_file(file: &File, len: usize, protection: c_int) -> io::Result<MmapRegion> {
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    // SAFETY: asks for addresses that nobody has; nothing is replaced.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, file.as_raw_fd(), 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping has `len` bytes from `start` and is never unmapped.
    unsafe { MmapRegion::build_raw(start.cast(), len, protection, flags) }.map_err(io::Error::other)
}

thread_local! {
    /// The run structure of the vCPU that this thread runs.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> c_int {
    libc::SIGRTMIN()
}

/// Ends the current or the next `KVM_RUN` of the thread, whichever comes.
extern "C" fn on_kick(_signal: c_int) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is this thread's vCPU's, set by `with_kicks` and cleared before the
        // vCPU is closed.
        let immediate_exit = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: as above; one byte is written that only KVM reads.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

/// Installs the handler of the signal that [`kick`] sends. Once per process.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn handle_kicks() -> io::Result<()> {
    use nix::sys::signal::{SaFlags, SigSet};
    // SAFETY: an all-zero sigaction is valid, and what matters is filled in below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_kick as *const () as usize;
    action.sa_flags = SaFlags::empty().bits();
    action.sa_mask = *SigSet::empty().as_ref();
    // SAFETY: the handler only writes to memory of the thread it runs on.
    let result = unsafe { libc::sigaction(kick_signal(), &action, ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Runs `body` while kicks reach `vcpu` through this thread.
pub(super) fn with_kicks(vcpu: &mut VcpuFd, body: impl FnOnce(&mut VcpuFd)) {
    RUN.set(ptr::from_mut(vcpu.get_kvm_run()));
    body(vcpu);
    RUN.set(ptr::null_mut());
}

/// Ends the guest code that a vCPU's thread runs, now or before it starts.
pub(super) fn kick(thread: &thread::JoinHandle<()>) {
    if !thread.is_finished() {
        // SAFETY: the handle is not joined, so the thread's id is still its own.
        let _ = unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
    }
}
