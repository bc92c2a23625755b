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
    Error, doing, options,
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

/// Mounts one of the configuration's `mounts` inside `root`; what is bound there from the guest
/// gets the attributes `held` besides its own.
pub(super) fn mount(
    root: BorrowedFd<'_>,
    mount: &spec::Mount,
    linux: &Linux,
    cgroup: &Path,
    held: u64,
) -> Result<(), Error> {
    let destination = mount.destination.as_str();
    let options = options::parse(mount.options.iter().map(String::as_str)).map_err(|option| {
        Error::Option {
            option: option.to_owned(),
            destination: destination.to_owned(),
        }
    })?;
    let kind = mount.kind.as_deref().unwrap_or("bind");
    let source = mount.source.as_deref().unwrap_or_default();
    let tree = if options.bind || kind == "bind" {
        bind(source, &options)
            .and_then(|tree| hold(tree.as_fd(), held).map(|()| tree))
            .map_err(|source_error| (source_error, String::new()))
    } else if kind == "cgroup" || kind == "cgroup2" {
        cgroup_tree(linux, cgroup, &options)
    } else {
        let mut data: Vec<_> = std::iter::once((
            "source",
            Some(if source.is_empty() { kind } else { source }),
        ))
        .chain(options.data.iter().map(|(k, v)| (k.as_str(), v.as_deref())))
        .collect();
        let asked = options.attr.set & libc::MOUNT_ATTR_RDONLY != 0;
        if source.starts_with("/dev/") && (asked || is_read_only(source)) {
            data.push(("ro", None));
        }
        filesystem(kind, &data, options.attr.set)
    };
    let attached = tree.and_then(|tree| {
        set_attributes(tree.as_fd(), &options)
            .and_then(|()| attach(root, tree.as_fd(), destination))
            .map_err(|error| (error, String::new()))
    });
    attached.map_err(|(source_error, hint)| Error::Mount {
        what: if source.is_empty() { kind } else { source }.to_owned(),
        destination: destination.to_owned(),
        hint,
        source: source_error,
    })
}

/// Whether the guest's kernel knows the block device `device` as one that cannot be written.
pub(super) fn is_read_only(device: &str) -> bool {
    let Some(name) = Path::new(device).file_name() else {
        return false;
    };
    let told = Path::new("/sys/class/block").join(name).join("ro");
    std::fs::read_to_string(told).is_ok_and(|text| text.trim() == "1")
}

/// A detached copy of the guest's `source`.
fn bind(source: &str, options: &Options) -> io::Result<OwnedFd> {
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

const READ_ONLY: MountAttr = MountAttr {
    set: libc::MOUNT_ATTR_RDONLY,
    clear: 0,
    propagation: 0,
    userns_fd: 0,
};

/// Applies `root.readonly` and `linux.rootfsPropagation`.
pub(super) fn seal(root: BorrowedFd<'_>, spec: &Spec) -> Result<(), Error> {
    if spec.root.readonly {
        sys::mount_setattr(root, false, &READ_ONLY).map_err(doing("make the root read-only"))?;
    }
    let Some(propagation) = spec
        .linux
        .rootfs_propagation
        .as_deref()
        .filter(|p| !p.is_empty())
    else {
        return Ok(());
    };
    let parsed = options::parse([propagation])
        .ok()
        .and_then(|o| o.propagation);
    let (propagation, recursive) = parsed.ok_or_else(|| Error::Value {
        field: "linux.rootfsPropagation",
        value: propagation.to_owned(),
        reason: "it is one of private, shared, slave, unbindable, each alone or with an r before it",
    })?;
    let attr = MountAttr {
        propagation,
        ..MountAttr::default()
    };
    sys::mount_setattr(root, recursive, &attr).map_err(doing("set the root's propagation"))
}
