//! `delete`: what a killed daemon left is undone.
//!
//! containerd also calls it after every orderly end, when the daemon may still be taking its last
//! steps: what has an owner that lives on is the owner's to remove.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use protobuf::Message;

use super::{
    arguments::Invocation,
    boot::STATE_ROOT,
    bootstrap::SOCKETS,
    proto::{task::DeleteResponse, timestamp},
    socket,
    start::ADDRESS,
    tasks::PID_FILE,
};
use crate::sandbox::{self, StateDir};

/// What a container's status is that nobody saw end: killed by SIGKILL.
const KILLED: u32 = 137;

/// How long what a killed daemon had just made may hold its lock: containerd gives the whole command
/// five seconds.
const LOCKED: Duration = Duration::from_secs(3);

/// How often it is tried.
const PAUSE: Duration = Duration::from_millis(20);

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bundle is not there.
    #[error("cannot find the working directory")]
    Bundle(#[source] io::Error),
    /// What the sandbox made cannot be undone.
    #[error(transparent)]
    State(#[from] sandbox::StateError),
    /// Its socket cannot be removed.
    #[error(transparent)]
    Socket(#[from] socket::Error),
}

/// Undoes what is left of the container, and returns what is to be printed.
///
/// # Errors
/// When something cannot be undone.
pub fn delete(invocation: &Invocation) -> Result<Vec<u8>, Error> {
    let bundle = match &invocation.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(Error::Bundle)?,
    };
    undo(Path::new(STATE_ROOT), invocation, LOCKED)?;
    abandon_socket(invocation, &bundle)?;
    let response = DeleteResponse {
        pid: pid(&bundle),
        exit_status: KILLED,
        exited_at: timestamp(Some(SystemTime::now())),
        ..Default::default()
    };
    Ok(response
        .write_to_bytes()
        .expect("all of its fields can be written"))
}

/// The pid that the container was known by; 0 if it never was.
fn pid(bundle: &Path) -> u32 {
    let text = fs::read_to_string(bundle.join(PID_FILE)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Undoes what a daemon that was killed made for its pod. What has an owner after such a time, too,
/// is left to it.
fn undo(
    root: &Path,
    invocation: &Invocation,
    patience: Duration,
) -> Result<(), sandbox::StateError> {
    let Invocation { namespace, id, .. } = invocation;
    let deadline = Instant::now() + patience;
    loop {
        match StateDir::undo(root, namespace, id) {
            Err(sandbox::StateError::Exists { .. }) if Instant::now() < deadline => sleep(PAUSE),
            Err(sandbox::StateError::Exists { .. }) => return Ok(()),
            undone => {
                undone?;
                // Of a removal that was killed nothing has the pod's name any more.
                return StateDir::sweep(&root.join(namespace.as_str()));
            }
        }
    }
}

/// Removes the socket of a daemon that was killed; a pod's other containers have none.
fn abandon_socket(invocation: &Invocation, bundle: &Path) -> Result<(), socket::Error> {
    let address = fs::read_to_string(bundle.join(ADDRESS)).unwrap_or_default();
    let known = PathBuf::from(address.trim().trim_start_matches("unix://"));
    let directory = known.parent().filter(|directory| directory.is_absolute());
    let directory = directory.unwrap_or(Path::new(SOCKETS));
    socket::abandon(&socket::path(directory, invocation, invocation.id.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{ContainerId, Namespace};

    #[test]
    fn what_a_lock_outlives_its_owner_for_a_moment_is_undone_and_what_has_an_owner_is_not() {
        let root = tempfile::tempdir().expect("a directory");
        let invocation = Invocation {
            namespace: Namespace::parse("default").expect("a name"),
            id: ContainerId::parse("web").expect("a name"),
            address: String::new(),
            bundle: None,
            debug: false,
        };
        let Invocation { namespace, id, .. } = &invocation;
        let state = StateDir::create(root.path(), namespace, id).expect("made");
        let path = state.path().to_owned();
        undo(root.path(), &invocation, Duration::from_millis(50)).expect("looked at");
        assert!(path.exists());

        state.keep();
        let removed = path.with_file_name("~1-0");
        fs::create_dir(&removed).expect("made");
        let dying = std::thread::spawn(move || {
            sleep(Duration::from_millis(300));
            drop(state);
        });
        undo(root.path(), &invocation, LOCKED).expect("undone");
        assert!(!path.exists() && !removed.exists());
        dying.join().expect("over");
    }
}
