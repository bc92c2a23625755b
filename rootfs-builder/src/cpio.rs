//! The `newc` form of cpio archives, which Linux unpacks as its initramfs.
//!
//! An archive is a row of records, each a header of thirteen hexadecimal numbers, a name, and
//! the content, both padded to four bytes; a record called `TRAILER!!!` ends it. The kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` is the specification.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::tree::{Node, Tree};

/// What can go wrong while an archive is written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the tree cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file on this host.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The format has 32 bits for a size.
    #[error("{path} is too large for a cpio archive: {len} bytes, the format ends at 4 GiB")]
    TooLarge {
        /// The file on this host.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// The archive cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The archive.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

// Types of files in a mode, as inode(7) has them.
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// Archives are padded with zeros to a multiple of this.
const BLOCK_BYTES: usize = 512;

/// Writes `tree` to the file `archive`. Times are zero and everything is root's.
///
/// # Errors
///
/// See [`Error`]; each names the file that it is about.
pub fn write(tree: &Tree, archive: &Path) -> Result<(), Error> {
    let failed = |source| Error::Write {
        path: archive.to_owned(),
        source,
    };
    let mut out = Archive {
        out: BufWriter::new(File::create(archive).map_err(failed)?),
        len: 0,
        inode: 0,
    };
    for (path, node) in tree.entries() {
        let (mode, content) = record(node)?;
        out.record(path.as_os_str().as_bytes(), mode, &content)
            .map_err(failed)?;
    }
    out.finish().map_err(failed)
}

/// Mode and content of a node's record.
fn record(node: &Node) -> Result<(u32, Vec<u8>), Error> {
    match node {
        Node::Directory { mode } => Ok((S_IFDIR | mode, Vec::new())),
        Node::Symlink { target } => Ok((S_IFLNK | 0o777, target.as_os_str().as_bytes().to_owned())),
        Node::File { mode, source: path } => {
            let content = fs::read(path).map_err(|source| Error::Read {
                path: path.clone(),
                source,
            })?;
            if u32::try_from(content.len()).is_err() {
                return Err(Error::TooLarge {
                    path: path.clone(),
                    len: content.len(),
                });
            }
            Ok((S_IFREG | mode, content))
        }
    }
}

/// An archive that is being written.
struct Archive<W> {
    out: W,
    len: usize,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn record(&mut self, name: &[u8], mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let links = if mode & S_IFMT == S_IFDIR { 2 } else { 1 };
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // time of last change
            content.len() as u32,
            0, // device of the file
            0,
            0, // device that a special file stands for
            0,
            name.len() as u32 + 1,
            0, // checksum, which this form leaves at zero
        ];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08X}").as_bytes())?;
        }
        self.put(name)?;
        self.put(&[0])?;
        self.pad(4)?;
        self.put(content)?;
        self.pad(4)
    }

    fn finish(mut self) -> io::Result<()> {
        self.record(b"TRAILER!!!", 0, &[])?;
        self.pad(BLOCK_BYTES)?;
        self.out.flush()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.len += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self, to: usize) -> io::Result<()> {
        let missing = self.len.next_multiple_of(to) - self.len;
        self.put(&[0; BLOCK_BYTES][..missing])
    }
}
