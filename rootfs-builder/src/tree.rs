//! A file tree, described: what an image will hold, before there is an image.
//!
//! Entries are kept sorted by path, so a directory always comes before what is in it, and the
//! order in which they were added leaves no trace. Everything belongs to root.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

/// What can go wrong while a tree is described or laid out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path is empty, absolute, or has `.` or `..` in it.
    #[error("{path} is not a plain relative path")]
    BadPath {
        /// The path as it was given.
        path: PathBuf,
    },
    /// The directory that an entry lies in was not added before it.
    #[error("{path} lies in a directory that was not added")]
    NoParent {
        /// The entry's path.
        path: PathBuf,
    },
    /// There is an entry of that path already.
    #[error("{path} was added before")]
    Twice {
        /// The entry's path.
        path: PathBuf,
    },
    /// An entry cannot be made on disk.
    #[error("cannot lay out {path}")]
    LayOut {
        /// The entry's path, below the directory it was to be made in.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// One entry of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory {
        /// Permission bits.
        mode: u32,
    },
    /// A regular file.
    File {
        /// Permission bits.
        mode: u32,
        /// The file on this host with its content.
        source: PathBuf,
    },
    /// A symbolic link.
    Symlink {
        /// What it points to, as it will be read in the image.
        target: PathBuf,
    },
}

/// A file tree without its root, which is a directory of mode 0755.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    entries: BTreeMap<PathBuf, Node>,
}

impl Tree {
    /// An empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry at `path`, which is relative to the root.
    ///
    /// ```
    /// use rootfs_builder::tree::{Node, Tree};
    ///
    /// let mut tree = Tree::new();
    /// tree.add("etc", Node::Directory { mode: 0o755 })?;
    /// tree.add("etc/mtab", Node::Symlink { target: "/proc/mounts".into() })?;
    /// assert!(tree.add("usr/bin", Node::Directory { mode: 0o755 }).is_err());
    /// # Ok::<(), rootfs_builder::tree::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the path is not plain, is taken, or lies in no directory of the tree.
    pub fn add(&mut self, path: impl AsRef<Path>, node: Node) -> Result<(), Error> {
        let path = path.as_ref();
        let plain = path
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if !plain || path.as_os_str().is_empty() {
            return Err(Error::BadPath {
                path: path.to_owned(),
            });
        }
        let path: PathBuf = path.components().collect();
        let parent = path.parent().unwrap_or(Path::new(""));
        if !parent.as_os_str().is_empty()
            && !matches!(self.entries.get(parent), Some(Node::Directory { .. }))
        {
            return Err(Error::NoParent { path });
        }
        if self.entries.contains_key(&path) {
            return Err(Error::Twice { path });
        }
        self.entries.insert(path, node);
        Ok(())
    }

    /// The entries, each directory before what is in it.
    pub fn entries(&self) -> impl Iterator<Item = (&Path, &Node)> {
        self.entries
            .iter()
            .map(|(path, node)| (path.as_path(), node))
    }

    /// Makes the tree on disk, in the directory `root`, which must be there and empty.
    ///
    /// # Errors
    ///
    /// [`Error::LayOut`] with the first entry that cannot be made.
    pub fn lay_out(&self, root: &Path) -> Result<(), Error> {
        for (path, node) in self.entries() {
            lay_out_one(&root.join(path), node).map_err(|source| Error::LayOut {
                path: path.to_owned(),
                source,
            })?;
        }
        Ok(())
    }
}

fn lay_out_one(path: &Path, node: &Node) -> io::Result<()> {
    match node {
        Node::Directory { mode } => {
            fs::create_dir(path)?;
            fs::set_permissions(path, Permissions::from_mode(*mode))
        }
        Node::File { mode, source } => {
            fs::copy(source, path)?;
            fs::set_permissions(path, Permissions::from_mode(*mode))
        }
        Node::Symlink { target } => symlink(target, path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> Node {
        Node::Directory { mode: 0o755 }
    }

    #[test]
    fn a_path_that_leaves_the_tree_is_refused() {
        for path in ["", "/etc", "../etc", "etc/..", "./etc"] {
            let error = Tree::new().add(path, directory()).unwrap_err();
            assert!(matches!(error, Error::BadPath { .. }), "{path}: {error}");
        }
    }

    #[test]
    fn an_entry_needs_its_directory() {
        let error = Tree::new().add("etc/passwd", directory()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "etc/passwd lies in a directory that was not added"
        );
    }

    #[test]
    fn an_entry_is_not_replaced() {
        let mut tree = Tree::new();
        tree.add("etc", directory()).unwrap();
        let error = tree.add("etc", directory()).unwrap_err();
        assert_eq!(error.to_string(), "etc was added before");
    }

    #[test]
    fn entries_are_sorted_whatever_the_order_they_were_added_in() {
        let mut tree = Tree::new();
        for path in ["usr", "etc", "usr/lib"] {
            tree.add(path, directory()).unwrap();
        }
        let paths: Vec<&Path> = tree.entries().map(|(path, _)| path).collect();
        assert_eq!(
            paths,
            [Path::new("etc"), Path::new("usr"), Path::new("usr/lib")]
        );
    }

    #[test]
    fn a_tree_that_cannot_be_laid_out_names_the_entry() {
        let root = tempfile::tempdir().unwrap();
        let mut tree = Tree::new();
        tree.add(
            "init",
            Node::File {
                mode: 0o755,
                source: "/nonexistent".into(),
            },
        )
        .unwrap();
        let error = tree.lay_out(root.path()).unwrap_err();
        assert_eq!(error.to_string(), "cannot lay out init");
    }
}
