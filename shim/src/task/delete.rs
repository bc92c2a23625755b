//! `delete`: what a killed daemon left is undone.
//!
//! containerd also calls it after every orderly end, while the daemon takes its last steps: what
//! still has an owner is the owner's to remove.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
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

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bundle is not there.
    #[error("cannot find the working directory")]
    Bundle(#[source] io::Error),
    /// What the sandbox made cannot be undone.
    #[error(transparent)]
    State(#[from] sandbox::StateError),
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
    StateDir::undo(Path::new(STATE_ROOT), &invocation.namespace, &invocation.id)?;
    abandon_socket(invocation, &bundle);
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

/// Removes the socket of a daemon that was killed; a pod's other containers have none.
fn abandon_socket(invocation: &Invocation, bundle: &Path) {
    let address = fs::read_to_string(bundle.join(ADDRESS)).unwrap_or_default();
    let known = PathBuf::from(address.trim().trim_start_matches("unix://"));
    let directory = known.parent().filter(|directory| directory.is_absolute());
    let directory = directory.unwrap_or(Path::new(SOCKETS));
    let path = socket::path(directory, invocation, invocation.id.as_str());
    if path.exists() && !socket::serves(&path) {
        // Whoever was first has removed it.
        let _ = fs::remove_file(&path);
    }
}
