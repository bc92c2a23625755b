//! Files of the host as a guest's disks.

use std::{
    fs,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use anyhow::Result;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use system_tests::{
    guest::{Guest, Plan},
    scratch,
};
use tempfile::TempDir;
use vmm::config::{DeviceConfig, Resource};

const BYTES: usize = 1 << 20;

/// Bytes that are nowhere alike.
fn pattern() -> Vec<u8> {
    (0..BYTES as u32 / 4)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect()
}

fn disk(directory: &Path, name: &str, read_only: bool) -> Result<(PathBuf, DeviceConfig)> {
    let path = directory.join(name);
    fs::write(&path, pattern())?;
    let device = DeviceConfig::Blk {
        disk: Resource::Path(path.clone()),
        read_only,
        serial: name.to_owned(),
    };
    Ok((path, device))
}

/// A guest with a disk that it may write, /dev/vda, and one that it may not, /dev/vdb.
fn guest() -> Result<(TempDir, [PathBuf; 2], Guest)> {
    let directory = scratch::directory()?;
    let (writable, first) = disk(directory.path(), "writable", false)?;
    let (fixed, second) = disk(directory.path(), "fixed", true)?;
    let mut guest = Guest::start(Plan {
        devices: vec![first, second],
        ..Plan::default()
    })?;
    guest.sh("mkdir -p /tmp")?;
    Ok((directory, [writable, fixed], guest))
}

#[test]
fn many_requests_at_a_time_each_reach_their_place() -> Result<()> {
    let (_directory, [writable, _], mut guest) = guest()?;
    // Each half goes to where the other was, by eight who write at a time.
    guest.sh("for i in 0 1 2 3 4 5 6 7; do \
           dd if=/dev/vdb of=/tmp/$i bs=64k count=2 skip=$((i * 2)) iflag=direct & \
         done; wait")?;
    guest.sh("for i in 0 1 2 3 4 5 6 7; do \
           dd if=/tmp/$i of=/dev/vda bs=64k seek=$(((i + 4) % 8 * 2)) oflag=direct & \
         done; wait; sync")?;
    let mut expected = pattern();
    expected.rotate_left(BYTES / 2);
    assert!(fs::read(writable)? == expected);
    Ok(())
}

#[test]
fn a_read_only_disk_stays_as_it_is() -> Result<()> {
    let (_directory, [_, fixed], mut guest) = guest()?;
    assert_eq!(guest.sh("cat /sys/block/vdb/ro")?, "1\n");
    assert_eq!(guest.sh("echo $(cat /sys/block/vdb/serial)")?, "fixed\n");
    guest.sh("! dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync")?;
    assert!(fs::read(fixed)? == pattern());
    Ok(())
}

#[test]
fn what_the_guest_discards_takes_no_room() -> Result<()> {
    let (_directory, [writable, _], mut guest) = guest()?;
    let before = fs::metadata(&writable)?.blocks();
    guest.sh("blkdiscard -o 262144 -l 524288 /dev/vda")?;
    assert!(fs::metadata(&writable)?.blocks() < before);
    let mut expected = pattern();
    expected[256 << 10..768 << 10].fill(0);
    assert!(fs::read(writable)? == expected);
    Ok(())
}

#[test]
fn an_error_of_the_host_is_the_requests_and_not_the_disks() -> Result<()> {
    let (_directory, [writable, _], mut guest) = guest()?;
    let file = fs::File::options().write(true).open(&writable)?;
    file.set_len(256 << 10)?;
    guest.sh("! dd if=/dev/vda of=/dev/null bs=4k skip=128 count=1 iflag=direct")?;
    file.write_all_at(&pattern(), 0)?;
    guest.sh("dd if=/dev/vda of=/dev/null bs=4k skip=128 count=1 iflag=direct")?;
    Ok(())
}

/// Adds a disk to a running guest; returns its slot and the guest's name for it, found as an
/// agent finds it: by slot.
fn add(guest: &mut Guest, path: &Path, read_only: bool, serial: &str) -> Result<(u8, String)> {
    let file = fs::File::options()
        .read(true)
        .write(!read_only)
        .open(path)?;
    let device = DeviceConfig::Blk {
        disk: Resource::Fd(0),
        read_only,
        serial: serial.to_owned(),
    };
    let slot = guest.control()?.add_device(device, &[file.as_fd()])?;
    guest.sh("echo 1 > /sys/bus/pci/rescan")?;
    let block = format!("/sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/block");
    guest.sh(&format!(
        "until ls {block} 2> /dev/null; do sleep 0.1; done"
    ))?;
    let name = guest.sh(&format!("ls {block}"))?.trim().to_owned();
    assert_eq!(
        guest.sh(&format!("echo $(cat /sys/block/{name}/serial)"))?,
        format!("{serial}\n")
    );
    Ok((slot, name))
}

fn remove(guest: &mut Guest, slot: u8) -> Result<()> {
    guest.sh(&format!(
        "echo 1 > /sys/bus/pci/devices/0000:00:{slot:02x}.0/remove"
    ))?;
    Ok(guest.control()?.remove_device(slot)?)
}

#[test]
fn images_and_block_devices_come_and_go_while_the_guest_runs() -> Result<()> {
    let (image, other) = (scratch::ext4(16 << 20)?, scratch::ext4(16 << 20)?);
    let device = scratch::Loop::new(other.path())?;
    let mut guest = Guest::start(Plan::default())?;
    guest.sh("mkdir -p /a /b /tmp")?;
    let (first, a) = add(&mut guest, image.path(), false, "image")?;
    let (second, b) = add(&mut guest, device.path(), false, "device")?;
    guest.sh(&format!(
        "mount -t ext4 /dev/{a} /a && mount -t ext4 /dev/{b} /b"
    ))?;
    guest.sh(
        "echo kept > /a/file; dd if=/dev/urandom of=/b/file bs=64k count=40; cp /b/file /a/copy",
    )?;
    let sum = guest.sh("md5sum < /b/file")?;
    guest.sh("umount /a /b")?;
    remove(&mut guest, first)?;
    remove(&mut guest, second)?;

    // Back, the other way round and for reading only.
    let (first, b) = add(&mut guest, device.path(), true, "device")?;
    let (second, a) = add(&mut guest, image.path(), true, "image")?;
    guest.sh(&format!(
        "mount -t ext4 -o ro /dev/{a} /a && mount -t ext4 -o ro /dev/{b} /b"
    ))?;
    assert_eq!(guest.sh("cat /a/file")?, "kept\n");
    assert_eq!(guest.sh("md5sum < /a/copy")?, sum);
    assert_eq!(guest.sh("md5sum < /b/file")?, sum);
    for name in [&a, &b] {
        assert_eq!(guest.sh(&format!("cat /sys/block/{name}/ro"))?, "1\n");
        guest.sh(&format!(
            "! dd if=/dev/zero of=/dev/{name} bs=4k count=1 conv=fsync"
        ))?;
    }
    guest.sh("umount /a /b")?;
    remove(&mut guest, first)?;
    remove(&mut guest, second)?;
    assert_eq!(guest.sh("ls /sys/block | grep -c ^vd || true")?, "0\n");
    device.detach()?;
    Ok(())
}

#[test]
fn disks_that_fail_are_errors_and_no_hangs() -> Result<()> {
    let directory = scratch::directory()?;
    let small = directory.path().join("small");
    fs::create_dir(&small)?;
    mount(
        Some("small"),
        &small,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=1m"),
    )?;
    let full = small.join("full");
    fs::File::create(&full)?.set_len(64 << 20)?;
    let behind = scratch::noise(4 << 20)?;
    let device = scratch::Loop::new(behind.path())?;
    let mut guest = Guest::start(Plan::default())?;
    guest.sh("mkdir -p /tmp")?;

    // Sparse on a file system without room: what does not fit is an error, what did stays.
    let (slot, name) = add(&mut guest, &full, false, "full")?;
    guest.sh(&format!(
        "dd if=/dev/urandom of=/dev/{name} bs=256k count=1 oflag=direct"
    ))?;
    guest.sh(&format!(
        "! dd if=/dev/zero of=/dev/{name} bs=256k count=16 seek=1 oflag=direct"
    ))?;
    guest.sh(&format!(
        "dd if=/dev/{name} of=/tmp/a bs=256k count=1 iflag=direct"
    ))?;
    guest.sh(&format!("blkdiscard /dev/{name}"))?;
    guest.sh(&format!(
        "dd if=/dev/zero of=/dev/{name} bs=256k count=2 oflag=direct"
    ))?;
    remove(&mut guest, slot)?;

    // What is behind the host's device becomes shorter.
    let (slot, name) = add(&mut guest, device.path(), false, "short")?;
    guest.sh(&format!(
        "dd if=/dev/{name} of=/dev/null bs=64k count=4 iflag=direct"
    ))?;
    behind.as_file().set_len(1 << 20)?;
    guest.sh(&format!(
        "! dd if=/dev/{name} of=/dev/null bs=64k skip=48 count=1 iflag=direct"
    ))?;
    guest.sh(&format!(
        "dd if=/dev/{name} of=/dev/null bs=64k count=8 iflag=direct"
    ))?;
    remove(&mut guest, slot)?;
    device.detach()?;
    umount2(&small, MntFlags::MNT_DETACH)?;
    Ok(())
}
