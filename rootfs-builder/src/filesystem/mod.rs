//! A file system in memory: every inode with all its attributes, and names that lead to them.
//!
//! What files hold lies in a [`Spool`]; an inode says where. Inodes are never removed, only
//! their names are: a writer goes from the root and meets those that still have one.

use std::collections::BTreeMap;

mod spool;

pub(crate) use spool::Piece;
pub use spool::{Extent, Spool, data};

use crate::tree::{Node, Tree};

/// The longest name in a directory.
pub const NAME_MAX: usize = 255;

/// The longest target of a symbolic link.
pub const TARGET_MAX: usize = 4095;

/// Which inode of its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId(u32);

/// A moment, in seconds and nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// What is missing, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// What an inode has whatever its kind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permissions, set-id bits and the sticky bit: the lower twelve bits of a mode.
    pub mode: u16,
    /// The owning user.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// When the content changed last.
    pub mtime: Time,
    /// Extended attributes by their full names, such as `security.capability`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory and its names.
    Directory(BTreeMap<Vec<u8>, Entry>),
    /// A regular file.
    File(Extent),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A device file.
    Device {
        /// Whether it is of blocks rather than characters.
        block: bool,
        /// Below 4096.
        major: u32,
        /// Below 1,048,576.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// A name's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The inode.
    pub inode: InodeId,
    /// Which layer gave the name its meaning.
    pub layer: u32,
}

/// An inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// What it has whatever its kind.
    pub attributes: Attributes,
    /// What it is.
    pub kind: Kind,
}

/// The file system.
#[derive(Debug)]
pub struct FileSystem {
    inodes: Vec<Inode>,
}

impl Default for FileSystem {
    fn default() -> Self {
        Self::new()
    }
}

impl FileSystem {
    /// The root directory.
    pub const ROOT: InodeId = InodeId(0);

    /// One with an empty root of mode 0755.
    #[must_use]
    pub fn new() -> Self {
        Self {
            inodes: vec![Inode::directory(0o755)],
        }
    }

    /// An inode.
    #[must_use]
    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.0 as usize]
    }

    /// An inode, to be changed.
    pub fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id.0 as usize]
    }

    /// Adds an inode without a name.
    pub fn add(&mut self, inode: Inode) -> InodeId {
        let id = u32::try_from(self.inodes.len()).expect("a budget keeps inodes below 2^32");
        self.inodes.push(inode);
        InodeId(id)
    }

    /// The names in a directory; none where it is no directory.
    #[must_use]
    pub fn names(&self, directory: InodeId) -> Option<&BTreeMap<Vec<u8>, Entry>> {
        match &self.inode(directory).kind {
            Kind::Directory(names) => Some(names),
            _ => None,
        }
    }

    /// What a name in a directory means.
    #[must_use]
    pub fn lookup(&self, directory: InodeId, name: &[u8]) -> Option<Entry> {
        self.names(directory)?.get(name).copied()
    }

    /// Gives a name in a directory a meaning. Nothing happens where it is no directory.
    pub fn link(&mut self, directory: InodeId, name: &[u8], entry: Entry) {
        if let Kind::Directory(names) = &mut self.inode_mut(directory).kind {
            names.insert(name.to_owned(), entry);
        }
    }

    /// Takes a name out of a directory.
    pub fn unlink(&mut self, directory: InodeId, name: &[u8]) {
        if let Kind::Directory(names) = &mut self.inode_mut(directory).kind {
            names.remove(name);
        }
    }

    /// A described tree, its files put into `spool`. Everything is root's and of the epoch.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or kept; with its path in the tree.
    pub fn from_tree(
        tree: &Tree,
        spool: &mut Spool,
    ) -> Result<Self, (std::path::PathBuf, std::io::Error)> {
        use std::os::unix::ffi::OsStrExt;

        let mut filesystem = Self::new();
        let mut directories = BTreeMap::from([(std::path::PathBuf::new(), Self::ROOT)]);
        for (path, node) in tree.entries() {
            let (mode, kind) = match node {
                Node::Directory { mode } => (*mode, Kind::Directory(BTreeMap::new())),
                Node::Symlink { target } => {
                    (0o777, Kind::Symlink(target.as_os_str().as_bytes().to_vec()))
                }
                Node::File { mode, source } => {
                    let extent = std::fs::File::open(source)
                        .and_then(|file| spool.append(file))
                        .map_err(|error| (source.clone(), error))?;
                    (*mode, Kind::File(extent))
                }
            };
            let attributes = Attributes {
                mode: (mode & 0o7777) as u16,
                ..Attributes::default()
            };
            let inode = filesystem.add(Inode { attributes, kind });
            let parent = path.parent().unwrap_or(std::path::Path::new(""));
            let name = path.file_name().unwrap_or_default().as_bytes();
            // A tree has each directory before what is in it.
            let parent = directories.get(parent).copied().unwrap_or(Self::ROOT);
            filesystem.link(parent, name, Entry { inode, layer: 0 });
            directories.insert(path.to_owned(), inode);
        }
        Ok(filesystem)
    }
}

impl Inode {
    /// An empty directory of root's.
    #[must_use]
    pub fn directory(mode: u16) -> Self {
        Self {
            attributes: Attributes {
                mode,
                ..Attributes::default()
            },
            kind: Kind::Directory(BTreeMap::new()),
        }
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }
}
