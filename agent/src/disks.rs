//! Disks of the host that are plugged in for a container, found by their slot on the PCI bus, and
//! what of its configuration names them.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use protocol::Disk;
use tokio::time::{Instant, sleep};

use crate::{
    container::{Layer, Source, Upper},
    spec::Spec,
};

/// Where the kernel shows the devices of the PCI bus.
const DEVICES: &str = "/sys/bus/pci/devices";

/// How long a file system may take to let go of its disk: it may have much to write back.
const RELEASE: Duration = Duration::from_secs(30);

/// Why a disk cannot be had, or not be left.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing there.
    #[error("there is no disk in slot {slot} of the PCI bus")]
    None {
        /// The slot.
        slot: u8,
    },
    /// A slot that no bus has.
    #[error("{0} is no slot of a PCI bus, which has 0 to 31")]
    Slot(u32),
    /// It is mounted, or a program has it.
    #[error("the disk {device} in slot {slot} is still in use after {} s", RELEASE.as_secs())]
    Busy {
        /// The slot.
        slot: u8,
        /// Its device file.
        device: String,
    },
    /// A step failed.
    #[error("cannot {doing}")]
    Step {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A block device that the configuration knows by the host's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostDevice {
    /// The number there.
    pub(crate) major: i64,
    /// The number there.
    pub(crate) minor: i64,
    /// Where it is plugged in.
    pub(crate) disk: Disk,
}

/// A disk as the guest's kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    device: String,
    major: i64,
    minor: i64,
}

/// Puts the guest's device files and numbers in the places of those that a configuration and its
/// root name.
///
/// # Errors
/// When a disk is not there.
pub(crate) fn settle(
    spec: &mut Spec,
    source: Option<&mut Source>,
    devices: &[HostDevice],
) -> Result<(), Error> {
    for mount in spec.mounts.iter_mut() {
        if let Some(source) = &mut mount.source {
            settle_path(source)?;
        }
    }
    match source {
        Some(Source::Block { device, .. }) => settle_path(device)?,
        Some(Source::Layers(layers)) => {
            for layer in &mut layers.lower {
                if let Layer::Block { device, .. } = layer {
                    settle_path(device)?;
                }
            }
            if let Upper::Block { device, .. } = &mut layers.upper {
                settle_path(device)?;
            }
        }
        Some(Source::Directory(_)) | None => {}
    }
    let found: Vec<(HostDevice, Found)> = devices
        .iter()
        .map(|device| Ok((*device, find(device.disk)?)))
        .collect::<Result<_, Error>>()?;
    renumber(spec, &found);
    Ok(())
}

fn settle_path(path: &mut String) -> Result<(), Error> {
    if let Some(disk) = Disk::parse(path) {
        *path = find(disk)?.device;
    }
    Ok(())
}

/// The guest's numbers for the host's, in devices, rules and limits.
fn renumber(spec: &mut Spec, devices: &[(HostDevice, Found)]) {
    let guest = |major: i64, minor: i64| {
        let same =
            |(device, _): &&(HostDevice, Found)| (device.major, device.minor) == (major, minor);
        devices.iter().find(same).map(|(_, found)| found)
    };
    let linux = &mut spec.linux;
    for device in linux.devices.iter_mut().filter(|device| device.kind == "b") {
        if let Some(found) = guest(device.major, device.minor) {
            (device.major, device.minor) = (found.major, found.minor);
            device.guest = Some(found.device.clone());
        }
    }
    let rules = linux.resources.devices.iter_mut();
    for rule in rules.filter(|rule| rule.kind.as_deref() == Some("b")) {
        if let (Some(major), Some(minor)) = (rule.major, rule.minor)
            && let Some(found) = guest(major, minor)
        {
            (rule.major, rule.minor) = (Some(found.major), Some(found.minor));
        }
    }
    let io = &mut linux.resources.block_io;
    for weight in io.weight_device.iter_mut() {
        if let Some(found) = guest(weight.major, weight.minor) {
            (weight.major, weight.minor) = (found.major, found.minor);
        }
    }
    let throttles = io
        .throttle_read_bps_device
        .iter_mut()
        .chain(io.throttle_write_bps_device.iter_mut())
        .chain(io.throttle_read_iops_device.iter_mut())
        .chain(io.throttle_write_iops_device.iter_mut());
    for throttle in throttles {
        if let Some(found) = guest(throttle.major, throttle.minor) {
            (throttle.major, throttle.minor) = (found.major, found.minor);
        }
    }
}

/// Finds a disk; the bus is looked at anew if it is not known yet.
fn find(disk: Disk) -> Result<Found, Error> {
    match find_in(Path::new(DEVICES), disk) {
        Err(Error::None { .. }) => {
            fs::write("/sys/bus/pci/rescan", "1")
                .map_err(doing("look for disks on the PCI bus"))?;
            find_in(Path::new(DEVICES), disk)
        }
        found => found,
    }
}

fn find_in(devices: &Path, disk: Disk) -> Result<Found, Error> {
    let none = || Error::None { slot: disk.slot() };
    let block = block_device(&devices.join(disk.address())).ok_or_else(none)?;
    let name = block.file_name().and_then(|name| name.to_str());
    let number = fs::read_to_string(block.join("dev")).map_err(doing("read a disk's number"))?;
    let (major, minor) = number.trim().split_once(':').ok_or_else(none)?;
    Ok(Found {
        device: format!("/dev/{}", name.ok_or_else(none)?),
        major: major.parse().map_err(|_| none())?,
        minor: minor.parse().map_err(|_| none())?,
    })
}

/// The directory of the block device of a PCI device: `virtioN/block/NAME`.
fn block_device(device: &Path) -> Option<PathBuf> {
    fs::read_dir(device)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path().join("block")))
        .find_map(|block| Some(fs::read_dir(block).ok()?.next()?.ok()?.path()))
}

/// Waits until nothing has the disk at a PCI address any more, so that what was written to it is
/// there when it is left. Other devices are not waited for.
///
/// The file systems of a container end with its last process, but the kernel may let go of them a
/// moment later.
///
/// # Errors
/// When it stays in use.
pub(crate) async fn release(address: &str) -> Result<(), Error> {
    let Some(block) = block_device(&Path::new(DEVICES).join(address)) else {
        return Ok(());
    };
    let name = block.file_name().unwrap_or_default().to_string_lossy();
    let device = format!("/dev/{name}");
    let end = Instant::now() + RELEASE;
    loop {
        match exclusively(&device) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::ResourceBusy => {
                return Err(doing(&format!("open {device}"))(error));
            }
            Err(_) if Instant::now() < end => sleep(Duration::from_millis(2)).await,
            Err(_) => {
                let slot = Disk::of_address(address).map_or(0, Disk::slot);
                return Err(Error::Busy { slot, device });
            }
        }
    }
}

/// Opens a block device as a mount does: it fails while something else has it so.
fn exclusively(device: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(device)
}

fn doing(what: &str) -> impl FnOnce(io::Error) -> Error {
    let doing = what.to_owned();
    move |source| Error::Step { doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(slot: u8) -> Disk {
        Disk::in_slot(slot).expect("a slot")
    }

    #[test]
    fn a_disk_is_found_by_its_slot() {
        let bus = tempfile::tempdir().expect("a directory");
        let block = bus.path().join("0000:00:0b.0/virtio6/block/vdc");
        fs::create_dir_all(&block).expect("made");
        fs::create_dir_all(bus.path().join("0000:00:0b.0/msi_irqs")).expect("made");
        fs::write(block.join("dev"), "254:32\n").expect("written");
        let found = find_in(bus.path(), slot(11)).expect("found");
        let expected = Found {
            device: "/dev/vdc".to_owned(),
            major: 254,
            minor: 32,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn a_slot_without_a_disk_is_named() {
        let bus = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(bus.path().join("0000:00:03.0/virtio1/net/eth0")).expect("made");
        for empty in [3, 4] {
            let error = find_in(bus.path(), slot(empty)).expect_err("none");
            assert!(
                error.to_string().contains(&format!("slot {empty} ")),
                "{error}"
            );
        }
    }

    #[test]
    fn numbers_of_the_host_become_the_guests_everywhere() {
        let json = r#"{"ociVersion":"1.0.2","process":{"cwd":"/","args":["sh"]},"linux":{
            "devices":[{"type":"b","path":"/dev/x","major":7,"minor":1},
                       {"type":"c","path":"/dev/y","major":7,"minor":1}],
            "resources":{"devices":[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"b","major":7,"minor":1,"access":"rw"},
                {"allow":true,"type":"b","major":7,"minor":2,"access":"rw"}],
              "blockIO":{"throttleReadBpsDevice":[{"major":7,"minor":1,"rate":5}]}}}}"#;
        let mut spec = Spec::parse(json.as_bytes()).expect("parsed");
        let host = HostDevice {
            major: 7,
            minor: 1,
            disk: slot(9),
        };
        let found = Found {
            device: "/dev/vdb".to_owned(),
            major: 254,
            minor: 16,
        };
        renumber(&mut spec, &[(host, found)]);
        let devices: Vec<_> = spec
            .linux
            .devices
            .iter()
            .map(|d| (d.major, d.minor))
            .collect();
        assert_eq!(devices, [(254, 16), (7, 1)]);
        assert_eq!(spec.linux.devices[0].guest.as_deref(), Some("/dev/vdb"));
        let rules = &spec.linux.resources.devices;
        assert_eq!((rules[1].major, rules[1].minor), (Some(254), Some(16)));
        assert_eq!((rules[2].major, rules[2].minor), (Some(7), Some(2)));
        let throttle = &spec.linux.resources.block_io.throttle_read_bps_device[0];
        assert_eq!((throttle.major, throttle.minor), (254, 16));
    }
}
