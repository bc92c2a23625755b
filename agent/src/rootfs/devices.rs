//! `/dev` of a container.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mknodat},
    unistd::{Gid, Uid, fchownat, symlinkat},
};

use super::{
    Error, doing, mounts,
    path::{self, Missing},
};
use crate::{
    spec::{Device, Spec},
    sys,
};

/// Devices that every container has, by the specification: path, major, minor.
const DEFAULT: &[(&str, i64, i64)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Links that every container has: name in /dev, target.
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes the default devices, `linux.devices` and the links, unless the guest's or host's own
/// /dev is bound there.
pub(super) fn make(root: BorrowedFd<'_>, spec: &Spec) -> Result<(), Error> {
    let bound = spec.mounts.iter().any(|mount| {
        mount.destination.trim_end_matches('/') == "/dev"
            && (mount.kind.as_deref() == Some("bind")
                || mount.options.iter().any(|o| o == "bind" || o == "rbind"))
    });
    if bound {
        return Ok(());
    }
    let default = DEFAULT.iter().map(|(path, major, minor)| Device {
        kind: "c".into(),
        path: (*path).into(),
        major: *major,
        minor: *minor,
        ..Device::default()
    });
    // The configuration's own come first: they may give a default device another mode.
    let own_users = spec.linux.namespaces.iter().any(|n| n.kind == "user");
    for device in spec.linux.devices.iter().cloned().chain(default) {
        if own_users {
            bind_device(root, &device)?;
        } else {
            make_device(root, &device)?;
        }
    }
    let dev = path::open(root, Path::new("/dev"), Missing::Directory)
        .map_err(doing("open /dev of the container"))?;
    for (name, target) in LINKS {
        match symlinkat(*target, &dev, *name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(doing(format!("make /dev/{name}"))(error.into())),
        }
    }
    Ok(())
}

/// Shows the guest's own device file: root of a user namespace cannot make one.
fn bind_device(root: BorrowedFd<'_>, device: &Device) -> Result<(), Error> {
    let bind = || {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let path = device.guest.as_ref().unwrap_or(&device.path);
        let source = nix::fcntl::open(path.as_str(), flags, Mode::empty())?;
        mounts::bind_file(root, source.as_fd(), &device.path)
    };
    bind().map_err(doing(format!("show the guest's device {}", device.path)))
}

fn make_device(root: BorrowedFd<'_>, device: &Device) -> Result<(), Error> {
    let kind = match device.kind.as_str() {
        "c" | "u" => SFlag::S_IFCHR,
        "b" => SFlag::S_IFBLK,
        "p" => SFlag::S_IFIFO,
        other => {
            return Err(Error::Value {
                field: "linux.devices.type",
                value: other.to_owned(),
                reason: "it is one of c, u, b and p",
            });
        }
    };
    let number = |number: i64| u64::try_from(number).unwrap_or(0);
    let id = makedev(number(device.major), number(device.minor));
    let mode = Mode::from_bits_truncate(device.file_mode.unwrap_or(0o666) & 0o7777);
    let owner = Uid::from_raw(device.uid.unwrap_or(0));
    let group = Gid::from_raw(device.gid.unwrap_or(0));
    let make = || {
        let (directory, name) = path::open_parent(root, Path::new(&device.path))?;
        match mknodat(&directory, name.as_os_str(), kind, mode, id) {
            Ok(()) => {}
            // Made before, by the configuration or in the image.
            Err(Errno::EEXIST) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        // mknod took the umask off the mode.
        fchmodat(
            &directory,
            name.as_os_str(),
            mode,
            FchmodatFlags::FollowSymlink,
        )?;
        let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
        fchownat(
            &directory,
            name.as_os_str(),
            Some(owner),
            Some(group),
            flags,
        )?;
        io::Result::Ok(())
    };
    make().map_err(doing(format!("make the device {}", device.path)))
}

/// Opens a new terminal of the container's /dev/pts and shows it as /dev/console too.
pub(super) fn console(root: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    let step = doing("open a terminal in /dev/pts of the container, which must be a devpts mount");
    (|| {
        let master = open_master(root)?;
        let peer = sys::open_peer(master.as_fd())?;
        drop(peer);
        let number = sys::terminal_number(master.as_fd())?;
        let peer = path::open(
            root,
            Path::new(&format!("/dev/pts/{number}")),
            Missing::Fail,
        )?;
        mounts::bind_file(root, peer.as_fd(), "/dev/console")?;
        Ok(master)
    })()
    .map_err(step)
}

/// Opens the master side of a new terminal of the devpts that is mounted in `root`.
pub(crate) fn open_master(root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let pts = path::open(root, Path::new("/dev/pts"), Missing::Fail)?;
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let master = openat(&pts, "ptmx", flags, Mode::empty())?;
    sys::unlock(master.as_fd())?;
    Ok(master)
}
