//! Where a namespace's containers are found, living or not.
//!
//! ```text
//!   <root>/<namespace>/<sandbox>/        a pod's state directory
//!   <root>/<namespace>/<member>          a link to its sandbox's
//! ```

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

use super::{
    client::{Client, Error as ClientError},
    message::Request,
    record::{Record, State},
};
use crate::{
    id::{ContainerId, Namespace},
    pod::Kind,
    sandbox::{Owner, StateDir, StateError},
    sys,
};

/// How long a pod's process may take to undo what it made, before it is killed.
const UNDO: Duration = Duration::from_secs(20);

/// How long a pod may be coming or going: a process that was killed goes only when the host has a
/// processor for it.
const CHANGE: Duration = Duration::from_secs(20);

/// When one that comes or goes is looked for anew.
const PAUSE: Duration = Duration::from_millis(20);

/// Why a container cannot be found or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none of that name.
    #[error("container does not exist")]
    NotFound,
    /// Its pod's process is gone.
    #[error("container not running")]
    NotRunning,
    /// Its pod's process refuses.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Its directory cannot be removed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The file system refuses.
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

impl Error {
    /// What kind of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::NotFound => Kind::NotFound,
            Self::NotRunning => Kind::State,
            Self::Client(ClientError::Refused { kind, .. }) => *kind,
            _ => Kind::Internal,
        }
    }
}

/// A namespace's directory.
#[derive(Debug, Clone)]
pub struct Home(PathBuf);

/// What there is of a container.
#[derive(Debug)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// Its pod's process answers.
    Living(Client),
    /// Its pod's process makes it, or removes it.
    Changing(Owner),
    /// Its pod's process is gone, and the directory is left.
    Abandoned(PathBuf),
}

impl Home {
    /// That of `namespace` below `root`.
    pub fn new(root: &Path, namespace: &Namespace) -> Self {
        Self(root.join(namespace.as_str()))
    }

    /// Looks for a container.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn find(&self, id: &ContainerId) -> Result<Found, Error> {
        let path = self.0.join(id.as_str());
        match fs::metadata(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A member's link whose sandbox is gone.
                let _ = fs::remove_file(&path);
                return Ok(Found::Nothing);
            }
            Err(error) => return Err(failed("look at", &path)(error)),
        }
        match Client::connect(&path) {
            Ok(client) => return Ok(Found::Living(client)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) => {}
            Err(error) => return Err(failed("connect to the pod in", &path)(error)),
        }
        Ok(match Owner::of(&path)? {
            Some(owner) => Found::Changing(owner),
            None => Found::Abandoned(path),
        })
    }

    /// Asks the pod of a container.
    ///
    /// # Errors
    /// When there is no such container, its pod is gone, or refuses.
    pub fn ask(&self, id: &ContainerId, request: &Request) -> Result<serde_json::Value, Error> {
        let deadline = Instant::now() + CHANGE;
        loop {
            match self.find(id)? {
                Found::Nothing => return Err(Error::NotFound),
                Found::Living(client) => match client.ask(request, &[]) {
                    // It went away in this moment: what it left is found now.
                    Err(ClientError::Gone) => {}
                    answer => return Ok(answer?),
                },
                Found::Abandoned(path) => {
                    return match Record::load(&path, id.as_str()) {
                        Ok(_) => Err(Error::NotRunning),
                        Err(_) => Err(Error::NotFound),
                    };
                }
                // Only one that is dying, or being removed, was made before.
                Found::Changing(_)
                    if Record::load(&self.0.join(id.as_str()), id.as_str()).is_ok() => {}
                Found::Changing(_) => return Err(Error::NotFound),
            }
            if Instant::now() > deadline {
                return Err(self.restless("ask", id));
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// What is printed of a container.
    ///
    /// # Errors
    /// When there is none.
    pub fn state(&self, id: &ContainerId) -> Result<State, Error> {
        let request = Request::State { id: id.to_string() };
        match self.ask(id, &request) {
            Ok(value) => {
                serde_json::from_value(value).map_err(|error| ClientError::Io(error.into()).into())
            }
            Err(Error::NotRunning) => {
                let path = self.0.join(id.as_str());
                let record = Record::load(&path, id.as_str()).map_err(|_| Error::NotFound)?;
                Ok(record.state("stopped"))
            }
            Err(error) => Err(error),
        }
    }

    /// The user id of who made a container.
    pub fn owner(&self, id: &ContainerId) -> u32 {
        let record = Record::load(&self.0.join(id.as_str()), id.as_str());
        record.map_or(0, |record| record.owner)
    }

    /// The names of all containers that there may be, in order.
    pub fn names(&self) -> Vec<ContainerId> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| {
            let name = entry.file_name();
            ContainerId::parse(name.to_str()?).ok()
        });
        let mut names: Vec<_> = names.collect();
        names.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        names
    }

    /// Removes a container, whatever there is of it. With `force` it is killed first, and one that
    /// there is not is as good as removed.
    ///
    /// # Errors
    /// When it runs and is not to be killed, or something of it cannot be removed.
    pub fn delete(&self, id: &ContainerId, force: bool) -> Result<(), Error> {
        let removed = self.remove(id, force);
        // Of a removal that was killed nothing has the container's name any more.
        if force && let Err(error) = StateDir::sweep(&self.0) {
            tracing::warn!(
                error = crate::text::chain(&error),
                "something that was removed stays"
            );
        }
        removed
    }

    fn remove(&self, id: &ContainerId, force: bool) -> Result<(), Error> {
        let deadline = Instant::now() + UNDO;
        loop {
            match self.find(id)? {
                Found::Nothing if force => return Ok(()),
                Found::Nothing => return Err(Error::NotFound),
                Found::Living(client) => {
                    let request = Request::Delete {
                        id: id.to_string(),
                        force,
                    };
                    match client.ask(&request, &[]) {
                        Ok(_) => return Ok(()),
                        // Killed in this moment: what it left is found now.
                        Err(ClientError::Gone) => {}
                        Err(ClientError::Refused {
                            kind: Kind::NotFound,
                            ..
                        }) if force => return Ok(()),
                        Err(error) => return Err(error.into()),
                    }
                }
                Found::Changing(owner) if force => end(&owner)?,
                Found::Changing(_) => return Err(Error::NotFound),
                Found::Abandoned(path) => match self.undo(id, &path, force) {
                    // Its owner had made the directory, and not yet said that it has it.
                    Err(Error::State(StateError::Exists { .. })) => {}
                    undone => return undone,
                },
            }
            if Instant::now() > deadline {
                return Err(self.restless("remove", id));
            }
            // What an owner that was killed had just made may hold its lock a moment longer.
            std::thread::sleep(PAUSE);
        }
    }

    /// What is said of one that is neither there nor gone for too long.
    fn restless(&self, doing: &'static str, id: &ContainerId) -> Error {
        failed(doing, &self.0.join(id.as_str()))(io::Error::other("its pod comes and goes"))
    }

    /// Undoes what a killed process left of a container, and of its pod if nothing else is left.
    fn undo(&self, id: &ContainerId, path: &Path, force: bool) -> Result<(), Error> {
        let known = Record::load(path, id.as_str()).is_ok();
        let others = Record::remove(path, id.as_str());
        let entry = self.0.join(id.as_str());
        if fs::symlink_metadata(&entry).is_ok_and(|entry| entry.is_symlink()) {
            let _ = fs::remove_file(&entry);
        }
        if !others {
            let sandbox = path.canonicalize().unwrap_or(path.to_owned());
            StateDir::undo_at(&sandbox)?;
        }
        match known || force {
            true => Ok(()),
            false => Err(Error::NotFound),
        }
    }

    /// Removes everything that killed processes left, and returns the names of what it was.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn collect(&self) -> Result<Vec<ContainerId>, Error> {
        let mut removed = Vec::new();
        for id in self.names() {
            let entry = self.0.join(id.as_str());
            let is_link = fs::symlink_metadata(&entry).is_ok_and(|entry| entry.is_symlink());
            match self.find(&id)? {
                Found::Abandoned(_) if is_link => {
                    let _ = fs::remove_file(&entry);
                    removed.push(id);
                }
                Found::Abandoned(path) => match StateDir::undo_at(&path) {
                    Err(StateError::Exists { .. }) => {}
                    undone => {
                        undone?;
                        removed.push(id);
                    }
                },
                Found::Nothing if is_link => removed.push(id),
                _ => {}
            }
        }
        StateDir::sweep(&self.0)?;
        Ok(removed)
    }
}

/// Asks the owner of a pod that is being made to undo it, and waits for that.
fn end(owner: &Owner) -> Result<(), Error> {
    let failed = |source: io::Error| Error::Io {
        doing: "end the process that makes",
        path: PathBuf::from("the pod"),
        source,
    };
    let Some(pidfd) = sys::pidfd(owner.pid).map_err(failed)? else {
        return Ok(());
    };
    // The number is its: the lock of its journal was held after its descriptor was opened.
    if !owner.is_alive()? {
        return Ok(());
    }
    sys::pidfd_signal(pidfd.as_fd(), Signal::SIGTERM as i32).map_err(failed)?;
    let mut over = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(UNDO).unwrap_or(PollTimeout::MAX);
    if poll(&mut over, patience) == Ok(0) {
        sys::pidfd_signal(pidfd.as_fd(), Signal::SIGKILL as i32).map_err(failed)?;
        let _ = poll(&mut over, patience);
    }
    Ok(())
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
    use std::{fs::File, process::Command, sync::mpsc, thread};

    use nix::fcntl::{Flock, FlockArg};

    use super::*;

    /// What is left of a container whose owner was killed, the lock of whose journal is held until
    /// it is said how much longer.
    struct Dying {
        root: tempfile::TempDir,
        home: Home,
        id: ContainerId,
        last: mpsc::Sender<Duration>,
        holder: thread::JoinHandle<()>,
    }

    impl Dying {
        fn new() -> Self {
            let root = tempfile::tempdir().expect("a directory");
            let namespace = Namespace::parse("default").expect("a name");
            let path = root.path().join("default/web");
            fs::create_dir_all(&path).expect("made");
            let mut owner = Command::new("true").spawn().expect("started");
            owner.wait().expect("over");
            let line = format!("{{\"made\":\"directory\",\"owner\":{}}}\n", owner.id());
            fs::write(path.join("journal"), line).expect("written");
            let journal = File::open(path.join("journal")).expect("opened");
            let lock = Flock::lock(journal, FlockArg::LockExclusive).expect("locked");
            let (last, moment) = mpsc::channel();
            Self {
                home: Home::new(root.path(), &namespace),
                id: ContainerId::parse("web").expect("a name"),
                root,
                last,
                holder: thread::spawn(move || {
                    thread::sleep(moment.recv().unwrap_or_default());
                    drop(lock);
                }),
            }
        }

        fn lasts(&self, moment_ms: u64) {
            let moment = Duration::from_millis(moment_ms);
            self.last.send(moment).expect("held");
        }

        fn path(&self) -> PathBuf {
            self.root.path().join("default/web")
        }
    }

    #[test]
    fn one_whose_killed_owners_lock_is_held_a_moment_longer_is_deleted() {
        let web = Dying::new();
        web.lasts(300);
        web.home.delete(&web.id, true).expect("deleted");
        assert!(!web.path().exists());
        web.holder.join().expect("over");
    }

    #[test]
    fn one_whose_owner_has_not_said_yet_who_it_is_is_waited_for() {
        let web = Dying::new();
        fs::write(web.path().join("journal"), "").expect("nothing said");
        assert_eq!(web.home.collect().expect("looked at"), []);
        web.lasts(300);
        web.home.delete(&web.id, true).expect("deleted");
        assert!(!web.path().exists());
        web.holder.join().expect("over");
    }

    #[test]
    fn one_whose_killed_owner_dies_slowly_is_known_all_the_while() {
        let web = Dying::new();
        web.lasts(500);
        let record = serde_json::json!({
            "ociVersion": "1.0.2", "id": "web", "pid": 1, "bundle": "/b", "rootfs": "/b/rootfs",
            "created": "", "owner": 0, "annotations": {}
        });
        let record: Record = serde_json::from_value(record).expect("a record");
        record.save(&web.path()).expect("saved");
        assert_eq!(web.home.state(&web.id).expect("known").status, "stopped");
        web.holder.join().expect("over");
    }
}
