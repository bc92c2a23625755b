//! A root of several layers: read-only ones, the topmost first, and over them
//! one that takes the writes, in memory or on a block device.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{Error, Scratch, Writes, attach, block, directory, doing, mounts};
use crate::sys::{self, FsContext};

/// The layers of a root.
#[derive(Debug, Clone)]
pub(crate) struct Layers {
    /// The read-only ones, the topmost first.
    pub(crate) lower: Vec<Layer>,
    /// The writable one.
    pub(crate) upper: Upper,
}

/// A read-only layer.
#[derive(Debug, Clone)]
pub(crate) enum Layer {
    /// A directory of the guest.
    Directory(String),
    /// A file system on a device.
    Block {
        /// The device file.
        device: String,
        /// The file system's type.
        filesystem: String,
    },
}

/// Where the writable layer is.
#[derive(Debug, Clone)]
pub(crate) enum Upper {
    /// In the guest's memory.
    Memory {
        /// The most that it holds; half of the memory where nothing is said.
        bytes: Option<u64>,
    },
    /// On a device.
    Block {
        /// The device file.
        device: String,
        /// The file system's type.
        filesystem: String,
    },
}

/// The most read-only layers.
const MOST: usize = 128;

impl Layers {
    /// Mounts them on top of each other. The ids of layers on devices are mapped as those of the
    /// user namespace `users`.
    pub(super) fn mount(
        &self,
        scratch: &Scratch,
        users: Option<BorrowedFd<'_>>,
    ) -> Result<OwnedFd, Error> {
        if self.lower.is_empty() || self.lower.len() > MOST {
            return Err(Error::Value {
                field: "root.layers",
                value: self.lower.len().to_string(),
                reason: "there are 1 to 128 layers",
            });
        }
        let [changes, work] = self.upper.mount(scratch)?;
        let lower = self.mount_lower(scratch, users)?;
        let mut options = vec![
            ("source", Some("overlay")),
            ("upperdir", Some(changes.as_str())),
            ("workdir", Some(work.as_str())),
        ];
        match &lower[..] {
            [one] => options.push(("lowerdir", Some(one))),
            several => options.extend(
                several
                    .iter()
                    .map(|path| ("lowerdir+", Some(path.as_str()))),
            ),
        }
        mounts::filesystem("overlay", &options, 0).map_err(|(source, hint)| Error::Mount {
            what: "an overlay".into(),
            destination: "/".into(),
            hint,
            source,
        })
    }

    /// Mounts the read-only layers; answers where.
    fn mount_lower(
        &self,
        scratch: &Scratch,
        users: Option<BorrowedFd<'_>>,
    ) -> Result<Vec<String>, Error> {
        if let [one] = &self.lower[..] {
            one.mount(&scratch.lower, users)?;
            return Ok(vec![scratch.lower.clone()]);
        }
        let places = FsContext::open("tmpfs")
            .and_then(|tmpfs| tmpfs.mount(0))
            .map_err(doing("make the place for layers"))?;
        attach(places.as_fd(), &scratch.lower).map_err(doing("attach the place for layers"))?;
        self.lower
            .iter()
            .enumerate()
            .map(|(number, layer)| {
                let path = format!("{}/{number}", scratch.lower);
                fs::create_dir(&path).map_err(doing("make the place for a layer"))?;
                layer.mount(&path, users)?;
                Ok(path)
            })
            .collect()
    }
}

impl Layer {
    fn mount(&self, at: &str, users: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let tree = match self {
            Self::Directory(path) => directory(path)?,
            Self::Block { device, filesystem } => {
                let tree = block(device, filesystem, Writes::Never, &[])?;
                if let Some(users) = users {
                    sys::id_map(tree.as_fd(), false, users)
                        .map_err(doing("map the ids of a lower layer"))?;
                }
                tree
            }
        };
        attach(tree.as_fd(), at).map_err(doing("attach a lower layer"))
    }
}

impl Upper {
    /// Mounts the layer; answers its directories for changes and for the overlay's own work.
    fn mount(&self, scratch: &Scratch) -> Result<[String; 2], Error> {
        let tree = match self {
            Self::Memory { bytes } => FsContext::open("tmpfs")
                .and_then(|tmpfs| {
                    tmpfs.set("mode", Some("0755"))?;
                    if let Some(bytes) = bytes {
                        tmpfs.set("size", Some(&bytes.to_string()))?;
                    }
                    tmpfs.mount(0)
                })
                .map_err(doing("make the upper layer")),
            Self::Block { device, filesystem } => {
                block(device, filesystem, Writes::IfPossible, &[])
            }
        }?;
        attach(tree.as_fd(), &scratch.upper).map_err(doing("attach the upper layer"))?;
        let directories = ["changes", "work"].map(|name| format!("{}/{name}", scratch.upper));
        for path in &directories {
            match fs::create_dir(path) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(doing("make the upper layer's directories")(error));
                }
                _ => {}
            }
        }
        Ok(directories)
    }
}
