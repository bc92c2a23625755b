//! The files that the guest knows: what FUSE calls nodes.
//!
//! Each is a descriptor that was opened by path only (`O_PATH`), so the guest
//! holds on to the file itself and not to a name that may come to mean another.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{error, sys::Attributes};

/// The node of the shared directory itself.
pub(super) const ROOT: u64 = 1;

/// A file that the guest knows.
pub(super) struct Node {
    /// The file, opened by path only.
    pub(super) path: OwnedFd,
    /// What kind of file it is: `S_IFMT` of its mode, which never changes.
    pub(super) kind: u32,
    /// What its contents were when the guest last opened it.
    pub(super) seen: Option<Version>,
    identity: Identity,
    /// How often the guest was told of it and has not yet forgotten it.
    lookups: u64,
}

/// What tells files apart. The mount is part of it because of two mounts of one file system
/// one may be read-only.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    device: u64,
    inode: u64,
    mount: u64,
}

/// Longer than the host's clock for files takes to tick. Two changes within a tick look like one.
const TICK: Duration = Duration::from_millis(50);

/// What changes when the contents of a file or directory do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    /// `None` while another change might look the same.
    pub(super) fn of(stat: &libc::stat64) -> Option<Self> {
        let changed = Duration::new(
            u64::try_from(stat.st_ctime).ok()?,
            u32::try_from(stat.st_ctime_nsec).ok()?,
        );
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        (now.checked_sub(changed)? > TICK).then_some(Self {
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        })
    }
}

/// All nodes, by number and by file. Numbers are never used twice.
pub(super) struct Nodes {
    by_number: HashMap<u64, Node>,
    by_identity: HashMap<Identity, u64>,
    next: u64,
}

impl Nodes {
    /// Only the shared directory itself, which the guest knows without asking.
    pub(super) fn new(root: OwnedFd, attributes: &Attributes) -> Self {
        let mut nodes = Self {
            by_number: HashMap::new(),
            by_identity: HashMap::new(),
            next: ROOT,
        };
        nodes.found(root, attributes);
        nodes
    }

    pub(super) fn get(&self, number: u64) -> io::Result<&Node> {
        self.by_number
            .get(&number)
            .ok_or_else(|| error(libc::ESTALE))
    }

    pub(super) fn get_mut(&mut self, number: u64) -> io::Result<&mut Node> {
        self.by_number
            .get_mut(&number)
            .ok_or_else(|| error(libc::ESTALE))
    }

    pub(super) fn len(&self) -> usize {
        self.by_number.len()
    }

    /// The number for a file that the guest is about to be told of.
    pub(super) fn found(&mut self, path: OwnedFd, attributes: &Attributes) -> u64 {
        let identity = Identity {
            device: attributes.stat.st_dev,
            inode: attributes.stat.st_ino,
            mount: attributes.mount,
        };
        let known = self
            .by_identity
            .get(&identity)
            .and_then(|number| Some((*number, self.by_number.get_mut(number)?)));
        if let Some((number, node)) = known {
            node.lookups = node.lookups.saturating_add(1);
            return number;
        }
        let number = self.next;
        self.next += 1;
        self.by_identity.insert(identity, number);
        self.by_number.insert(
            number,
            Node {
                path,
                kind: attributes.stat.st_mode & libc::S_IFMT,
                seen: None,
                identity,
                lookups: 1,
            },
        );
        number
    }

    /// The guest forgets `count` of the times that it was told of a node.
    pub(super) fn forget(&mut self, number: u64, count: u64) {
        if number == ROOT {
            return;
        }
        let Some(node) = self.by_number.get_mut(&number) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups == 0 {
            let identity = node.identity;
            self.by_number.remove(&number);
            self.by_identity.remove(&identity);
        }
    }
}
