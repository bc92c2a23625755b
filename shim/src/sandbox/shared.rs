//! The one tree of the host that a sandbox's guest sees: below it each
//! container has a place for its root file system, and so has each volume.
//!
//! ```text
//!   <state>/places/<n>/rootfs, volume   empty directories and files, ours to write
//!   <state>/shared/                     the same, as a mount of its own: read-only, and what is
//!                                       mounted below it reaches the guest's VMM
//! ```
//!
//! Containers that mount the same have it at one place: only then are its files the same to the
//! guest's kernel, and sockets, pipes, locks and mapped memory are shared by them.
//!
//! Mounts are only ever made below `shared`. Letting go of that one mount lets go of all of
//! them, and no walk over `places` can ever come into a container's files. Numbers are not used
//! twice: what the guest remembers of an old place is not taken for a new one.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};

use super::state::{Made, StateDir};
use crate::sys::{self, Attributes};

/// The device's tag.
pub(super) const TAG: &str = "shared";

/// Where the guest mounts it.
pub(super) const GUEST: &str = "/run/bulkhead/shared";

/// The directory of the places, and that of their mounts.
const PLACES: &str = "places";
const SHARED: &str = "shared";

/// The name of a volume in its place.
const VOLUME: &str = "volume";

/// Why something is not in the tree.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}", path.display())]
pub struct Error {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The tree. Dropping it lets go of everything that is mounted in it.
#[derive(Debug)]
pub struct SharedTree {
    state: PathBuf,
    /// The top of the mount.
    top: OwnedFd,
    next: AtomicU32,
    volumes: Mutex<Vec<Volume>>,
    /// Whether all is let go of: by then the paths may be another's of the same name.
    released: AtomicBool,
}

/// A place in the tree, a container's or a volume's. Dropping it lets go of what is mounted there.
#[derive(Debug)]
pub struct Place {
    tree: Arc<SharedTree>,
    number: u32,
    mounted: Vec<PathBuf>,
    /// The places of its volumes, which others may have, too.
    volumes: Vec<Arc<Place>>,
}

/// A volume that is in the tree as long as a container has it.
#[derive(Debug)]
struct Volume {
    source: Source,
    given: Given,
    place: Weak<Place>,
}

/// What a volume is of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Source {
    mount: u64,
    device: u64,
    inode: u64,
}

/// What holds for all that a container brings, at the host: no device file of it can be opened,
/// and nothing of it runs. The guest does not see it.
pub const GUARDS: u64 = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// How a mount is given to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Given {
    /// Whether what is mounted below comes with it.
    pub recursive: bool,
    /// What of it the guest may only read.
    pub read_only: ReadOnly,
}

/// What of a tree of mounts may only be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOnly {
    /// Nothing.
    No,
    /// The topmost mount, and not those below it.
    Top,
    /// All.
    All,
}

impl SharedTree {
    /// Makes an empty tree in `state`.
    pub(super) fn make(state: &StateDir) -> Result<Arc<Self>, Error> {
        let path = state.path().to_owned();
        let (places, shared) = (path.join(PLACES), path.join(SHARED));
        make_directory(&places)?;
        make_directory(&shared)?;
        state
            .record(&Made::Mount {
                name: SHARED.to_owned(),
            })
            .map_err(|error| Error {
                doing: "note the mount of",
                path: shared.clone(),
                source: io::Error::other(error),
            })?;
        let attached = || {
            let tree = sys::open_tree(File::open(&places)?.as_fd(), false)?;
            // Out of the peers of the host's mount, whose copies elsewhere get nothing of ours.
            let private = Attributes {
                propagation: libc::MS_PRIVATE,
                ..Attributes::default()
            };
            sys::set_attributes(tree.as_fd(), false, private)?;
            let ours = Attributes {
                set: libc::MOUNT_ATTR_RDONLY,
                propagation: libc::MS_SHARED,
                ..Attributes::default()
            };
            sys::set_attributes(tree.as_fd(), false, ours)?;
            sys::move_mount(tree.as_fd(), File::open(&shared)?.as_fd())?;
            Ok(tree)
        };
        let top = attached().map_err(failed("mount the shared tree on", &shared))?;
        Ok(Arc::new(Self {
            state: path,
            top,
            next: AtomicU32::new(0),
            volumes: Mutex::default(),
            released: AtomicBool::new(false),
        }))
    }

    /// The tree for the VMM.
    pub(super) fn for_vmm(&self) -> io::Result<OwnedFd> {
        self.top.try_clone()
    }

    /// A place for one more container.
    ///
    /// # Errors
    /// When there is no room for its directories.
    pub fn place(self: &Arc<Self>) -> Result<Place, Error> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let place = Place {
            tree: self.clone(),
            number,
            mounted: Vec::new(),
            volumes: Vec::new(),
        };
        make_directory(&place.own(""))?;
        Ok(place)
    }

    /// The place of a volume: the one that it has already, or a new one.
    fn volume(self: &Arc<Self>, file: &OwnedFd, given: Given) -> Result<Arc<Place>, Error> {
        let source = Source::of(file).map_err(failed("look at the source of", &self.state))?;
        let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        volumes.retain(|volume| volume.place.strong_count() > 0);
        // What the guest may write to anyway it may read there as well: its kernel keeps the
        // container from writing.
        let found = [ReadOnly::No, given.read_only]
            .iter()
            .find_map(|read_only| {
                let wanted = Given {
                    read_only: *read_only,
                    ..given
                };
                let same = |volume: &&Volume| volume.source == source && volume.given == wanted;
                volumes.iter().find(same)?.place.upgrade()
            });
        if let Some(place) = found {
            return Ok(place);
        }
        let mut place = self.place()?;
        place.attach_volume(file, given)?;
        let place = Arc::new(place);
        volumes.push(Volume {
            source,
            given,
            place: Arc::downgrade(&place),
        });
        Ok(place)
    }

    /// Lets go of all mounts at once, when no container needs them any more. Twice is as good as
    /// once.
    pub(super) fn release(&self) {
        if !self.released.swap(true, Ordering::Relaxed) {
            release(&self.state.join(SHARED));
        }
    }
}

impl Drop for SharedTree {
    fn drop(&mut self) {
        self.release();
    }
}

/// Lets go of the mounts of the tree in the directory `state`, if there are any, and returns
/// where the tree was.
pub(super) fn release_leftover(state: &Path) -> PathBuf {
    let shared = state.join(SHARED);
    release(&shared);
    shared
}

/// Until nothing is mounted there; another's copy of the mount keeps nothing of ours.
fn release(shared: &Path) {
    loop {
        match umount2(shared, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return,
            Err(errno) => {
                tracing::warn!(path = %shared.display(), %errno, "a mount stays behind");
                return;
            }
        }
    }
}

impl Place {
    /// Puts the tree of mounts at `source` to the root file system's place; returns the guest's
    /// path of it.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn root(&mut self, source: &OwnedFd, given: Given) -> Result<String, Error> {
        make_directory(&self.own("rootfs"))?;
        self.attach(source, "rootfs", given)
    }

    /// A directory to mount the root file system on, by others; returns the host's path and the
    /// guest's.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn root_to_mount_on(&mut self) -> Result<(PathBuf, String), Error> {
        make_directory(&self.own("rootfs"))?;
        let path = self.host("rootfs");
        self.mounted.push(path.clone());
        Ok((path, self.guest("rootfs")))
    }

    /// Puts a volume, a directory or file, into the tree; returns the guest's path of it.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn volume(&mut self, source: &OwnedFd, given: Given) -> Result<String, Error> {
        let place = self.tree.volume(source, given)?;
        let path = place.guest(VOLUME);
        self.volumes.push(place);
        Ok(path)
    }

    fn attach_volume(&mut self, source: &OwnedFd, given: Given) -> Result<(), Error> {
        let place = self.own(VOLUME);
        let is_directory = File::from(
            source
                .try_clone()
                .map_err(failed("hold a descriptor of", &place))?,
        )
        .metadata()
        .map_err(failed("look at the source of", &place))?
        .is_dir();
        if is_directory {
            make_directory(&place)?;
        } else {
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&place)
                .map_err(failed("make", &place))?;
        }
        self.attach(source, VOLUME, given).map(drop)
    }

    fn attach(&mut self, source: &OwnedFd, name: &str, given: Given) -> Result<String, Error> {
        let path = self.host(name);
        self.mounted.push(path.clone());
        let attached = || {
            let tree = sys::open_tree(source.as_fd(), given.recursive)?;
            // What the host mounts below later comes in, nothing goes out.
            let slave = Attributes {
                set: GUARDS,
                propagation: libc::MS_SLAVE,
                ..Attributes::default()
            };
            sys::set_attributes(tree.as_fd(), true, slave)?;
            let read_only = Attributes {
                set: libc::MOUNT_ATTR_RDONLY,
                ..Attributes::default()
            };
            match given.read_only {
                ReadOnly::No => {}
                ReadOnly::Top => sys::set_attributes(tree.as_fd(), false, read_only)?,
                ReadOnly::All => sys::set_attributes(tree.as_fd(), true, read_only)?,
            }
            let target = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
                .open(&path)?;
            sys::move_mount(tree.as_fd(), target.as_fd())
        };
        attached().map_err(failed("mount", &path))?;
        Ok(self.guest(name))
    }

    /// Where it is written.
    fn own(&self, name: &str) -> PathBuf {
        let place = self.tree.state.join(PLACES).join(self.number.to_string());
        match name {
            "" => place,
            name => place.join(name),
        }
    }

    /// Where it is mounted on.
    fn host(&self, name: &str) -> PathBuf {
        let shared = self.tree.state.join(SHARED);
        shared.join(self.number.to_string()).join(name)
    }

    fn guest(&self, name: &str) -> String {
        format!("{GUEST}/{}/{name}", self.number)
    }
}

impl Source {
    fn of(file: &OwnedFd) -> io::Result<Self> {
        let status = File::from(file.try_clone()?).metadata()?;
        Ok(Self {
            mount: sys::mount_of(file.as_fd())?,
            device: status.dev(),
            inode: status.ino(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.tree.released.load(Ordering::Relaxed) {
            // It goes with the sandbox's directory.
            return;
        }
        for path in self.mounted.iter().rev() {
            release(path);
        }
        // Nothing is mounted in this view of it.
        if let Err(error) = fs::remove_dir_all(self.own(""))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.own("").display(), %error, "a container's place stays behind");
        }
    }
}

fn make_directory(path: &Path) -> Result<(), Error> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(failed("make the directory", path)),
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error {
        doing,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use nix::{
        mount::{MsFlags, mount},
        sys::{
            stat::{Mode, SFlag, makedev, mknod},
            statvfs::{FsFlags, statvfs},
        },
    };

    use super::*;
    use crate::id::{ContainerId, Namespace};

    #[test]
    fn no_device_file_of_what_a_container_brings_can_be_opened_at_the_host() {
        sys::apart(|| {
            let directory = tempfile::tempdir().expect("a directory");
            let namespace = Namespace::parse("default").expect("a name");
            let id = ContainerId::parse("c").expect("an id");
            let state = StateDir::create(directory.path(), &namespace, &id).expect("made");
            let tree = SharedTree::make(&state).expect("a tree");
            let mut place = tree.place().expect("a place");

            // A file system with another one in it, each with a device file.
            let source = directory.path().join("source");
            for place in [source.clone(), source.join("below")] {
                fs::create_dir(&place).expect("made");
                let (nothing, flags) = (None::<&str>, MsFlags::empty());
                mount(Some("none"), &place, Some("tmpfs"), flags, nothing).expect("mounted");
                let mode = Mode::S_IRUSR | Mode::S_IWUSR;
                mknod(&place.join("null"), SFlag::S_IFCHR, mode, makedev(1, 3)).expect("made");
                File::open(place.join("null")).expect("a device");
            }
            let source = OwnedFd::from(File::open(&source).expect("open"));
            let given = Given {
                recursive: true,
                read_only: ReadOnly::No,
            };
            place.root(&source, given).expect("the root");
            place.volume(&source, given).expect("a volume");
            let volume = place.volumes[0].clone();
            for (place, name) in [
                (&place, "rootfs"),
                (&place, "rootfs/below"),
                (&*volume, "volume"),
                (&*volume, "volume/below"),
            ] {
                let path = place.host(name);
                let guards = FsFlags::ST_NODEV | FsFlags::ST_NOSUID | FsFlags::ST_NOEXEC;
                let flags = statvfs(&path).expect("there").flags();
                assert!(flags.contains(guards), "{name}: {flags:?}");
                assert!(!flags.contains(FsFlags::ST_RDONLY), "{name}: {flags:?}");
                assert!(File::open(path.join("null")).is_err(), "{name}");
            }
        });
    }

    #[test]
    fn a_volume_of_several_containers_is_at_one_place_until_the_last_of_them_goes() {
        sys::apart(|| {
            let directory = tempfile::tempdir().expect("a directory");
            let namespace = Namespace::parse("default").expect("a name");
            let id = ContainerId::parse("c").expect("an id");
            let state = StateDir::create(directory.path(), &namespace, &id).expect("made");
            let tree = SharedTree::make(&state).expect("a tree");
            let source = |name: &str| {
                let path = directory.path().join(name);
                fs::create_dir_all(path.join("file")).expect("made");
                OwnedFd::from(File::open(&path).expect("open"))
            };
            let given = |read_only| Given {
                recursive: true,
                read_only,
            };
            let [mut one, mut two] = [(); 2].map(|()| tree.place().expect("a place"));
            let mut volume = |place: usize, name: &str, read_only| {
                let place = [&mut one, &mut two]
                    .into_iter()
                    .nth(place)
                    .expect("a place");
                place
                    .volume(&source(name), given(read_only))
                    .expect("a volume")
            };
            let path = volume(0, "a", ReadOnly::No);
            assert_eq!(volume(0, "a", ReadOnly::No), path);
            assert_eq!(volume(1, "a", ReadOnly::No), path);
            // Who may write to it can do so anyway.
            assert_eq!(volume(1, "a", ReadOnly::Top), path);
            assert_ne!(volume(1, "b", ReadOnly::No), path);
            // But not at a place where nobody may.
            let sealed = volume(0, "c", ReadOnly::Top);
            assert_ne!(volume(1, "c", ReadOnly::No), sealed);

            let host = one.volumes[0].host("volume/file");
            drop(one);
            assert!(host.exists());
            drop(two);
            assert!(!host.exists());
            let left: Vec<_> = fs::read_dir(state.path().join(PLACES))
                .expect("read")
                .collect();
            assert!(left.is_empty(), "{left:?}");
        });
    }

    #[test]
    fn what_is_left_of_a_removed_tree_is_no_harm_to_the_next_of_its_name() {
        sys::apart(|| {
            let directory = tempfile::tempdir().expect("a directory");
            let namespace = Namespace::parse("default").expect("a name");
            let id = ContainerId::parse("c").expect("an id");
            let source = directory.path().join("source");
            fs::create_dir_all(source.join("file")).expect("made");
            let source = OwnedFd::from(File::open(&source).expect("open"));
            let given = Given {
                recursive: false,
                read_only: ReadOnly::No,
            };
            let make = || {
                let state = StateDir::create(directory.path(), &namespace, &id).expect("made");
                let tree = SharedTree::make(&state).expect("a tree");
                let mut place = tree.place().expect("a place");
                place.root(&source, given).expect("the root");
                (state, tree, place)
            };
            let (state, tree, place) = make();
            tree.release();
            drop(state);
            let (_state, _tree, next) = make();
            drop((place, tree));
            assert!(next.host("rootfs/file").exists());
        });
    }
}
