//! Files of the host as a guest's disks.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::Result;
use system_tests::guest::{Guest, Plan};
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
    let directory = tempfile::tempdir()?;
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
