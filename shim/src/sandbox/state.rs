//! A sandbox's directory: `<root>/<namespace>/<id>/`, mode 0700.
//!
//! ```text
//!   journal     what was made, each line written before the thing is
//!   vsock.sock  the way into the guest
//!   trace.json  where the start's time went
//! ```
//!
//! The journal is locked for as long as its owner lives. A directory whose
//! journal nobody holds is a leftover of an owner that was killed: the next one
//! of that name undoes it. Making and undoing happen under a lock on the
//! namespace's directory, so two at once cannot meet half-way.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt, symlink},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::{attachment, shared};
use crate::{
    cgroup,
    cni::{self, Attached},
    id::{ContainerId, Namespace},
};

const JOURNAL: &str = "journal";

/// How the names of directories begin that are being removed: no container's can.
const GONE: &str = "~";

/// Why there is no directory for a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is taken by a sandbox that runs.
    #[error(
        "container with given ID already exists: {id} runs in {}; choose another ID or end it first",
        path.display()
    )]
    Exists {
        /// The name.
        id: ContainerId,
        /// Its directory.
        path: PathBuf,
    },
    /// Its network cannot be undone.
    #[error("cannot remove what a killed sandbox left in {}", path.display())]
    Network {
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: cni::Error,
    },
    /// A step on the file system failed.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Something that is about to be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "made", rename_all = "snake_case")]
pub enum Made {
    /// This directory, by the process with this id.
    Directory {
        /// The owner.
        owner: u32,
    },
    /// A file in this directory.
    File {
        /// Its name.
        name: String,
    },
    /// A mount in this directory.
    Mount {
        /// What it is mounted on.
        name: String,
    },
    /// A cgroup.
    Cgroup {
        /// Where.
        path: PathBuf,
    },
    /// A name of the network namespace in this directory.
    Namespace,
    /// An attachment to a network: noted before it is made, and after that with its result.
    Attachment {
        /// All that undoing it needs.
        attached: Box<Attached>,
    },
    /// The VMM's process, which dies with the owner.
    Vmm,
}

/// The process that makes, holds or removes a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Its pid.
    pub pid: u32,
    path: PathBuf,
}

impl Owner {
    /// That of the sandbox in `path`, if it lives.
    ///
    /// # Errors
    /// When the journal cannot be looked at.
    pub fn of(path: &Path) -> Result<Option<Self>, Error> {
        let file = path.join(JOURNAL);
        let journal = match File::open(&file) {
            Ok(journal) => journal,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &file)(error)),
        };
        if is_abandoned(journal).map_err(failed("lock", &file))? {
            return Ok(None);
        }
        let made = Made::read(path);
        let pid = made.iter().find_map(|made| match made {
            Made::Directory { owner } => Some(*owner),
            _ => None,
        });
        Ok(pid.map(|pid| Self {
            pid,
            path: path.to_owned(),
        }))
    }

    /// Whether it still holds the sandbox.
    ///
    /// # Errors
    /// When the journal cannot be looked at.
    pub fn is_alive(&self) -> Result<bool, Error> {
        Ok(Self::of(&self.path)?.as_ref() == Some(self))
    }
}

impl Made {
    /// What the journal in `path` names, the first first.
    fn read(path: &Path) -> Vec<Self> {
        let text = fs::read_to_string(path.join(JOURNAL)).unwrap_or_default();
        // The last line may be a part of one.
        let lines = text.lines().map(serde_json::from_str);
        lines.filter_map(Result::ok).collect()
    }
}

/// Whether nobody holds the lock of this journal.
fn is_abandoned(journal: File) -> io::Result<bool> {
    match Flock::lock(journal, FlockArg::LockSharedNonblock) {
        Ok(_) => Ok(true),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(false),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// The right to let a directory stay when its owner ends.
#[derive(Debug)]
pub(super) struct Keeper(Arc<AtomicBool>);

impl Keeper {
    /// Lets it stay, unless it was removed.
    pub(super) fn keep(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The directory. Dropping it removes it with all that is in it.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    directory: File,
    journal: Flock<File>,
    removed: Arc<AtomicBool>,
}

impl StateDir {
    /// Makes the directory, having undone a leftover of the same name.
    ///
    /// # Errors
    /// When the name is in use or the file system refuses.
    pub fn create(root: &Path, namespace: &Namespace, id: &ContainerId) -> Result<Self, Error> {
        let namespace_path = root.join(namespace.as_str());
        private()
            .recursive(true)
            .create(&namespace_path)
            .map_err(failed("make the directory", &namespace_path))?;
        let _turn = turn(&namespace_path)?;

        let path = namespace_path.join(id.as_str());
        match private().create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if fs::symlink_metadata(&path).is_ok_and(|entry| entry.is_symlink()) {
                    remove_dead_link(&path, id)?;
                } else {
                    undo_leftover(&path, id)?;
                }
                private()
                    .create(&path)
                    .map_err(failed("make the directory", &path))?;
            }
            Err(error) => return Err(failed("make the directory", &path)(error)),
        }
        Self::fill(path.clone()).inspect_err(|_| {
            // It was made a moment ago by nobody else.
            let _ = fs::remove_dir_all(&path);
        })
    }

    /// Removes what a killed owner left under this name.
    ///
    /// # Errors
    /// When it has an owner that lives, or the file system refuses.
    pub fn undo(root: &Path, namespace: &Namespace, id: &ContainerId) -> Result<(), Error> {
        let namespace_path = root.join(namespace.as_str());
        let parent = match File::open(&namespace_path) {
            Ok(parent) => parent,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed("open", &namespace_path)(error)),
        };
        let _turn = Flock::lock(parent, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed("lock", &namespace_path)(errno.into()))?;
        let path = namespace_path.join(id.as_str());
        if !path.exists() {
            return Ok(());
        }
        undo_leftover(&path, id)
    }

    fn fill(path: PathBuf) -> Result<Self, Error> {
        let directory = File::open(&path).map_err(failed("open", &path))?;
        let file = path.join(JOURNAL);
        let journal = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&file)
            .map_err(failed("make", &file))?;
        // Those who only look hold it for a moment.
        let journal = Flock::lock(journal, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed("lock", &file)(errno.into()))?;
        let state = Self {
            path,
            directory,
            journal,
            removed: Arc::default(),
        };
        state.record(&Made::Directory {
            owner: std::process::id(),
        })?;
        Ok(state)
    }

    /// Undoes what a killed owner left in `path`.
    ///
    /// # Errors
    /// When its owner lives, or something cannot be undone.
    pub fn undo_at(path: &Path) -> Result<(), Error> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        let _turn = turn(parent)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match ContainerId::parse(&name) {
            Ok(id) if path.exists() => undo_leftover(path, &id),
            _ => Ok(()),
        }
    }

    /// Removes the directories below `namespace` that were being removed when their owners were
    /// killed.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn sweep(namespace: &Path) -> Result<(), Error> {
        for entry in fs::read_dir(namespace).into_iter().flatten().flatten() {
            let path = entry.path();
            let is_going = entry.file_name().to_string_lossy().starts_with(GONE);
            // One whose owner lives is just being removed by that.
            if !is_going || Owner::of(&path)?.is_some() {
                continue;
            }
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Notes what is about to be made.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub fn record(&self, made: &Made) -> Result<(), Error> {
        let mut line = serde_json::to_vec(made).unwrap_or_default();
        line.push(b'\n');
        (&*self.journal)
            .write_all(&line)
            .map_err(failed("write", &self.path.join(JOURNAL)))
    }

    /// Makes a listening unix socket in it.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(&self, name: &'static str) -> Result<UnixListener, Error> {
        self.record(&Made::File {
            name: name.to_owned(),
        })?;
        UnixListener::bind(self.short_path(name))
            .map_err(failed("listen on", &self.path.join(name)))
    }

    /// Writes a file in it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, name: &'static str, content: &[u8]) -> Result<(), Error> {
        self.record(&Made::File {
            name: name.to_owned(),
        })?;
        fs::write(self.path.join(name), content).map_err(failed("write", &self.path.join(name)))
    }

    /// A path of a file in it that this process can use however long the real one is: a unix
    /// socket's may have 107 bytes only.
    pub fn short_path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!(
            "/proc/self/fd/{}/{name}",
            self.directory.as_raw_fd()
        ))
    }
}

impl StateDir {
    /// Lets it stay when its owner ends, as if that had been killed.
    pub fn keep(&self) {
        self.keeper().keep();
    }

    /// The right to let it stay.
    pub(super) fn keeper(&self) -> Keeper {
        Keeper(self.removed.clone())
    }

    /// Makes a link of this name beside it, by which a member of the pod is found.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn link(&self, member: &ContainerId) -> Result<(), Error> {
        let link = self.path.with_file_name(member.as_str());
        let _turn = turn(self.path.parent().unwrap_or(Path::new("/")))?;
        let name = self.path.file_name().unwrap_or_default();
        match symlink(name, &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !link.exists() => {
                // One whose sandbox is gone.
                fs::remove_file(&link)
                    .and_then(|()| symlink(name, &link))
                    .map_err(failed("make the link", &link))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Error::Exists {
                id: member.clone(),
                path: link,
            }),
            made => made.map_err(failed("make the link", &link)),
        }
    }

    /// Removes a link that [`StateDir::link`] made.
    pub fn unlink(&self, member: &ContainerId) {
        let link = self.path.with_file_name(member.as_str());
        if fs::read_link(&link).is_ok_and(|to| Some(to.as_os_str()) == self.path.file_name()) {
            let _ = fs::remove_file(link);
        }
    }

    /// Removes it, unless that was done.
    pub(super) fn remove(&self) {
        if self.removed.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the sandbox's directory stays behind");
        }
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes a member's link whose sandbox is gone, or left by a killed owner.
fn remove_dead_link(link: &Path, id: &ContainerId) -> Result<(), Error> {
    let sandbox = link.canonicalize();
    if sandbox.is_ok_and(|sandbox| matches!(Owner::of(&sandbox), Ok(Some(_)))) {
        return Err(Error::Exists {
            id: id.clone(),
            path: link.to_owned(),
        });
    }
    fs::remove_file(link).map_err(failed("remove the link", link))
}

/// The right to make and undo in a namespace's directory.
fn turn(namespace: &Path) -> Result<Flock<File>, Error> {
    let directory = File::open(namespace).map_err(failed("open", namespace))?;
    Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| failed("lock", namespace)(errno.into()))
}

/// Removes the directory of an owner that was killed. Its VMM died with it, and nothing else was
/// made outside of the directory.
fn undo_leftover(path: &Path, id: &ContainerId) -> Result<(), Error> {
    match File::open(path.join(JOURNAL)) {
        Ok(journal) => match Flock::lock(journal, FlockArg::LockExclusiveNonblock) {
            Ok(_abandoned) => {}
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                return Err(Error::Exists {
                    id: id.clone(),
                    path: path.to_owned(),
                });
            }
            Err((_, errno)) => return Err(failed("lock the journal of", path)(errno.into())),
        },
        // Its owner was killed before it wrote one, or while it removed the directory.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("open the journal of", path)(error)),
    }
    tracing::info!(path = %path.display(), "removing what a killed sandbox left");
    let made = Made::read(path);
    attachment::undo_leftover(&made, path).map_err(|source| Error::Network {
        path: path.to_owned(),
        source,
    })?;
    for made in made.iter().rev() {
        if let Made::Cgroup { path } = made {
            cgroup::remove(path).map_err(failed("remove the cgroup", path))?;
        }
    }
    remove(path).map_err(failed("remove what a killed sandbox left in", path))
}

/// Removes a sandbox's directory: its name is free at once. A mount that cannot be let go of is
/// an error rather than a walk through what is mounted.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let shared = shared::release_leftover(path);
    match fs::remove_dir(&shared) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let gone = path.with_file_name(format!("{GONE}{}-{count}", std::process::id()));
    match fs::rename(path, &gone).and_then(|()| fs::remove_dir_all(&gone)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn private() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        doing,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::testing::soon;

    fn names() -> (Namespace, ContainerId) {
        (
            Namespace::parse("default").expect("a name"),
            ContainerId::parse("web").expect("a name"),
        )
    }

    #[test]
    fn the_directory_is_private_and_goes_with_its_owner() {
        let root = tempfile::tempdir().expect("a directory");
        let (namespace, id) = names();
        let state = StateDir::create(root.path(), &namespace, &id).expect("made");
        let path = state.path().to_owned();
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        state.write("trace.json", b"{}").expect("written");
        drop(state);
        assert!(!path.exists());
    }

    #[test]
    fn a_name_in_use_is_refused() {
        let root = tempfile::tempdir().expect("a directory");
        let (namespace, id) = names();
        let first = StateDir::create(root.path(), &namespace, &id).expect("made");
        let second = StateDir::create(root.path(), &namespace, &id);
        assert!(matches!(second, Err(Error::Exists { .. })), "{second:?}");
        assert!(first.path().join(JOURNAL).exists());
    }

    #[test]
    fn the_same_name_in_another_namespace_is_another() {
        let root = tempfile::tempdir().expect("a directory");
        let (namespace, id) = names();
        let other = Namespace::parse("other").expect("a name");
        let _first = StateDir::create(root.path(), &namespace, &id).expect("made");
        StateDir::create(root.path(), &other, &id).expect("made");
    }

    #[test]
    fn what_a_killed_owner_left_is_undone_by_the_next() {
        let root = tempfile::tempdir().expect("a directory");
        let (namespace, id) = names();
        let leftover = root.path().join("default/web");
        fs::create_dir_all(leftover.join("deep")).expect("made");
        fs::write(leftover.join(JOURNAL), "{}\n").expect("written");
        let state = StateDir::create(root.path(), &namespace, &id).expect("made");
        assert!(!state.path().join("deep").exists());
    }

    #[test]
    fn a_leftover_is_undone_by_name_and_what_has_an_owner_is_not() {
        let root = tempfile::tempdir().expect("a directory");
        let (namespace, id) = names();
        let undo = || StateDir::undo(root.path(), &namespace, &id);
        undo().expect("there is nothing");
        let state = StateDir::create(root.path(), &namespace, &id).expect("made");
        let path = state.path().to_owned();
        assert!(matches!(undo(), Err(Error::Exists { .. })));
        assert!(path.exists());
        drop(state);
        fs::create_dir_all(path.join("deep")).expect("made");
        soon(|| undo().ok());
        assert!(!path.exists());
    }

    #[test]
    fn a_sweep_takes_what_nobody_removes_any_more_and_nothing_else() {
        let root = tempfile::tempdir().expect("a directory");
        let (namespace, id) = names();
        let state = StateDir::create(root.path(), &namespace, &id).expect("made");
        let home = root.path().join("default");
        let mine = home.join("~1-0");
        fs::rename(state.path(), &mine).expect("renamed");
        fs::create_dir_all(home.join("~2-0/deep")).expect("made");
        fs::create_dir_all(home.join("other")).expect("made");
        StateDir::sweep(&home).expect("swept");
        assert!(mine.exists() && home.join("other").exists());
        assert!(!home.join("~2-0").exists());
        drop(state);
        soon(|| {
            StateDir::sweep(&home).expect("swept");
            (!mine.exists()).then_some(())
        });
    }

    #[test]
    fn a_socket_can_be_made_below_a_long_path() {
        let root = tempfile::tempdir().expect("a directory");
        let (namespace, _) = names();
        let id = ContainerId::parse(&"a".repeat(200)).expect("a name");
        let state = StateDir::create(root.path(), &namespace, &id).expect("made");
        state.listen("vsock.sock").expect("listens");
        assert!(state.path().join("vsock.sock").exists());
    }

    #[test]
    fn the_journal_names_a_thing_before_it_is_made() {
        let root = tempfile::tempdir().expect("a directory");
        let (namespace, id) = names();
        let state = StateDir::create(root.path(), &namespace, &id).expect("made");
        state.record(&Made::Vmm).expect("recorded");
        let journal = fs::read_to_string(state.path().join(JOURNAL)).expect("read");
        assert!(journal.ends_with("{\"made\":\"vmm\"}\n"), "{journal}");
    }
}
