//! What of the host a configuration mounts in the container: bind mounts of
//! directories and files.

use std::{
    fs::{File, OpenOptions},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
};

use nix::{
    libc,
    sys::{
        stat::{major, minor},
        statfs::{TMPFS_MAGIC, fstatfs},
    },
};
use oci_spec::runtime::{Mount, Spec};

use super::{
    Error,
    disk::{self, Disk},
};
use crate::{
    sandbox::{Given, ReadOnly},
    text,
};

/// Where a container has its shared memory.
const SHM: &str = "/dev/shm";

/// A mount of something of the host.
#[derive(Debug)]
pub struct Volume {
    /// Which of the configuration's `mounts`.
    pub index: usize,
    /// What is mounted.
    pub source: Source,
}

/// What a volume is.
#[derive(Debug)]
pub enum Source {
    /// A directory or file of the host.
    Shared {
        /// Opened by its path only.
        file: OwnedFd,
        /// How the guest gets it.
        given: Given,
    },
    /// The pod's shared memory, which is the guest's.
    Memory {
        /// Its size.
        bytes: u64,
    },
    /// A file system on a block device or in an image file, which the guest mounts.
    Disk(Disk),
    /// A device that every guest has, too.
    Device {
        /// Its path there.
        path: &'static str,
    },
}

/// The volumes of `spec`; relative sources are relative to the bundle.
pub(super) fn of(spec: &Spec, bundle: &Path) -> Result<Vec<Volume>, Error> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let source = |mount: &Mount| match mount.typ().as_deref() {
        _ if is_bind(mount) => open(mount, bundle).map(Some),
        Some(kind) if disk::is_of_disk(kind) || disk::is_unknown(kind) => {
            find_disk(mount, kind, bundle).map(Source::Disk).map(Some)
        }
        _ => Ok(None),
    };
    let volumes = mounts.iter().enumerate().map(|(index, mount)| {
        let source = source(mount)?;
        Ok(source.map(|source| Volume { index, source }))
    });
    volumes.filter_map(Result::transpose).collect()
}

fn find_disk(mount: &Mount, kind: &str, bundle: &Path) -> Result<Disk, Error> {
    let path = bundle.join(mount.source().as_deref().unwrap_or(Path::new("")));
    let found = match disk::is_of_disk(kind) {
        true => Disk::find(&path, has(mount, &["ro"])).map_err(|error| text::chain(&error)),
        false => Err(disk::advice(kind)),
    };
    found.map_err(|problem| Error::Volume {
        source_path: path,
        destination: mount.destination().clone(),
        problem,
    })
}

/// Whether a mount takes a file or directory of the host.
pub(super) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || has(mount, &["bind", "rbind"])
}

fn has(mount: &Mount, any_of: &[&str]) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    options
        .iter()
        .any(|option| any_of.contains(&option.as_str()))
}

fn open(mount: &Mount, bundle: &Path) -> Result<Source, Error> {
    let path = bundle.join(mount.source().as_deref().unwrap_or(Path::new("")));
    let problem = |problem: String| Error::Volume {
        source_path: path.clone(),
        destination: mount.destination().clone(),
        problem,
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(&path)
        .map_err(|error| problem(text::chain(&error)))?;
    let status = file
        .metadata()
        .map_err(|error| problem(text::chain(&error)))?;
    let kind = status.file_type();
    if kind.is_char_device()
        && let Some(path) = device(status.rdev())
    {
        return Ok(Source::Device { path });
    }
    if !kind.is_dir() && !kind.is_file() {
        return Err(problem(
            "a virtual machine can share directories and regular files of the host, no sockets, \
             pipes and devices; remove it from `mounts`"
                .to_owned(),
        ));
    }
    if mount.destination() == Path::new(SHM)
        && let Some(bytes) = memory(&file)
    {
        return Ok(Source::Memory { bytes });
    }
    Ok(Source::Shared {
        given: Given {
            recursive: has(mount, &["rbind"]),
            read_only: match (has(mount, &["rro"]), has(mount, &["ro"])) {
                (true, _) => ReadOnly::All,
                (false, true) => ReadOnly::Top,
                (false, false) => ReadOnly::No,
            },
        },
        file: file.into(),
    })
}

/// The size of the file system, if it is memory.
fn memory(file: &File) -> Option<u64> {
    let status = fstatfs(file.as_fd()).ok()?;
    let bytes = status
        .blocks()
        .saturating_mul(status.block_size().unsigned_abs());
    (status.filesystem_type() == TMPFS_MAGIC).then_some(bytes)
}

/// The guest's path of a device that is nobody's.
fn device(number: u64) -> Option<&'static str> {
    match (major(number), minor(number)) {
        (1, 3) => Some("/dev/null"),
        (1, 5) => Some("/dev/zero"),
        (1, 7) => Some("/dev/full"),
        (1, 8) => Some("/dev/random"),
        (1, 9) => Some("/dev/urandom"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn opened(source: &Path, options: &[&str]) -> Result<Source, Error> {
        let mount = json!({
            "destination": "/x", "type": "bind", "source": source, "options": options
        });
        let mount = serde_json::from_value(mount).expect("a mount");
        open(&mount, Path::new("/"))
    }

    #[test]
    fn options_say_how_a_directory_is_given() {
        let directory = tempfile::tempdir().expect("a directory");
        let given = |options: &[&str]| match opened(directory.path(), options).expect("opened") {
            Source::Shared { given, .. } => given,
            other => panic!("{other:?}"),
        };
        let all = given(&["rbind", "rro"]);
        assert_eq!((all.recursive, all.read_only), (true, ReadOnly::All));
        let top = given(&["bind", "ro"]);
        assert_eq!((top.recursive, top.read_only), (false, ReadOnly::Top));
        assert_eq!(given(&["rbind", "rw"]).read_only, ReadOnly::No);
    }

    #[test]
    fn devices_that_every_guest_has_are_the_guests() {
        let source = opened(Path::new("/dev/null"), &["bind"]).expect("opened");
        assert!(matches!(source, Source::Device { path: "/dev/null" }));
    }

    #[test]
    fn a_socket_of_the_host_is_refused_with_both_paths() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("docker.sock");
        let _socket = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        let error = opened(&path, &["bind"]).expect_err("refused").to_string();
        assert!(
            error.contains("docker.sock") && error.contains("\"/x\""),
            "{error}"
        );
    }

    #[test]
    fn a_missing_source_is_told_in_the_words_that_engines_look_for() {
        let error = opened(Path::new("/nonexistent/v"), &["bind"]).expect_err("refused");
        let error = error.to_string().to_lowercase();
        assert!(error.contains("no such file or directory"), "{error}");
    }
}
