//! A container's files as its relay has them: who joins that process's mounts, as `podman cp` and
//! `nsenter` do, is in the container's root and not in the host's.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
    sys::stat::Mode,
    unistd::{chroot, fchdir, pivot_root},
};

use crate::{
    bundle::{Bundle, Source},
    sandbox::ReadOnly,
    sys,
};

/// In a relay's environment, it says that the host's files are below its own root yet.
pub(super) const HOST_BELOW: &CStr = c"BULKHEAD_HOST_BELOW=yes";

/// The root and what is mounted in it: copies of mounts, attached nowhere yet. What the host unmounts
/// later is unmounted in them, and what is mounted in them is not seen by the host.
#[derive(Debug)]
pub(super) struct Tree {
    path: PathBuf,
    root: OwnedFd,
    volumes: Vec<Volume>,
}

#[derive(Debug)]
struct Volume {
    mount: OwnedFd,
    place: PathBuf,
}

impl Tree {
    /// That of a bundle.
    pub(super) fn of(bundle: &Bundle) -> io::Result<Self> {
        let mounts = bundle.spec().mounts().as_deref().unwrap_or_default();
        let mut volumes = Vec::new();
        for volume in bundle.volumes() {
            if let (Source::Shared { file, given }, Some(mount)) =
                (&volume.source, mounts.get(volume.index))
            {
                volumes.push(Volume {
                    mount: copy(file, given.read_only != ReadOnly::No)?,
                    place: mount.destination().clone(),
                });
            }
        }
        Ok(Self {
            path: bundle.root_path().to_owned(),
            root: copy(bundle.root(), false)?,
            volumes,
        })
    }

    /// Makes it the root of this process's mount namespace, which is new, with a /proc where that
    /// is of a namespace of its own. This process alone still has the host's files, for a program
    /// to be executed, which then calls [`leave_host`].
    pub(super) fn enter(&self, own_processes: bool) -> nix::Result<()> {
        let nothing = None::<&str>;
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(nothing, "/", nothing, slave, nothing)?;
        let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let host = open("/", directory, Mode::empty())?;
        let place = open(&self.path, directory, Mode::empty())?;
        sys::move_mount(self.root.as_fd(), place.as_fd()).map_err(errno)?;
        for volume in &self.volumes {
            volume.attach(&self.root)?;
        }
        if own_processes && let Some(place) = inside(&self.root, Path::new("/proc"))? {
            fchdir(&place)?;
            let harmless = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            match mount(Some("proc"), ".", Some("proc"), harmless, nothing) {
                // A user namespace may see no processes but those that the host's /proc shows; and
                // a file is no place for it.
                Ok(()) | Err(Errno::EPERM | Errno::ENOTDIR) => {}
                Err(errno) => return Err(errno),
            }
        }
        fchdir(&self.root)?;
        // The host's root then lies on the new one, at the same place.
        pivot_root(".", ".")?;
        fchdir(&host)?;
        chroot(".")
    }
}

impl Volume {
    /// Where the container has no place for it, the guest makes one; that is soon enough.
    fn attach(&self, root: &OwnedFd) -> nix::Result<()> {
        let Some(place) = inside(root, &self.place)? else {
            return Ok(());
        };
        match sys::move_mount(self.mount.as_fd(), place.as_fd()).map_err(errno) {
            // A file is no place for a directory: the guest says so.
            Ok(()) | Err(Errno::ENOTDIR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

/// A copy of the mounts at a file or directory, attached nowhere.
fn copy(file: &OwnedFd, read_only: bool) -> io::Result<OwnedFd> {
    let copy = sys::open_tree(file.as_fd(), true)?;
    let attributes = sys::Attributes {
        propagation: MsFlags::MS_SLAVE.bits(),
        ..sys::Attributes::default()
    };
    sys::set_attributes(copy.as_fd(), true, attributes)?;
    if read_only {
        let attributes = sys::Attributes {
            set: libc::MOUNT_ATTR_RDONLY,
            ..sys::Attributes::default()
        };
        sys::set_attributes(copy.as_fd(), false, attributes)?;
    }
    Ok(copy)
}

/// A place in the container's files, whatever symbolic links these have.
fn inside(root: &OwnedFd, place: &Path) -> nix::Result<Option<OwnedFd>> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    match openat2(root, place, how) {
        Ok(file) => Ok(Some(file)),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Takes the host's files from the relay and its mount namespace, if they are there. The process
/// must have a single thread.
///
/// # Errors
/// When the kernel refuses.
pub fn leave_host() -> io::Result<()> {
    if std::env::var_os("BULKHEAD_HOST_BELOW").is_none() {
        return Ok(());
    }
    let own = File::open("/proc/self/ns/mnt")?;
    umount2("/", MntFlags::MNT_DETACH)?;
    // The host's files are this process's root still. Who joins a mount namespace gets its root.
    Ok(setns(own, CloneFlags::CLONE_NEWNS)?)
}
