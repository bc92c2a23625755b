//! The guest image: the agent as `/init`, the directories it mounts things on, nothing else.

use std::path::{Path, PathBuf};

use crate::tree::{Node, Tree};
use crate::{cpio, erofs, tree};

/// What can go wrong while a guest image is built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent is not a file that can be read.
    #[error("no agent at {path}")]
    NoAgent {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The tree cannot be described.
    #[error("cannot lay out the guest image")]
    Tree(#[from] tree::Error),
    /// The EROFS image cannot be made.
    #[error("cannot make the guest image")]
    Erofs(#[from] erofs::Error),
    /// The initramfs cannot be made.
    #[error("cannot make the guest's initramfs")]
    Cpio(#[from] cpio::Error),
}

/// The empty directories on which the agent mounts file systems, or that programs expect.
///
/// The image is read-only, so the agent cannot make any other.
const DIRECTORIES: [(&str, u32); 6] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o555),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
];

/// Fixed, so that two builds are the same image: any value would do.
const UUID: [u8; 16] = *b"bulkhead guest 1";

/// The tree of a guest image around the static program `agent`.
///
/// # Errors
///
/// [`Error::NoAgent`] if there is no such file.
pub fn tree(agent: &Path) -> Result<Tree, Error> {
    if !agent.is_file() {
        return Err(Error::NoAgent {
            path: agent.to_owned(),
        });
    }
    let mut tree = Tree::new();
    for (path, mode) in DIRECTORIES {
        tree.add(path, Node::Directory { mode })?;
    }
    tree.add(
        "init",
        Node::File {
            mode: 0o755,
            source: agent.to_owned(),
        },
    )?;
    Ok(tree)
}

/// Writes the guest image around `agent` as EROFS, for a read-only memory region or a disk.
///
/// # Errors
///
/// See [`Error`]; each names the file that it is about.
pub fn write_erofs(agent: &Path, image: &Path) -> Result<(), Error> {
    Ok(erofs::build(&tree(agent)?, UUID, image)?)
}

/// Writes the guest image around `agent` as an initramfs, an uncompressed cpio archive.
///
/// # Errors
///
/// See [`Error`]; each names the file that it is about.
pub fn write_cpio(agent: &Path, archive: &Path) -> Result<(), Error> {
    Ok(cpio::write(&tree(agent)?, archive)?)
}

#[cfg(test)]
mod tests;
