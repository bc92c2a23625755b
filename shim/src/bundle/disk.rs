//! What of the host a container gets as a disk of its machine: file systems on block devices and
//! in image files, and block devices themselves.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{libc, sys::stat::makedev};
use oci_spec::runtime::{LinuxDeviceType, Spec};

use super::Error;

/// The file systems of disks that the guest's kernel knows.
const KNOWN: &[&str] = &["ext4", "ext3", "ext2", "erofs"];

/// Those of disks that it does not.
const UNKNOWN: &[&str] = &[
    "btrfs", "exfat", "f2fs", "iso9660", "jfs", "ntfs", "ntfs3", "squashfs", "udf", "vfat", "xfs",
];

/// Whether the file system `kind` is one of disks, which the guest mounts.
pub fn is_of_disk(kind: &str) -> bool {
    KNOWN.contains(&kind)
}

/// Whether it is one of disks that no guest can mount.
pub(super) fn is_unknown(kind: &str) -> bool {
    UNKNOWN.contains(&kind)
}

/// The file systems that can be on a disk, for those who have another.
pub(super) fn advice(kind: &str) -> String {
    format!(
        "the guest's kernel has no {kind}; it mounts {} from block devices and image files",
        KNOWN.join(", ")
    )
}

/// A file or block device with a file system. It is opened by its path only until it is claimed.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    file: OwnedFd,
    /// Whether the guest may only read it.
    read_only: bool,
}

impl Disk {
    /// Finds it.
    ///
    /// # Errors
    /// When there is none, or it is neither file nor block device.
    pub fn find(path: &Path, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is neither a block device nor an image file",
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            file: file.into(),
            read_only,
        })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest may only read it.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Opens it for a machine. A file system that two kernels write to is soon none, so one that
    /// may be written is had by nobody else: a device by no mount of the host, a file by no other
    /// machine.
    ///
    /// # Errors
    /// When somebody else has it, or it cannot be opened.
    pub fn claim(&self) -> io::Result<OwnedFd> {
        let mut options = OpenOptions::new();
        options.read(true).write(!self.read_only);
        let device = File::from(self.file.try_clone()?).metadata()?;
        let device = device.file_type().is_block_device();
        if device && !self.read_only {
            options.custom_flags(libc::O_EXCL);
        }
        let busy = |who| {
            let message =
                format!("{who} has it; a file system is written by one machine at a time");
            io::Error::new(io::ErrorKind::ResourceBusy, message)
        };
        let file = options.open(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        let file = file.map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => busy("the host or another machine"),
            _ => error,
        })?;
        if device {
            return Ok(file.into());
        }
        let locked = match self.read_only {
            true => file.try_lock_shared(),
            false => file.try_lock(),
        };
        match locked {
            // The lock is the opened file's, of which the VMM has a copy to its end.
            Ok(()) => Ok(file.into()),
            Err(TryLockError::WouldBlock) => Err(busy("another machine")),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// A block device of the host that the configuration gives to the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its number.
    pub major: u32,
    /// Its number.
    pub minor: u32,
    /// Whether the container may only read it.
    pub read_only: bool,
}

/// Where the kernel tells of block devices by their numbers.
const DEVICES: &str = "/sys/dev/block";

impl BlockDevice {
    /// Opens it for a machine.
    ///
    /// # Errors
    /// When the host does not have it.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let told = format!("{DEVICES}/{}:{}/uevent", self.major, self.minor);
        let told = fs::read_to_string(told)?;
        let name = told.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let name = name.ok_or(io::ErrorKind::NotFound)?;
        let file = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .open(Path::new("/dev").join(name))?;
        let status = file.metadata()?;
        let number = makedev(self.major.into(), self.minor.into());
        match status.file_type().is_block_device() && status.rdev() == number {
            true => Ok(file.into()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// The block devices of `linux.devices` that a rule of the configuration allows by their numbers.
///
/// A rule for all devices, as privileged containers have it, gives none: all disks of the host
/// are no business of a virtual machine.
pub(super) fn devices(spec: &Spec) -> Result<Vec<BlockDevice>, Error> {
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_deref());
    let mut found: Vec<BlockDevice> = Vec::new();
    for device in linux
        .and_then(|linux| linux.devices().as_deref())
        .unwrap_or_default()
    {
        if device.typ() != LinuxDeviceType::B {
            continue;
        }
        let number = (device.major(), device.minor());
        let named = rules.unwrap_or_default().iter().rev().find(|rule| {
            rule.typ() == Some(LinuxDeviceType::B)
                && (rule.major(), rule.minor()) == (Some(number.0), Some(number.1))
        });
        let Some(rule) = named.filter(|rule| rule.allow()) else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (u32::try_from(number.0), u32::try_from(number.1)) else {
            continue;
        };
        if !Path::new(DEVICES).join(format!("{major}:{minor}")).exists() {
            return Err(Error::Device {
                path: device.path().clone(),
                major,
                minor,
            });
        }
        let ways = rule.access().as_deref().unwrap_or("rwm");
        let device = BlockDevice {
            major,
            minor,
            read_only: !ways.contains('w'),
        };
        if !found.contains(&device) {
            found.push(device);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use serde_json::json;

    use super::*;
    use crate::testing::soon;

    fn image() -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().expect("a file");
        image.as_file().set_len(4096).expect("sized");
        image
    }

    #[test]
    fn a_file_that_is_written_is_had_by_one_machine() {
        let image = image();
        let disk = Disk::find(image.path(), false).expect("found");
        let had = disk.claim().expect("claimed");
        let error = disk.claim().expect_err("had").to_string();
        assert!(error.contains("one machine at a time"), "{error}");
        let reader = Disk::find(image.path(), true).expect("found");
        reader.claim().expect_err("written by another");
        drop(had);
        soon(|| reader.claim().ok());
        let readers = [reader.claim(), reader.claim()];
        assert!(readers.iter().all(Result::is_ok), "{readers:?}");
        disk.claim().expect_err("read by others");
    }

    #[test]
    fn a_read_only_disk_is_opened_so() {
        let image = image();
        let disk = Disk::find(image.path(), true).expect("found");
        let file = disk.claim().expect("claimed");
        nix::unistd::write(file.as_fd(), b"x").expect_err("read-only");
    }

    #[test]
    fn a_directory_is_no_disk() {
        let error = Disk::find(Path::new("/"), true).expect_err("refused");
        assert!(error.to_string().contains("neither"), "{error}");
    }

    fn of(linux: serde_json::Value) -> Result<Vec<BlockDevice>, Error> {
        let spec = json!({"ociVersion": "1.0.2", "root": {"path": "r"}, "linux": linux});
        devices(&serde_json::from_value(spec).expect("a configuration"))
    }

    #[test]
    fn only_devices_that_a_rule_names_are_given() {
        let node = json!([{"type": "b", "path": "/dev/x", "major": 4000, "minor": 7}]);
        let all =
            json!({"devices": node, "resources": {"devices": [{"allow": true, "access": "rwm"}]}});
        assert_eq!(of(all).expect("read"), []);
        let no = json!({"devices": node, "resources": {"devices": [
            {"allow": true, "type": "b", "major": 4000, "minor": 7, "access": "rwm"},
            {"allow": false, "type": "b", "major": 4000, "minor": 7, "access": "rwm"}]}});
        assert_eq!(of(no).expect("read"), []);
    }

    #[test]
    fn a_device_that_the_host_does_not_have_is_named() {
        let error = of(json!({
            "devices": [{"type": "b", "path": "/dev/x", "major": 4000, "minor": 7}],
            "resources": {"devices": [{"allow": true, "type": "b", "major": 4000, "minor": 7, "access": "r"}]}
        }));
        let error = error.expect_err("not there").to_string();
        assert!(
            error.contains("/dev/x") && error.contains("4000:7"),
            "{error}"
        );
    }
}
