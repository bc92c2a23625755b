//! A container's file tree: its root, mounts, devices, and what is hidden.
//!
//! All of it is built in the container's own mount namespace, by the process
//! that becomes the container's first; so it goes away with the container.

mod copy;
mod devices;
mod granted;
mod layers;
mod mounts;
mod options;
pub(crate) mod path;

pub(crate) use devices::open_master;
pub(crate) use granted::{Given, Granted, Users};
pub(crate) use layers::{Layer, Layers, Upper};

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    fcntl::{AT_FDCWD, OFlag, open},
    mount::{MntFlags, umount2},
    sys::stat::Mode,
    unistd::{chdir, fchdir, pivot_root},
};

use crate::{
    devices::Guard,
    spec::Spec,
    sys::{self, MountAttr},
};

/// Why a file tree could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step on the guest's side.
    #[error("cannot {doing}")]
    Step {
        /// What was being done.
        doing: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A mount.
    #[error("cannot mount {what} on {destination}{hint}")]
    Mount {
        /// Its type or source.
        what: String,
        /// Where in the container.
        destination: String,
        /// What the kernel said besides the error's number.
        hint: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An option of a mount.
    #[error("the option {option:?} of the mount on {destination} is not supported")]
    Option {
        /// The option.
        option: String,
        /// Where in the container.
        destination: String,
    },
    /// A value out of its range.
    #[error("{field} is {value:?}: {reason}")]
    Value {
        /// The property's path.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// Says what was being done when a call failed.
fn doing(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let doing = what.into();
    |source| Error::Step { doing, source }
}

/// Where the root comes from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// A directory of the guest.
    Directory(String),
    /// A block device with a file system.
    Block {
        /// The device file.
        device: String,
        /// The file system's type.
        filesystem: String,
        /// Options of its mount.
        options: Vec<String>,
    },
    /// Read-only layers under a writable one.
    Layers(Layers),
}

/// Directories of the guest, below a tmpfs, that every container's namespace mounts on.
#[derive(Debug, Clone)]
pub(crate) struct Scratch {
    /// The root, before it is entered.
    pub(crate) root: String,
    /// The lower layer of an overlay.
    pub(crate) lower: String,
    /// The memory of an overlay's upper layer.
    pub(crate) upper: String,
}

impl Scratch {
    /// Makes the directories below `directory`.
    pub(crate) fn make(directory: &Path) -> io::Result<Self> {
        let make = |name: &str| {
            let path = directory.join(name);
            std::fs::create_dir_all(&path)?;
            path.into_os_string()
                .into_string()
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
        };
        Ok(Self {
            root: make("root")?,
            lower: make("lower")?,
            upper: make("upper")?,
        })
    }
}

/// A built tree that has not been entered yet.
pub(crate) struct Rootfs {
    root: OwnedFd,
    /// `MS_...` and whether it goes to all below, which would keep the root from being entered.
    propagation: Option<(u64, bool)>,
    /// The master side of the container's terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

impl Rootfs {
    /// Builds the tree of `spec` in this process's mount namespace, which must be its own; with
    /// the mounts that were `given` to it.
    pub(crate) fn build(
        spec: &Spec,
        source: &Source,
        scratch: &Scratch,
        cgroup: &Path,
        given: &Given,
    ) -> Result<Self, Error> {
        hold_back_propagation().map_err(doing("make the mounts of the guest slaves"))?;
        let held = match Guard::of(spec) {
            Guard::Mounts => libc::MOUNT_ATTR_NODEV,
            Guard::None | Guard::Program => 0,
        };
        match given.root {
            Some(root) => attach_root(root, scratch, held)?,
            None => attach_root(open_root(source, scratch)?.as_fd(), scratch, held)?,
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(scratch.root.as_str(), flags, Mode::empty())
            .map_err(io::Error::from)
            .map_err(doing("open the root"))?;
        let surroundings = mounts::Surroundings {
            root: root.as_fd(),
            linux: &spec.linux,
            cgroup,
            held,
        };
        for (place, mount) in spec.mounts.iter().enumerate() {
            mounts::mount(&surroundings, mount, given.mount(place))?;
        }
        devices::make(root.as_fd(), spec)?;
        let terminal = match &spec.process {
            Some(process) if process.terminal => Some(devices::console(root.as_fd())?),
            _ => None,
        };
        if let Some(process) = &spec.process {
            path::open(
                root.as_fd(),
                Path::new(&process.cwd),
                path::Missing::Directory,
            )
            .map_err(doing(format!("make the working directory {}", process.cwd)))?;
        }
        mounts::hide(root.as_fd(), spec)?;
        mounts::seal(root.as_fd(), spec)?;
        Ok(Self {
            root,
            propagation: mounts::root_propagation(&spec.linux)?,
            terminal,
        })
    }

    /// Makes the tree this process's root and lets go of the guest's.
    pub(crate) fn enter(&self) -> Result<(), Error> {
        let enter = || {
            fchdir(&self.root)?;
            // The old root ends up mounted over the new one and is taken off it.
            pivot_root(".", ".")?;
            umount2(".", MntFlags::MNT_DETACH)?;
            chdir("/")
        };
        enter()
            .map_err(io::Error::from)
            .map_err(doing("enter the root"))?;
        let Some((propagation, recursive)) = self.propagation else {
            return Ok(());
        };
        let attr = MountAttr {
            propagation,
            ..MountAttr::default()
        };
        sys::mount_setattr(self.root.as_fd(), recursive, &attr)
            .map_err(doing("set the root's propagation"))
    }
}

/// Mounts made here from now on do not appear in the guest's namespace.
fn hold_back_propagation() -> io::Result<()> {
    let root = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let attr = MountAttr {
        propagation: libc::MS_SLAVE,
        ..MountAttr::default()
    };
    sys::mount_setattr(root.as_fd(), true, &attr)
}

fn open_root(source: &Source, scratch: &Scratch) -> Result<OwnedFd, Error> {
    match source {
        Source::Directory(path) => directory(path),
        Source::Block {
            device,
            filesystem,
            options,
        } => block(device, filesystem, Writes::IfPossible, options),
        Source::Layers(layers) => layers.mount(scratch, None),
    }
}

/// Attaches the root with the attributes `held` besides its own.
fn attach_root(root: BorrowedFd<'_>, scratch: &Scratch, held: u64) -> Result<(), Error> {
    mounts::hold(root, held)
        .and_then(|()| attach(root, &scratch.root))
        .map_err(doing("attach the root"))
}

fn directory(path: &str) -> Result<OwnedFd, Error> {
    let tree = || {
        let path = CString::new(path)?;
        let directory = open(
            path.as_c_str(),
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        sys::open_tree(directory.as_fd(), c"", true)
    };
    tree().map_err(doing(format!("take the root directory {path}")))
}

/// Whether a file system is mounted to be written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writes {
    IfPossible,
    Never,
}

/// Mounts the file system of a device, with options as `mount -o` takes them.
fn block(
    device: &str,
    filesystem: &str,
    writes: Writes,
    given: &[String],
) -> Result<OwnedFd, Error> {
    let given =
        options::parse(given.iter().map(String::as_str)).map_err(|option| Error::Option {
            option: option.to_owned(),
            destination: "/".into(),
        })?;
    let mut options = vec![("source", Some(device))];
    options.extend(
        given
            .data
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_deref())),
    );
    if filesystem == "erofs" && device.starts_with("/dev/pmem") {
        mounts::tell_read_only(device);
        // What is memory already is not copied into the guest's.
        options.push(("dax", Some("always")));
    }
    let mut attr = given.attr.set;
    let asked = attr & libc::MOUNT_ATTR_RDONLY != 0;
    if asked || writes == Writes::Never || mounts::is_read_only(device) {
        // The file system must know it as well: the kernel opens the device as it asks.
        options.push(("ro", None));
        attr |= libc::MOUNT_ATTR_RDONLY;
    }
    mounts::filesystem(filesystem, &options, attr).map_err(|(source, hint)| Error::Mount {
        what: format!("{filesystem} of {device}"),
        destination: "/".into(),
        hint,
        source,
    })
}

/// Attaches `mount` on the guest's directory `target`.
fn attach(mount: BorrowedFd<'_>, target: &str) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let target = nix::fcntl::openat(AT_FDCWD, target, flags, Mode::empty())?;
    sys::move_mount(mount, target.as_fd())
}
