//! EROFS images of our own making: uncompressed, so that a guest maps them directly.
//!
//! File data starts on a page of its own (no tail of a file lies beside its inode): the guest
//! then executes and reads it in place, in the host's page cache, shared by all virtual
//! machines. The image's length is a multiple of 2 MiB, the alignment of a memory region.
//!
//! [`write()`] makes an image of a file system, [`Image`] reads one.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

mod disk;
mod layout;
mod read;
mod write;

pub use read::{Error as ReadError, Found, Image};
pub use write::{Written, write};

use crate::filesystem::{FileSystem, Spool};
use crate::tree::Tree;

/// What can go wrong while an image is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the tree cannot be read, or there is no room to keep it.
    #[error("cannot read {path}")]
    Read {
        /// The file on this host.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file cannot be made, padded or moved to its place.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The image cannot be written.
    #[error("cannot write the image")]
    Output(#[from] io::Error),
    /// A name that no directory can hold.
    #[error("the name of {path:?} is empty, longer than 255 bytes, or has a slash or a zero in it")]
    Name {
        /// The path.
        path: String,
    },
    /// A symbolic link to nowhere, or too far.
    #[error("the symbolic link {path:?} has a target of {length} bytes; 1 to 4095 are possible")]
    Target {
        /// The path.
        path: String,
        /// The target's length.
        length: usize,
    },
    /// A directory with two names.
    #[error("the directory {path:?} has another name already")]
    LinkedDirectory {
        /// The path.
        path: String,
    },
    /// More extended attributes than an inode has room for, or of names that Linux does not know.
    #[error(
        "the extended attributes of {path:?} do not fit: at most 65535 bytes a value and 256 KiB \
         in all, in the namespaces user, trusted, security and system"
    )]
    Xattrs {
        /// The path.
        path: String,
    },
    /// More than 2³² blocks.
    #[error("the image would be larger than 16 TiB")]
    TooLarge,
}

impl Error {
    fn name(path: &[u8]) -> Self {
        let path = String::from_utf8_lossy(path).into_owned();
        Self::Name { path }
    }

    fn target(path: &[u8], length: usize) -> Self {
        let path = String::from_utf8_lossy(path).into_owned();
        Self::Target { path, length }
    }

    fn linked_directory(path: &[u8]) -> Self {
        let path = String::from_utf8_lossy(path).into_owned();
        Self::LinkedDirectory { path }
    }

    fn xattrs(path: &[u8]) -> Self {
        let path = String::from_utf8_lossy(path).into_owned();
        Self::Xattrs { path }
    }
}

/// Images are this or a multiple of it long.
const ALIGN_BYTES: u64 = 2 << 20;

/// Makes an image of a described tree, which carries `uuid`. The file `image` appears whole or,
/// on an error, not at all.
///
/// # Errors
///
/// See [`Error`].
pub fn build(tree: &Tree, uuid: [u8; 16], image: &Path) -> Result<(), Error> {
    let failed = |source| Error::Write {
        path: image.to_owned(),
        source,
    };
    let directory = match image.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut spool = Spool::new(directory).map_err(failed)?;
    let filesystem = FileSystem::from_tree(tree, &mut spool)
        .map_err(|(path, source)| Error::Read { path, source })?;
    let new = image.with_extension("new");
    let made = File::create(&new).map_err(failed).and_then(|mut file| {
        write(&filesystem, &spool, uuid, &mut file)?;
        fs::rename(&new, image).map_err(failed)
    });
    if made.is_err() {
        // the image was never there; what is left of the attempt is of no use
        let _ = fs::remove_file(&new);
    }
    made
}

#[cfg(test)]
mod tests;
