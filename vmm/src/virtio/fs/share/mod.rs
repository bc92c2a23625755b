//! A directory of the host as the guest may use it.
//!
//! No path of the guest's is ever walked here: the guest's kernel walks, and
//! asks for one name in one directory at a time. A name is opened below the
//! directory's descriptor, by path only and without following a link, so
//! neither `..` nor a link nor a device leads out. Reading and writing opens
//! the node's own descriptor again through `/proc/self/fd`, for which a
//! descriptor of that directory is kept, and only if the node is a regular
//! file or a directory.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fuse_backend_rs::api::filesystem::Entry;
use nix::{
    fcntl::{OFlag, open, openat},
    sched::{CloneFlags, unshare},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::{Mode, umask},
    },
    unistd::fchdir,
};

mod handles;
mod nodes;
mod serve;
mod sys;

use super::request::check_name;
use handles::Handles;
use nodes::Nodes;
use sys::Attributes;

/// How long the guest may believe what it was told of a name or of attributes. The host may
/// change the files, and nothing tells the guest.
const BELIEF: Duration = Duration::from_secs(1);

/// Descriptors that are left to the rest of the process.
const OTHER_DESCRIPTORS: u64 = 256;

/// A shared directory.
pub(super) struct Share {
    directory: OwnedFd,
    /// `/proc/self/fd`.
    descriptors: OwnedFd,
    read_only: bool,
    /// How many files the guest may make the process hold.
    limit: usize,
    state: Mutex<State>,
}

/// What the guest has set up.
struct State {
    nodes: Nodes,
    handles: Handles,
    /// For directory entries on their way.
    entries: Vec<u8>,
}

/// Why a directory cannot be shared.
pub(super) struct OpenError {
    pub(super) step: &'static str,
    pub(super) source: io::Error,
}

impl Share {
    pub(super) fn open(directory: OwnedFd, read_only: bool) -> Result<Self, OpenError> {
        let step = |step| move |source: io::Error| OpenError { step, source };
        let path_only = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let descriptors = open(c"/proc/self/fd", path_only, Mode::empty())
            .map_err(io::Error::from)
            .map_err(step("open /proc/self/fd, is /proc mounted?"))?;
        let directory = openat(&directory, c".", path_only, Mode::empty())
            .map_err(io::Error::from)
            .map_err(step("open the directory"))?;
        let limit = raise_limit().map_err(step("raise the limit of open files"))?;
        let state = State::new(&directory).map_err(step("look at the directory"))?;
        Ok(Self {
            directory,
            descriptors,
            read_only,
            limit,
            state: Mutex::new(state),
        })
    }

    /// Makes `/proc/self/fd` the calling thread's own working directory, because the calls for
    /// extended attributes take a path and nothing else, and takes the thread's umask away,
    /// because the guest has applied its own.
    pub(super) fn enter_thread(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        fchdir(&self.descriptors)?;
        umask(Mode::empty());
        Ok(())
    }

    /// Forgets all that the guest has set up.
    pub(super) fn forget_all(&self) {
        if let Ok(state) = State::new(&self.directory) {
            *self.state() = state;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn may_write(&self) -> io::Result<()> {
        if self.read_only {
            return Err(error(libc::EROFS));
        }
        Ok(())
    }

    /// Tells the guest of `name` in `parent`.
    fn tell(&self, state: &mut State, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name.to_bytes()).map_err(error)?;
        self.leave_room(state)?;
        let path = openat(
            &state.nodes.get(parent)?.path,
            name,
            OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        let attributes = sys::attributes(&path)?;
        Ok(state.tell(path, &attributes))
    }

    /// Opens a node for reading or writing.
    fn reopen(&self, state: &State, number: u64, flags: OFlag) -> io::Result<File> {
        let node = state.nodes.get(number)?;
        if !matches!(node.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(error(libc::ENXIO));
        }
        self.leave_room(state)?;
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let file = openat(
            &self.descriptors,
            Number::of(node.path.as_fd()).as_c_str(),
            flags,
            Mode::empty(),
        )?;
        Ok(file.into())
    }

    fn leave_room(&self, state: &State) -> io::Result<()> {
        if state.nodes.len() + state.handles.len() >= self.limit {
            return Err(error(libc::ENFILE));
        }
        Ok(())
    }
}

impl State {
    fn new(directory: &OwnedFd) -> io::Result<Self> {
        let root = directory.try_clone()?;
        let attributes = sys::attributes(&root)?;
        Ok(Self {
            nodes: Nodes::new(root, &attributes),
            handles: Handles::default(),
            entries: Vec::new(),
        })
    }

    fn tell(&mut self, path: OwnedFd, attributes: &Attributes) -> Entry {
        Entry {
            inode: self.nodes.found(path, attributes),
            generation: 0,
            attr: attributes.stat,
            attr_flags: 0,
            attr_timeout: BELIEF,
            entry_timeout: BELIEF,
        }
    }
}

/// A descriptor's number as a name in `/proc/self/fd`.
struct Number([u8; 12]);

impl Number {
    fn of(descriptor: BorrowedFd<'_>) -> Self {
        use io::Write;
        let mut digits = [0; 12];
        // An i32 has at most 11 characters, so there is room and a zero after them.
        let _ = write!(&mut digits[..], "{}", descriptor.as_raw_fd());
        Self(digits)
    }

    fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }
}

fn raise_limit() -> io::Result<usize> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(usize::try_from(hard.saturating_sub(OTHER_DESCRIPTORS)).unwrap_or(usize::MAX))
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
