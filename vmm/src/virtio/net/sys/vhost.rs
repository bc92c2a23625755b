//! The ioctls of vhost-net (linux/vhost.h).

use std::{fs::File, io, os::fd::AsRawFd, ptr};

use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::check;
use crate::virtio::{Memory, queue::Ring};

const GET_FEATURES: libc::c_ulong = 0x8008_af00;
const SET_FEATURES: libc::c_ulong = 0x4008_af00;
const SET_OWNER: libc::c_ulong = 0xaf01;
const SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const SET_VRING_CALL: libc::c_ulong = 0x4008_af21;
const SET_VRING_ERR: libc::c_ulong = 0x4008_af22;
const NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;

/// Every request that this module makes, for the jail.
pub(crate) const REQUESTS: [u32; 11] = [
    GET_FEATURES as u32,
    SET_FEATURES as u32,
    SET_OWNER as u32,
    SET_MEM_TABLE as u32,
    SET_VRING_NUM as u32,
    SET_VRING_ADDR as u32,
    SET_VRING_BASE as u32,
    SET_VRING_KICK as u32,
    SET_VRING_CALL as u32,
    SET_VRING_ERR as u32,
    NET_SET_BACKEND as u32,
];

/// `struct vhost_memory_region`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Region {
    guest: u64,
    bytes: u64,
    host: u64,
    flags: u64,
}

impl Region {
    /// All of the guest's memory.
    pub(in super::super) fn all(memory: &Memory) -> Vec<Self> {
        memory
            .iter()
            .map(|region| Self {
                guest: region.start_addr().raw_value(),
                bytes: region.len(),
                host: region.as_ptr() as u64,
                flags: 0,
            })
            .collect()
    }
}

/// `struct vhost_vring_addr`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct VringAddress {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

impl VringAddress {
    /// Where the parts of a ring are in this process; they lie in memory, which was checked when
    /// the driver set them up.
    pub(in super::super) fn of(memory: &Memory, ring: &Ring) -> Option<Self> {
        let host = |address: GuestAddress| {
            let address = memory.get_host_address(address).ok()?;
            Some(address as u64)
        };
        Some(Self {
            index: 0,
            flags: 0,
            descriptors: host(ring.descriptors)?,
            used: host(ring.used)?,
            available: host(ring.available)?,
            log: 0,
        })
    }
}

/// `struct vhost_vring_state` and `struct vhost_vring_file`: a queue and a number.
#[repr(C)]
struct Number {
    index: u32,
    number: i32,
}

/// `struct vhost_memory` with as many regions as a guest of ours can have.
#[repr(C)]
struct Table {
    count: u32,
    padding: u32,
    regions: [Region; MAX_REGIONS],
}

const MAX_REGIONS: usize = 64;

pub(in super::super) fn features(file: &File) -> io::Result<u64> {
    let mut features = 0_u64;
    // SAFETY: the request writes eight bytes, which `features` has.
    check(unsafe { libc::ioctl(file.as_raw_fd(), GET_FEATURES, ptr::from_mut(&mut features)) })?;
    Ok(features)
}

pub(in super::super) fn set_features(file: &File, features: u64) -> io::Result<()> {
    // SAFETY: the request reads eight bytes, which `features` has.
    check(unsafe { libc::ioctl(file.as_raw_fd(), SET_FEATURES, ptr::from_ref(&features)) })
}

pub(in super::super) fn set_owner(file: &File) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(file.as_raw_fd(), SET_OWNER) })
}

/// Tells where the guest's memory is. The kernel reaches it by the addresses of this process, as
/// any thread of it does, and fails where nothing is mapped.
pub(in super::super) fn set_memory(file: &File, regions: &[Region]) -> io::Result<()> {
    let nothing = Region {
        guest: 0,
        bytes: 0,
        host: 0,
        flags: 0,
    };
    let mut table = Table {
        count: regions.len() as u32,
        padding: 0,
        regions: [nothing; MAX_REGIONS],
    };
    table
        .regions
        .get_mut(..regions.len())
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(regions);
    // SAFETY: the request reads a header and the `count` regions behind it, which are there. The
    // regions are the guest's memory, which is mapped as long as the process lives.
    check(unsafe { libc::ioctl(file.as_raw_fd(), SET_MEM_TABLE, ptr::from_ref(&table)) })
}

pub(in super::super) fn set_size(file: &File, index: u32, size: u16) -> io::Result<()> {
    number(file, SET_VRING_NUM, index, size.into())
}

pub(in super::super) fn set_base(file: &File, index: u32, next: u16) -> io::Result<()> {
    number(file, SET_VRING_BASE, index, next.into())
}

pub(in super::super) fn set_address(
    file: &File,
    index: u32,
    address: VringAddress,
) -> io::Result<()> {
    let address = VringAddress { index, ..address };
    // SAFETY: the request reads one `struct vhost_vring_addr`, which this is; the kernel checks
    // each access to what it names.
    check(unsafe { libc::ioctl(file.as_raw_fd(), SET_VRING_ADDR, ptr::from_ref(&address)) })
}

pub(in super::super) fn set_kick(file: &File, index: u32, event: &EventFd) -> io::Result<()> {
    number(file, SET_VRING_KICK, index, event.as_raw_fd())
}

pub(in super::super) fn set_call(file: &File, index: u32, event: &EventFd) -> io::Result<()> {
    number(file, SET_VRING_CALL, index, event.as_raw_fd())
}

pub(in super::super) fn set_error(file: &File, index: u32, event: &EventFd) -> io::Result<()> {
    number(file, SET_VRING_ERR, index, event.as_raw_fd())
}

pub(in super::super) fn set_backend(file: &File, index: u32, tap: Option<&File>) -> io::Result<()> {
    number(
        file,
        NET_SET_BACKEND,
        index,
        tap.map_or(-1, |tap| tap.as_raw_fd()),
    )
}

fn number(file: &File, request: libc::c_ulong, index: u32, number: i32) -> io::Result<()> {
    let number = Number { index, number };
    // SAFETY: these requests read a queue's number and another number, which is `Number`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, ptr::from_ref(&number)) })
}
