//! A directory of the host as the guest may use it.
//!
//! No path of the guest's is ever walked here: the guest's kernel walks, and
//! asks for one name in one directory at a time. A name is looked at or opened
//! below the directory's descriptor, without following a link, so neither `..`
//! nor a link nor a device leads out. Reading and writing opens only what was
//! found to be a regular file or a directory, and only if it still is that
//! same file.

use std::{
    collections::HashSet,
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::{
    fcntl::{OFlag, open, openat},
    sched::{CloneFlags, unshare},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::{Mode, umask},
    },
    unistd::fchdir,
};

mod attributes;
mod contents;
mod handles;
mod listing;
mod mounts;
mod names;
mod nodes;
mod numbers;
mod serve;
mod sys;

use super::{
    OwnFiles,
    reply::{Attr, Entry},
};
use handles::Handles;
use listing::Entries;
use mounts::Mounts;
use nodes::{MIN_NODES, Nodes, device, most_nodes};
pub(super) use serve::{Answer, Data};
use sys::Attributes;

/// How long the guest may believe what it was told of a name or of attributes, in seconds. The
/// host may change the files, and nothing tells the guest.
const BELIEF_S: u64 = 1;

/// Descriptors that are left to the rest of the process.
const OTHER_DESCRIPTORS: u64 = 256;

/// Nodes that hold a descriptor. Each pins a file in the host kernel's memory.
const MAX_HELD: usize = 16 << 10;

/// A shared directory.
pub(super) struct Share {
    directory: OwnedFd,
    /// The directory of the process's open files: [`OwnFiles::descriptors`].
    descriptors: OwnedFd,
    mounts: Mounts,
    read_only: bool,
    /// How many files the guest may make the process hold.
    limit: usize,
    /// Of those, how many for nothing but being known.
    most_held: usize,
    /// The user and group that the thread acts for by itself.
    own: (u32, u32),
    /// What the thread takes away of new files' permissions.
    umask: u32,
    nodes: Nodes,
    handles: Handles,
    entries: Entries,
}

/// Why a directory cannot be shared.
pub(super) struct OpenError {
    pub(super) step: &'static str,
    pub(super) source: io::Error,
}

impl Share {
    pub(super) fn open(
        directory: OwnedFd,
        read_only: bool,
        own: OwnFiles,
    ) -> Result<Self, OpenError> {
        let step = |step| move |source: io::Error| OpenError { step, source };
        let path_only = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let descriptors = open(own.descriptors, path_only, Mode::empty())
            .map_err(io::Error::from)
            .map_err(step("open the directory of its own descriptors"))?;
        let directory = openat(&directory, c".", path_only, Mode::empty())
            .map_err(io::Error::from)
            .map_err(step("open the directory"))?;
        let mounts = Mounts::open(own.mounts).map_err(step("open the list of mounts"))?;
        let limit = raise_limit().map_err(step("raise the limit of open files"))?;
        let root = directory.try_clone();
        let nodes = root.and_then(|root| Nodes::new(root, MIN_NODES));
        Ok(Self {
            nodes: nodes.map_err(step("look at the directory"))?,
            directory,
            descriptors,
            mounts,
            read_only,
            limit,
            most_held: MAX_HELD.min(limit / 2),
            own: sys::ids(),
            umask: 0,
            handles: Handles::default(),
            entries: Entries::default(),
        })
    }

    /// Bounds what is remembered by the size of the guest's memory.
    pub(super) fn fit(&mut self, ram_bytes: u64) {
        self.nodes.most = most_nodes(ram_bytes);
    }

    /// Makes the directory of descriptors the calling thread's own working directory, because the calls for
    /// extended attributes take a path and nothing else, and takes the thread's umask away,
    /// because the guest's is the one that counts.
    pub(super) fn enter_thread(&mut self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        fchdir(&self.descriptors)?;
        umask(Mode::empty());
        self.umask = 0;
        self.own = sys::ids();
        Ok(())
    }

    /// Forgets all that the guest has set up.
    pub(super) fn forget_all(&mut self) {
        let root = self.directory.try_clone();
        if let Ok(nodes) = root.and_then(|root| Nodes::new(root, self.nodes.most)) {
            self.nodes = nodes;
            self.handles = Handles::default();
        }
    }

    /// Lets go of all that was on mounts which are gone.
    pub(super) fn mounts_changed(&mut self) -> io::Result<()> {
        let mut mounts: HashSet<u64> = self.mounts.ids()?;
        // The share itself stays what it is, seen or not.
        mounts.insert(sys::attributes(&self.directory)?.stx_mnt_id);
        let gone = self.nodes.keep_mounts(&mounts);
        self.handles.close_mounts(&gone);
        Ok(())
    }

    /// Lets fewer files be known, for tests.
    #[cfg(test)]
    pub(super) fn know_at_most(&mut self, most: usize) {
        self.nodes.most = most;
    }

    /// Lets fewer files be held, for tests.
    #[cfg(test)]
    pub(super) fn hold_at_most(&mut self, most: usize) {
        self.most_held = most;
    }

    /// Lets the guest have fewer files in all, for tests.
    #[cfg(test)]
    pub(super) fn limit_to(&mut self, most: usize) {
        self.limit = most;
    }

    /// How many bytes of directory entries were read.
    #[cfg(test)]
    pub(super) fn read_bytes(&self) -> usize {
        self.entries.read_bytes
    }

    /// How many are held.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.nodes.held()
    }

    fn may_write(&self) -> io::Result<()> {
        if self.read_only {
            return Err(error(libc::EROFS));
        }
        Ok(())
    }

    /// Tells the guest of `name` in `parent`.
    fn tell(&mut self, parent: u64, name: &CStr) -> io::Result<Entry> {
        let attributes = sys::attributes_at(self.nodes.descriptor(parent)?, name)?;
        self.tell_of(&attributes, parent, name)
    }

    fn tell_of(&mut self, attributes: &Attributes, parent: u64, name: &CStr) -> io::Result<Entry> {
        let node = self.nodes.found(attributes, parent, name)?;
        Ok(Entry {
            node,
            attr: self.attr(attributes),
            valid_s: BELIEF_S,
        })
    }

    /// The attributes of a node, by the cheapest way there is.
    fn attributes(&mut self, number: u64) -> io::Result<Attributes> {
        let handle = self.nodes.node(number)?.handle();
        match handle.map(|handle| self.handles.get(handle, number)) {
            Some(Ok(handle)) => sys::attributes(handle.file()?),
            _ => self.nodes.attributes(number),
        }
    }

    /// Attributes as the guest is told them.
    fn attr(&self, attributes: &Attributes) -> Attr {
        let time = |time: libc::statx_timestamp| (time.tv_sec, time.tv_nsec);
        Attr {
            ino: self
                .nodes
                .shown_inode(device(attributes), attributes.stx_ino),
            size: attributes.stx_size,
            blocks: attributes.stx_blocks,
            atime: time(attributes.stx_atime),
            mtime: time(attributes.stx_mtime),
            ctime: time(attributes.stx_ctime),
            mode: u32::from(attributes.stx_mode),
            nlink: attributes.stx_nlink,
            uid: attributes.stx_uid,
            gid: attributes.stx_gid,
            rdev: libc::makedev(attributes.stx_rdev_major, attributes.stx_rdev_minor) as u32,
            blksize: attributes.stx_blksize,
        }
    }

    /// Sees to it that a few more descriptors can be opened.
    fn leave_room(&mut self) -> io::Result<()> {
        self.nodes.trim(self.most_held);
        if self.nodes.held() + self.handles.len() >= self.limit {
            return Err(error(libc::ENFILE));
        }
        Ok(())
    }
}

impl AsRawFd for Share {
    /// Exceptional (`POLLPRI`) when [`Share::mounts_changed`] should be called.
    fn as_raw_fd(&self) -> RawFd {
        self.mounts.as_raw_fd()
    }
}

/// A descriptor's number as a name in the directory of descriptors.
struct Number([u8; 12]);

impl Number {
    fn of(descriptor: BorrowedFd<'_>) -> Self {
        let mut number = descriptor.as_raw_fd().unsigned_abs();
        let mut reversed = [0; 12];
        let mut len = 0;
        // At most ten digits, so there is room and a zero after them.
        loop {
            reversed[len] = b'0' + (number % 10) as u8;
            number /= 10;
            len += 1;
            if number == 0 {
                break;
            }
        }
        reversed[..len].reverse();
        Self(reversed)
    }

    fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }

    /// The path of `name` in a directory.
    fn below(directory: BorrowedFd<'_>, name: &CStr) -> CString {
        let number = Self::of(directory);
        let parts = [number.as_c_str().to_bytes(), b"/", name.to_bytes()];
        let mut path = Vec::with_capacity(parts.iter().map(|part| part.len()).sum::<usize>() + 1);
        for part in parts {
            path.extend_from_slice(part);
        }
        // Neither part has a zero.
        CString::new(path).unwrap_or_default()
    }
}

fn raise_limit() -> io::Result<usize> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(usize::try_from(hard.saturating_sub(OTHER_DESCRIPTORS)).unwrap_or(usize::MAX))
}

fn mode_of(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode & 0o7777)
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn a_descriptor_is_named_by_its_number() {
        let open = |_| File::open("/dev/null").unwrap();
        let files: Vec<File> = (0..120).map(open).collect();
        for file in &files {
            let number = Number::of(file.as_fd());
            assert_eq!(
                number.as_c_str().to_str().unwrap(),
                file.as_raw_fd().to_string()
            );
            let below = Number::below(file.as_fd(), c"name");
            assert_eq!(
                below.to_str().unwrap(),
                format!("{}/name", file.as_raw_fd())
            );
        }
    }
}
