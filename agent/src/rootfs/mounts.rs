//! The configuration's mounts, and the paths it hides or seals.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, SFlag},
};

use super::{
    Error, copy, doing, options,
    options::Options,
    path::{self, Missing},
};
use crate::{
    spec::{self, Linux, Spec},
    sys::{self, FsContext, MountAttr},
};

/// Makes a detached mount of a new file system; the error comes with what the kernel says of it.
pub(super) fn filesystem(
    kind: &str,
    options: &[(&str, Option<&str>)],
    attr: u64,
) -> Result<OwnedFd, (io::Error, String)> {
    let context = FsContext::open(kind).map_err(|error| (error, String::new()))?;
    options
        .iter()
        .try_for_each(|(key, value)| context.set(key, *value))
        .and_then(|()| context.mount(attr))
        .map_err(|error| {
            let hint = context.complaint().map(|text| format!(" ({text})"));
            (error, hint.unwrap_or_default())
        })
}

/// Gives a detached mount, and all below it, the attributes `held`.
pub(super) fn hold(tree: BorrowedFd<'_>, held: u64) -> io::Result<()> {
    if held == 0 {
        return Ok(());
    }
    let attr = MountAttr {
        set: held,
        ..MountAttr::default()
    };
    sys::mount_setattr(tree, true, &attr)
}

/// Where mounts are made.
pub(super) struct Surroundings<'a> {
    /// The container's root.
    pub(super) root: BorrowedFd<'a>,
    /// The configuration around the mounts.
    pub(super) linux: &'a Linux,
    /// The container's cgroup.
    pub(super) cgroup: &'a Path,
    /// Attributes that everything gets besides its own whose files are not the kernel's own doing.
    pub(super) held: u64,
}

/// The options of a mount of the configuration.
pub(super) fn options(mount: &spec::Mount) -> Result<Options, Error> {
    options::parse(mount.options.iter().map(String::as_str))
        .map_err(|option| unsupported(option, mount))
}

fn unsupported(option: &str, mount: &spec::Mount) -> Error {
    Error::Option {
        option: option.to_owned(),
        destination: mount.destination.clone(),
    }
}

/// Whether a mount takes a directory or file of the guest.
pub(super) fn is_bind(mount: &spec::Mount, options: &Options) -> bool {
    options.bind || mount.kind.as_deref().is_none_or(|kind| kind == "bind")
}

/// Whether a file system of this type comes with files, device files among them perhaps, that
/// somebody made before: a disk, or layers of directories.
fn has_files(kind: &str) -> bool {
    !matches!(kind, "tmpfs" | "devtmpfs" | "devpts")
}

/// Mounts one of the configuration's `mounts`, of which the agent may have `given` the tree.
pub(super) fn mount(
    at: &Surroundings<'_>,
    mount: &spec::Mount,
    given: Option<BorrowedFd<'_>>,
) -> Result<(), Error> {
    let options = options(mount)?;
    let is_bind = is_bind(mount, &options);
    if is_bind && let Some(option) = options.not_of_a_bind() {
        return Err(unsupported(option, mount));
    }
    if options.copy_up && (is_bind || mount.kind.as_deref() != Some("tmpfs")) {
        return Err(unsupported("tmpcopyup", mount));
    }
    let mounted = if options.remount {
        remount(at.root, mount, &options, is_bind)
    } else {
        let tree = match given {
            Some(tree) => tree.try_clone_to_owned().map_err(plain),
            None if is_bind => bind(source(mount), &options).map_err(plain),
            None => new_tree(at, mount, &options),
        };
        tree.and_then(|tree| {
            let kind = mount.kind.as_deref().unwrap_or_default();
            let held = if is_bind || has_files(kind) {
                at.held
            } else {
                0
            };
            hold(tree.as_fd(), held)
                .and_then(|()| set_attributes(tree.as_fd(), &options))
                .and_then(|()| attach(at.root, tree.as_fd(), &mount.destination))
                .map_err(plain)
        })
    };
    mounted.map_err(|(error, hint)| Error::Mount {
        what: match (source(mount), &mount.kind) {
            ("", Some(kind)) => kind.clone(),
            (device, Some(kind)) if device.starts_with("/dev/") => format!("{kind} of {device}"),
            (source, _) => source.to_owned(),
        },
        destination: mount.destination.clone(),
        hint,
        source: error,
    })
}

/// A failure, and what the kernel says of it.
type Failure = (io::Error, String);

fn plain(error: io::Error) -> Failure {
    (error, String::new())
}

fn source(mount: &spec::Mount) -> &str {
    mount.source.as_deref().unwrap_or_default()
}

/// A detached mount of a new file system.
fn new_tree(
    at: &Surroundings<'_>,
    mount: &spec::Mount,
    options: &Options,
) -> Result<OwnedFd, Failure> {
    let kind = mount.kind.as_deref().unwrap_or_default();
    if kind == "cgroup" || kind == "cgroup2" {
        return cgroup_tree(at.linux, at.cgroup, options);
    }
    let source = source(mount);
    let named = if source.is_empty() { kind } else { source };
    let mut data = vec![("source", Some(named))];
    for (key, value) in &options.data {
        match value.as_deref() {
            // The kernel reads 255 bytes of a value, and layers one by one.
            Some(layers) if kind == "overlay" && key == "lowerdir" && !layers.contains('\\') => {
                data.extend(layers.split(':').map(|layer| ("lowerdir+", Some(layer))));
            }
            value => data.push((key, value)),
        }
    }
    let asked = options.attr.set & libc::MOUNT_ATTR_RDONLY != 0;
    if source.starts_with("/dev/") && (asked || is_read_only(source)) {
        data.push(("ro", None));
    }
    if !options.copy_up {
        return filesystem(kind, &data, options.attr.set);
    }
    let tree = filesystem(kind, &data, options.attr.set & !libc::MOUNT_ATTR_RDONLY)?;
    copy_up(at.root, mount, tree.as_fd())
        .and_then(|()| sys::mount_setattr(tree.as_fd(), false, &options.attr))
        .map_err(plain)?;
    Ok(tree)
}

/// Gives a new tmpfs what the container's directory holds that it is going to cover.
fn copy_up(root: BorrowedFd<'_>, mount: &spec::Mount, tree: BorrowedFd<'_>) -> io::Result<()> {
    match existing(root, &mount.destination)? {
        Some(covered) if path::kind(covered.as_fd())? == SFlag::S_IFDIR => {
            copy::contents(covered.as_fd(), tree)
        }
        _ => Ok(()),
    }
}

/// Changes what is mounted at a mount's destination: a bind only there, a file system everywhere.
fn remount(
    root: BorrowedFd<'_>,
    mount: &spec::Mount,
    options: &Options,
    is_bind: bool,
) -> Result<(), Failure> {
    let target = path::open(root, Path::new(&mount.destination), Missing::Fail).map_err(plain)?;
    if !is_bind && !options.data.is_empty() {
        let context = FsContext::pick(target.as_fd()).map_err(plain)?;
        options
            .data
            .iter()
            .try_for_each(|(key, value)| context.set(key, value.as_deref()))
            .and_then(|()| context.reconfigure())
            .map_err(|error| {
                let hint = context.complaint().map(|text| format!(" ({text})"));
                (error, hint.unwrap_or_default())
            })?;
    }
    let change = |recursive, attr: &MountAttr| match attr {
        attr if *attr == MountAttr::default() => Ok(()),
        attr => sys::mount_setattr(target.as_fd(), recursive, attr),
    };
    change(false, &options.attr)
        .and_then(|()| change(true, &options.recursive_attr))
        .and_then(|()| match options.propagation {
            Some((propagation, recursive)) => {
                let attr = MountAttr {
                    propagation,
                    ..MountAttr::default()
                };
                change(recursive, &attr)
            }
            None => Ok(()),
        })
        .map_err(plain)
}

/// Whether the guest's kernel knows the block device `device` as one that cannot be written.
pub(super) fn is_read_only(device: &str) -> bool {
    let Some(name) = Path::new(device).file_name() else {
        return false;
    };
    let told = Path::new("/sys/class/block").join(name).join("ro");
    std::fs::read_to_string(told).is_ok_and(|text| text.trim() == "1")
}

/// Tells the kernel that persistent memory is read-only, so that who writes to the device gets an
/// error. The host lets nobody write to it in any case, but then it only stays as it is.
pub(super) fn tell_read_only(device: &str) {
    let Some(name) = Path::new(device).file_name() else {
        return;
    };
    // The device's namespace is of a region, which has the switch.
    let region = Path::new("/sys/class/block").join(name).join("device/..");
    // Nothing is less safe without it.
    let _ = std::fs::write(region.join("read_only"), "1");
}

/// A detached copy of the guest's `source`.
pub(super) fn bind(source: &str, options: &Options) -> io::Result<OwnedFd> {
    let source = CString::new(source)?;
    let source = open(
        source.as_c_str(),
        OFlag::O_PATH | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let tree = sys::open_tree(source.as_fd(), c"", options.recursive_bind)?;
    if options.attr != MountAttr::default() {
        sys::mount_setattr(tree.as_fd(), false, &options.attr)?;
    }
    Ok(tree)
}

/// The cgroup file system as the container sees it: below its own cgroup namespace, or, when it
/// has none, its own cgroup's directory.
fn cgroup_tree(
    linux: &Linux,
    cgroup: &Path,
    options: &Options,
) -> Result<OwnedFd, (io::Error, String)> {
    if linux.namespaces.iter().any(|n| n.kind == "cgroup") {
        return filesystem("cgroup2", &[("source", Some("cgroup"))], options.attr.set);
    }
    let path = cgroup.to_string_lossy();
    bind(&path, options).map_err(|error| (error, String::new()))
}

fn set_attributes(tree: BorrowedFd<'_>, options: &Options) -> io::Result<()> {
    if options.recursive_attr != MountAttr::default() {
        sys::mount_setattr(tree, true, &options.recursive_attr)?;
    }
    // A copy of a shared mount would share; the specification's default is private.
    let (propagation, recursive) = options.propagation.unwrap_or((libc::MS_PRIVATE, true));
    let attr = MountAttr {
        propagation,
        ..MountAttr::default()
    };
    sys::mount_setattr(tree, recursive, &attr)
}

/// Attaches `tree` on `destination` inside `root`, which is made when absent.
fn attach(root: BorrowedFd<'_>, tree: BorrowedFd<'_>, destination: &str) -> io::Result<()> {
    let missing = match path::kind(tree)? {
        SFlag::S_IFDIR => Missing::Directory,
        _ => Missing::File,
    };
    let target = path::open(root, Path::new(destination), missing)?;
    sys::move_mount(tree, target.as_fd())
}

/// Attaches a copy of the guest's `source` on `destination` inside `root`.
pub(super) fn bind_file(
    root: BorrowedFd<'_>,
    source: BorrowedFd<'_>,
    destination: &str,
) -> io::Result<()> {
    attach(
        root,
        sys::open_tree(source, c"", false)?.as_fd(),
        destination,
    )
}

/// Applies `linux.maskedPaths` and `linux.readonlyPaths`; paths that are not there need neither.
pub(super) fn hide(root: BorrowedFd<'_>, spec: &Spec) -> Result<(), Error> {
    for masked in &spec.linux.masked_paths {
        mask(root, masked).map_err(doing(format!("mask {masked}")))?;
    }
    for sealed in &spec.linux.readonly_paths {
        seal_path(root, sealed).map_err(doing(format!("make {sealed} read-only")))?;
    }
    Ok(())
}

fn mask(root: BorrowedFd<'_>, masked: &str) -> io::Result<()> {
    let Some(target) = existing(root, masked)? else {
        return Ok(());
    };
    if path::kind(target.as_fd())? == SFlag::S_IFDIR {
        let empty = FsContext::open("tmpfs")?;
        empty.set("size", Some("0"))?;
        let empty = empty.mount(libc::MOUNT_ATTR_RDONLY)?;
        return sys::move_mount(empty.as_fd(), target.as_fd());
    }
    let null = open("/dev/null", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let null = sys::open_tree(null.as_fd(), c"", false)?;
    sys::move_mount(null.as_fd(), target.as_fd())
}

fn seal_path(root: BorrowedFd<'_>, sealed: &str) -> io::Result<()> {
    let Some(target) = existing(root, sealed)? else {
        return Ok(());
    };
    let tree = sys::open_tree(target.as_fd(), c"", true)?;
    sys::mount_setattr(tree.as_fd(), true, &READ_ONLY)?;
    sys::move_mount(tree.as_fd(), target.as_fd())
}

/// Opens a path of the container, nothing where it is absent.
fn existing(root: BorrowedFd<'_>, at: &str) -> io::Result<Option<OwnedFd>> {
    match path::open(root, Path::new(at), Missing::Fail) {
        Ok(fd) => Ok(Some(fd)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

const READ_ONLY: MountAttr = MountAttr::setting(libc::MOUNT_ATTR_RDONLY);

/// Applies `root.readonly`.
pub(super) fn seal(root: BorrowedFd<'_>, spec: &Spec) -> Result<(), Error> {
    if spec.root.readonly {
        sys::mount_setattr(root, false, &READ_ONLY).map_err(doing("make the root read-only"))?;
    }
    Ok(())
}

/// What `linux.rootfsPropagation` asks for: `MS_...`, and whether it goes to all below.
pub(super) fn root_propagation(linux: &Linux) -> Result<Option<(u64, bool)>, Error> {
    let Some(word) = linux
        .rootfs_propagation
        .as_deref()
        .filter(|p| !p.is_empty())
    else {
        return Ok(None);
    };
    let parsed = options::parse([word]).ok().and_then(|o| o.propagation);
    parsed.map(Some).ok_or_else(|| Error::Value {
        field: "linux.rootfsPropagation",
        value: word.to_owned(),
        reason: "it is one of private, shared, slave, unbindable, each alone or with an r before it",
    })
}
