//! The empty root.

use std::{fs, io, os::fd::RawFd, path::Path};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{chdir, pivot_root},
};

use super::{Error, OWN_FILES, sys};

/// Where the new root is put together: a directory that every root has.
const PLACE: &str = "/proc";

const NOTHING: Option<&str> = None;

const HARMLESS: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Makes an empty, read-only file system the root of the mount namespace and
/// lets go of the old one.
pub(super) fn enter(shared: &[RawFd]) -> Result<(), Error> {
    let step = |step| {
        move |errno: nix::errno::Errno| Error {
            step,
            source: errno.into(),
        }
    };
    let io_step = |step| move |source| Error { step, source };

    // What happens here stays here. What is mounted below a shared directory later still comes
    // in: that mount was made by the launcher and is none of these.
    let ours = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NOTHING, "/", NOTHING, ours, NOTHING).map_err(step(
        "part its mounts from the host's; was it started by vmm::launch?",
    ))?;
    // A few pages and names are enough for the directories below.
    let size = format!("size=64k,nr_inodes={},mode=0755", shared.len() + 8);
    mount(
        Some("jail"),
        PLACE,
        Some("tmpfs"),
        HARMLESS,
        Some(size.as_str()),
    )
    .map_err(step("mount an empty root"))?;
    chdir(PLACE).map_err(step("go to the empty root"))?;

    for (index, number) in shared.iter().enumerate() {
        let target = format!("shared/{index}");
        fs::create_dir_all(&target).map_err(io_step("make a place for a shared directory"))?;
        sys::attach(*number, Path::new(&target)).map_err(io_step(
            "put a shared directory into its root; a launcher that may mount must pass it",
        ))?;
    }
    if !shared.is_empty() {
        show_own_files()?;
    }

    pivot_root(".", ".").map_err(step("change its root; is the host's root an initramfs?"))?;
    // Both roots are stacked here now, the old one on top.
    umount2(".", MntFlags::MNT_DETACH).map_err(step("let go of the host's root"))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | HARMLESS;
    mount(NOTHING, "/", NOTHING, read_only, NOTHING).map_err(step("make its root read-only"))?;
    chdir("/").map_err(step("go to its root"))
}

/// Shows the process its own descriptors and its list of mounts in [`OWN_FILES`], and nothing else
/// of `/proc`: its memory is a file there, and its program.
fn show_own_files() -> Result<(), Error> {
    let io_step = |step| move |source| Error { step, source };
    // Files are opened again by their descriptors' numbers, for reading or writing.
    fs::create_dir("proc").map_err(io_step("make a place for /proc"))?;
    let proc = Some("proc");
    mount(proc, "proc", proc, HARMLESS, Some("subset=pid")).map_err(|errno| Error {
        step: "mount a /proc of its own; where the host's is partly hidden, as in a container, \
               directories cannot be shared",
        source: errno.into(),
    })?;
    fs::create_dir(below_root(OWN_FILES.descriptors))
        .and_then(|()| fs::write(below_root(OWN_FILES.mounts), ""))
        .map_err(io_step("make places for what it needs of /proc"))?;
    for (file, place) in [
        ("proc/self/fd", OWN_FILES.descriptors),
        ("proc/self/mountinfo", OWN_FILES.mounts),
    ] {
        mount(
            Some(file),
            below_root(place),
            NOTHING,
            MsFlags::MS_BIND,
            NOTHING,
        )
        .map_err(|errno| Error {
            step: "keep what it needs of /proc",
            source: errno.into(),
        })?;
    }
    umount2("proc", MntFlags::MNT_DETACH)
        .map_err(io::Error::from)
        .and_then(|()| fs::remove_dir("proc"))
        .map_err(io_step("let go of /proc"))
}

/// A path of the new root while it is the working directory.
fn below_root(path: &str) -> &str {
    path.trim_start_matches('/')
}
