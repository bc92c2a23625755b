//! EROFS images, made by `mkfs.erofs`: uncompressed, so that a guest maps them directly.
//!
//! File data starts on a page of its own (no tail of a file lies beside its inode): the guest
//! then executes and reads it in place, in the host's page cache, shared by all virtual
//! machines. The image's length is a multiple of 2 MiB, the alignment of a memory region.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::tree::{self, Tree};

/// What can go wrong while an image is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tree cannot be laid out for `mkfs.erofs`.
    #[error("cannot lay out the tree for {image}")]
    Tree {
        /// The image that was to be made.
        image: PathBuf,
        /// Which entry, and why.
        source: tree::Error,
    },
    /// There is no `mkfs.erofs`, or it cannot be started.
    #[error("cannot run mkfs.erofs, which Debian's package erofs-utils brings")]
    NoTool(#[source] io::Error),
    /// `mkfs.erofs` gave up.
    #[error("mkfs.erofs cannot make {image}: {reason}")]
    Tool {
        /// The image that was to be made.
        image: PathBuf,
        /// The last line that it wrote.
        reason: String,
    },
    /// A file cannot be made, padded or moved to its place.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// Images are this or a multiple of it long.
const ALIGN_BYTES: u64 = 2 << 20;

/// Makes images that depend on nothing but their tree and this.
#[derive(Clone, Debug)]
pub struct Builder {
    uuid: [u8; 16],
}

impl Builder {
    /// A builder of images that carry `uuid`.
    #[must_use]
    pub fn new(uuid: [u8; 16]) -> Self {
        Self { uuid }
    }

    /// Makes an image of a tree. The file `image` appears whole or, on an error, not at all.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn build(&self, tree: &Tree, image: &Path) -> Result<(), Error> {
        let staging = tempfile::tempdir().map_err(|source| Error::Write {
            path: std::env::temp_dir(),
            source,
        })?;
        tree.lay_out(staging.path()).map_err(|source| Error::Tree {
            image: image.to_owned(),
            source,
        })?;
        let new = image.with_extension("new");
        let made = self.run(staging.path(), &new, image).and_then(|()| {
            finish(&new, image).map_err(|source| Error::Write {
                path: image.to_owned(),
                source,
            })
        });
        if made.is_err() {
            // the image was never there; what is left of the attempt is of no use
            let _ = fs::remove_file(&new);
        }
        made
    }

    fn run(&self, dir: &Path, new: &Path, image: &Path) -> Result<(), Error> {
        let output = Command::new("mkfs.erofs")
            .args(["-T0", "--all-root", "-x-1", "-Enoinline_data"])
            .arg(format!("-U{}", self.uuid_text()))
            .args([new, dir])
            .output()
            .map_err(Error::NoTool)?;
        if !output.status.success() {
            return Err(Error::Tool {
                image: image.to_owned(),
                reason: last_line(&output),
            });
        }
        Ok(())
    }

    /// The usual spelling: hexadecimal in groups of 8, 4, 4, 4 and 12 digits.
    fn uuid_text(&self) -> String {
        let hex: String = self.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        [
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..],
        ]
        .join("-")
    }
}

/// Pads a new image to its alignment and moves it to its place.
fn finish(new: &Path, image: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(new)?;
    file.set_len(file.metadata()?.len().next_multiple_of(ALIGN_BYTES))?;
    fs::rename(new, image)
}

/// The last line that a failed program wrote, or how it ended if it was silent.
fn last_line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    match text.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => line.trim().to_owned(),
        None => output.status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_spelled_in_groups() {
        let builder = Builder::new(*b"0123456789abcdef");
        assert_eq!(builder.uuid_text(), "30313233-3435-3637-3839-616263646566");
    }
}
