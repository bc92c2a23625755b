//! The files that the guest knows: what FUSE calls nodes.
//!
//! A node is one file of the host: its device, its number there, when it was
//! made, and the mount by which it was found. Where it was found last is
//! remembered too, as a directory's node and a name, so that a node costs no
//! descriptor until something is done to it, and its descriptor can be closed
//! again when there are too many. Whenever it is opened by its name, what is
//! there must be the same file; otherwise the guest gets `ESTALE` and its
//! kernel looks the name up anew.
//!
//! ```text
//!            found                     needed
//!   (unknown) ----> known by its name <-------> held by a descriptor (O_PATH)
//!                        |   too many, or its mount is gone      |
//!                        `------ forgotten by the guest ---------'
//! ```

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::CStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::{
        stat::Mode,
        statfs::{OVERLAYFS_SUPER_MAGIC, fstatfs},
    },
};

use super::{
    error,
    numbers::ByNumber,
    sys::{self, Attributes},
};

/// The node of the shared directory itself.
pub(super) const ROOT: u64 = 1;

/// More are not kept; the guest then gets `ENFILE`. Each takes some 400 bytes here, and a KiB of
/// the guest's own memory.
const MAX_NODES: usize = 1 << 22;
const BYTES_PER_NODE: u64 = 1024;
/// What the smallest guest may know.
pub(super) const MIN_NODES: usize = 1 << 16;

/// How many files a guest of `ram_bytes` may know at a time.
pub(super) fn most_nodes(ram_bytes: u64) -> usize {
    let room = usize::try_from(ram_bytes / BYTES_PER_NODE).unwrap_or(MAX_NODES);
    room.clamp(MIN_NODES, MAX_NODES)
}

/// How deep a directory may be that is opened again by names.
const MAX_DEPTH: usize = 2048;

/// A file that the guest knows.
pub(super) struct Node {
    /// What kind of file it is: `S_IFMT` of its mode, which never changes.
    pub(super) kind: u32,
    /// What its contents were when the guest last opened it.
    pub(super) seen: Option<Version>,
    /// The guest's open files that are this node.
    pub(super) handles: Vec<u64>,
    /// Whether it was last seen with the set-user-id or set-group-id bit.
    pub(super) set_ids: bool,
    identity: Identity,
    place: Place,
    /// The file, opened by path only.
    file: Option<OwnedFd>,
    /// Whether `file` was needed since somebody looked for descriptors to close.
    used: bool,
    /// How often the guest was told of it and has not yet forgotten it.
    lookups: u64,
}

/// Where a file was last found.
struct Place {
    parent: u64,
    name: Box<CStr>,
}

/// What tells files apart. The mount is part of it because of two mounts of one file system
/// one may be read-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    device: u64,
    inode: u64,
    mount: u64,
    /// A number is used again after its file is gone; the time is not.
    born: Option<(i64, u32)>,
}

/// A device that files were found on.
#[derive(Debug, Clone, Copy)]
struct Device {
    /// The how manieth it is.
    index: u64,
    /// Whether a file's time of birth stays what it is. Not so where overlayfs copies up.
    births_stay: bool,
}

/// Longer than the host's clock for files takes to tick. Two changes within a tick look like one.
const TICK: Duration = Duration::from_millis(50);

/// What changes when the contents of a file or directory do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl Version {
    /// `None` while another change might look the same.
    pub(super) fn of(attributes: &Attributes) -> Option<Self> {
        let changed = (attributes.stx_ctime.tv_sec, attributes.stx_ctime.tv_nsec);
        let since_epoch = Duration::new(u64::try_from(changed.0).ok()?, changed.1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        (now.checked_sub(since_epoch)? > TICK).then_some(Self {
            size: attributes.stx_size,
            modified: (attributes.stx_mtime.tv_sec, attributes.stx_mtime.tv_nsec),
            changed,
        })
    }
}

impl Node {
    /// One of the guest's open files that are this node.
    pub(super) fn handle(&self) -> Option<u64> {
        self.handles.last().copied()
    }
}

/// All nodes, by number and by file. Numbers are never used twice.
pub(super) struct Nodes {
    by_number: ByNumber<Node>,
    by_identity: HashMap<Identity, u64>,
    devices: HashMap<u64, Device>,
    mounts: HashSet<u64>,
    /// Nodes that hold a descriptor, or did, those first that have for longest.
    held: VecDeque<u64>,
    next: u64,
    /// How many there may be.
    pub(super) most: usize,
}

impl Nodes {
    /// Only the shared directory itself, which the guest knows without asking; there may be `most`.
    pub(super) fn new(root: OwnedFd, most: usize) -> io::Result<Self> {
        let mut nodes = Self {
            by_number: ByNumber::default(),
            by_identity: HashMap::new(),
            devices: HashMap::new(),
            mounts: HashSet::new(),
            held: VecDeque::new(),
            next: ROOT,
            most,
        };
        let attributes = sys::attributes(&root)?;
        nodes.know_device(&attributes, || root.try_clone())?;
        let identity = nodes.identity(&attributes);
        let number = nodes.insert(identity, &attributes, ROOT, c"")?;
        nodes.node_mut(number)?.file = Some(root);
        Ok(nodes)
    }

    pub(super) fn node(&self, number: u64) -> io::Result<&Node> {
        self.by_number
            .get(&number)
            .ok_or_else(|| error(libc::ESTALE))
    }

    pub(super) fn node_mut(&mut self, number: u64) -> io::Result<&mut Node> {
        self.by_number
            .get_mut(&number)
            .ok_or_else(|| error(libc::ESTALE))
    }

    /// How many descriptors are held, about.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// The number for a file that the guest is about to be told of, which was found as `name` in
    /// `parent`.
    pub(super) fn found(
        &mut self,
        attributes: &Attributes,
        parent: u64,
        name: &CStr,
    ) -> io::Result<u64> {
        if !self.devices.contains_key(&device(attributes)) {
            let directory = self.descriptor(parent)?.try_clone_to_owned()?;
            self.know_device(attributes, || open_path(&directory, name))?;
        }
        let identity = self.identity(attributes);
        let kind = u32::from(attributes.stx_mode) & libc::S_IFMT;
        let known = self.by_identity.get(&identity).copied();
        if let Some(number) = known
            && let Some(node) = self.by_number.get_mut(&number)
            && node.kind == kind
        {
            node.lookups = node.lookups.saturating_add(1);
            node.set_ids = has_set_ids(attributes);
            if number != ROOT && (node.place.parent != parent || *node.place.name != *name) {
                node.place = Place {
                    parent,
                    name: name.into(),
                };
            }
            return self.pin(number, identity.device).map(|()| number);
        }
        let number = self.insert(identity, attributes, parent, name)?;
        self.pin(number, identity.device).map(|()| number)
    }

    /// Holds a directory of an overlay, which gets another number when the host's kernel has
    /// forgotten it: the guest would take it for another one, and lose what is mounted on it.
    fn pin(&mut self, number: u64, device: u64) -> io::Result<()> {
        let stays = self.devices.get(&device).is_some_and(|it| it.births_stay);
        if stays || self.node(number)?.kind != libc::S_IFDIR {
            return Ok(());
        }
        let held = self.hold(number);
        if held.is_err() {
            // The guest is not told of it.
            self.forget(number, 1);
        }
        held
    }

    fn insert(
        &mut self,
        identity: Identity,
        attributes: &Attributes,
        parent: u64,
        name: &CStr,
    ) -> io::Result<u64> {
        if self.by_number.len() >= self.most {
            return Err(error(libc::ENFILE));
        }
        let number = self.next;
        self.next += 1;
        self.mounts.insert(identity.mount);
        self.by_identity.insert(identity, number);
        self.by_number.insert(
            number,
            Node {
                kind: u32::from(attributes.stx_mode) & libc::S_IFMT,
                seen: None,
                handles: Vec::new(),
                set_ids: has_set_ids(attributes),
                identity,
                place: Place {
                    parent,
                    name: name.into(),
                },
                file: None,
                used: false,
                lookups: 1,
            },
        );
        Ok(number)
    }

    /// Remembers that a file has another name now, if the guest knows it.
    pub(super) fn moved(&mut self, attributes: &Attributes, parent: u64, name: &CStr) {
        let identity = self.identity(attributes);
        let known = self.by_identity.get(&identity).copied();
        if let Some(number) = known.filter(|number| *number != ROOT)
            && let Some(node) = self.by_number.get_mut(&number)
        {
            node.place = Place {
                parent,
                name: name.into(),
            };
        }
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
            // Another node may have taken its place.
            if self.by_identity.get(&identity) == Some(&number) {
                self.by_identity.remove(&identity);
            }
        }
    }

    /// The file, opened by path only.
    ///
    /// # Errors
    /// `ESTALE` when it is not known or no longer where it was found.
    pub(super) fn descriptor(&mut self, number: u64) -> io::Result<BorrowedFd<'_>> {
        self.hold(number)?;
        self.descriptor_of(number)
    }

    /// The files of two nodes.
    pub(super) fn descriptors(
        &mut self,
        one: u64,
        other: u64,
    ) -> io::Result<(BorrowedFd<'_>, BorrowedFd<'_>)> {
        self.hold(one)?;
        self.hold(other)?;
        Ok((self.descriptor_of(one)?, self.descriptor_of(other)?))
    }

    /// The descriptor that is held, if one is.
    pub(super) fn held_descriptor(&self, number: u64) -> Option<BorrowedFd<'_>> {
        self.by_number.get(&number)?.file.as_ref().map(AsFd::as_fd)
    }

    fn descriptor_of(&self, number: u64) -> io::Result<BorrowedFd<'_>> {
        self.held_descriptor(number)
            .ok_or_else(|| error(libc::ESTALE))
    }

    /// The attributes, with a descriptor or without.
    pub(super) fn attributes(&mut self, number: u64) -> io::Result<Attributes> {
        if let Some(file) = self.held_descriptor(number) {
            return sys::attributes(file);
        }
        let parent = self.node(number)?.place.parent;
        self.hold(parent)?;
        let attributes =
            sys::attributes_at(self.descriptor_of(parent)?, &self.node(number)?.place.name)
                .map_err(gone)?;
        self.check_identity(number, &attributes)?;
        Ok(attributes)
    }

    /// The directory and the name where a node should be; whatever is opened there is to be
    /// shown to [`Nodes::check_identity`].
    pub(super) fn place(&mut self, number: u64) -> io::Result<(BorrowedFd<'_>, &CStr)> {
        let parent = self.node(number)?.place.parent;
        self.hold(parent)?;
        Ok((self.descriptor_of(parent)?, &self.node(number)?.place.name))
    }

    /// Opens by path only what is where a node should be, without holding it.
    pub(super) fn open_path(&mut self, number: u64) -> io::Result<OwnedFd> {
        let (directory, name) = self.place(number)?;
        open_path(directory, name).map_err(gone)
    }

    /// # Errors
    /// `ESTALE` when the attributes are another file's.
    pub(super) fn check_identity(&self, number: u64, attributes: &Attributes) -> io::Result<()> {
        let node = self.node(number)?;
        let kind = u32::from(attributes.stx_mode) & libc::S_IFMT;
        if node.identity != self.identity(attributes) || node.kind != kind {
            return Err(error(libc::ESTALE));
        }
        Ok(())
    }

    /// Sees to it that a node has a descriptor: opens it by its name, and before that the
    /// directories above, as far up as they have none.
    fn hold(&mut self, number: u64) -> io::Result<()> {
        let mut missing = Vec::new();
        let mut at = number;
        loop {
            let node = self.node_mut(at)?;
            if node.file.is_some() {
                node.used = true;
                break;
            }
            if missing.len() == MAX_DEPTH {
                return Err(error(libc::ESTALE));
            }
            missing.push(at);
            at = node.place.parent;
        }
        while let Some(number) = missing.pop() {
            let place = &self.node(number)?.place;
            let file = open_path(self.descriptor_of(place.parent)?, &place.name).map_err(gone)?;
            self.check_identity(number, &sys::attributes(&file)?)?;
            self.keep(number, file)?;
        }
        Ok(())
    }

    /// Lets a node have a descriptor.
    pub(super) fn keep(&mut self, number: u64, file: OwnedFd) -> io::Result<()> {
        let node = self.node_mut(number)?;
        node.file = Some(file);
        node.used = true;
        self.held.push_back(number);
        Ok(())
    }

    /// Closes descriptors until at most `most` are held, as far as that needs few steps. Those
    /// go first that were not needed for longest; those without a name stay.
    pub(super) fn trim(&mut self, most: usize) {
        const STEPS: usize = 64;
        for _ in 0..STEPS {
            if self.held.len() <= most {
                return;
            }
            let Some(number) = self.held.pop_front() else {
                return;
            };
            let Some(node) = self.by_number.get_mut(&number) else {
                continue;
            };
            let Some(file) = &node.file else {
                continue;
            };
            let needed = std::mem::take(&mut node.used);
            let unnamed = || sys::attributes(file).is_ok_and(|file| file.stx_nlink == 0);
            if needed || unnamed() {
                self.held.push_back(number);
            } else {
                node.file = None;
            }
        }
    }

    /// Closes the descriptors of mounts that are not among `mounts` any more, and tells which
    /// those mounts are.
    pub(super) fn keep_mounts(&mut self, mounts: &HashSet<u64>) -> HashSet<u64> {
        let gone: HashSet<u64> = self.mounts.difference(mounts).copied().collect();
        if gone.is_empty() {
            return gone;
        }
        for (number, node) in &mut self.by_number {
            if gone.contains(&node.identity.mount) && *number != ROOT {
                node.file = None;
                // Another mount may get the number.
                self.by_identity.remove(&node.identity);
            }
        }
        self.mounts.retain(|mount| mounts.contains(mount));
        gone
    }

    /// One descriptor for each device that one is held of.
    pub(super) fn one_of_each_device(&self) -> Vec<BorrowedFd<'_>> {
        let mut seen = HashSet::new();
        let files = self.by_number.values().filter_map(|node| {
            let file = node.file.as_ref()?;
            let has_contents = matches!(node.kind, libc::S_IFREG | libc::S_IFDIR);
            (has_contents && seen.insert(node.identity.device)).then(|| file.as_fd())
        });
        files.collect()
    }

    /// A file's number for the guest, which knows one device only: those of other devices are
    /// made different from those of the first.
    pub(super) fn shown_inode(&self, device: u64, inode: u64) -> u64 {
        let index = self.devices.get(&device).map_or(0, |device| device.index);
        inode ^ (index << 48)
    }

    /// The device that a node is on.
    pub(super) fn device_of(&self, number: u64) -> io::Result<u64> {
        Ok(self.node(number)?.identity.device)
    }

    fn know_device(
        &mut self,
        attributes: &Attributes,
        open: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<()> {
        let births_stay = fstatfs(open()?)?.filesystem_type() != OVERLAYFS_SUPER_MAGIC;
        let index = (self.devices.len() as u64).min(0xffff);
        self.devices
            .insert(device(attributes), Device { index, births_stay });
        Ok(())
    }

    fn identity(&self, attributes: &Attributes) -> Identity {
        let device = device(attributes);
        let births_stay = self
            .devices
            .get(&device)
            .is_some_and(|device| device.births_stay);
        let has_birth = attributes.stx_mask & libc::STATX_BTIME != 0;
        let birth = || (attributes.stx_btime.tv_sec, attributes.stx_btime.tv_nsec);
        Identity {
            device,
            inode: attributes.stx_ino,
            mount: attributes.stx_mnt_id,
            born: (births_stay && has_birth).then(birth),
        }
    }
}

/// Whether others act as the file's owner or group when they run it.
pub(super) fn has_set_ids(attributes: &Attributes) -> bool {
    u32::from(attributes.stx_mode) & (libc::S_ISUID | libc::S_ISGID) != 0
}

/// The device that a file is on.
pub(super) fn device(attributes: &Attributes) -> u64 {
    libc::makedev(attributes.stx_dev_major, attributes.stx_dev_minor)
}

/// A name that is not where it was found says as much as another file in its place.
pub(super) fn gone(cause: io::Error) -> io::Error {
    match cause.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => error(libc::ESTALE),
        _ => cause,
    }
}

fn open_path(directory: impl AsFd, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(directory, name, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_knows_as_many_files_as_it_has_memory_for() {
        assert_eq!(most_nodes(64 << 20), MIN_NODES);
        assert_eq!(most_nodes(512 << 20), 512 << 10);
        assert_eq!(most_nodes(64 << 30), MAX_NODES);
    }
}
