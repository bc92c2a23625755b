//! What is remembered of a container beside its pod's process, so that it can
//! be told of when that is gone.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{bundle::Bundle, id::ContainerId, log::timestamp, pod::Status};

/// Where records lie in a state directory.
const DIRECTORY: &str = "containers";

/// What the name of a record begins with that is being written; no container's name does.
const UNFINISHED: char = '~';

/// A container's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The configuration's version.
    pub oci_version: String,
    /// The container's name.
    pub id: String,
    /// The process that stands for it.
    pub pid: u32,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its root file system.
    pub rootfs: PathBuf,
    /// When it was made, as RFC 3339 has it.
    pub created: String,
    /// The user id of who made it.
    pub owner: u32,
    /// The configuration's annotations.
    pub annotations: HashMap<String, String>,
}

/// What is printed of a container, with the keys that other runtimes print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The configuration's version.
    pub oci_version: String,
    /// The container's name.
    pub id: String,
    /// A live process of the host that stands for it; 0 when it has ended.
    pub pid: u32,
    /// `created`, `running`, `paused` or `stopped`.
    pub status: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its root file system.
    pub rootfs: PathBuf,
    /// When it was made.
    pub created: String,
    /// The configuration's annotations.
    #[serde(default, skip_serializing_if = "HashMap::is_empty")]
    pub annotations: HashMap<String, String>,
    /// The name of the user who made it.
    pub owner: String,
}

impl Record {
    /// The record of a container that is made now.
    pub fn new(id: &ContainerId, bundle: &Bundle, pid: u32) -> Self {
        Self {
            oci_version: bundle.spec().version().clone(),
            id: id.to_string(),
            pid,
            bundle: bundle.path().to_owned(),
            rootfs: bundle.root_path().to_owned(),
            created: timestamp(SystemTime::now()),
            owner: nix::unistd::getuid().as_raw(),
            annotations: bundle.spec().annotations().clone().unwrap_or_default(),
        }
    }

    /// Keeps it below the state directory `state`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, state: &Path) -> io::Result<()> {
        let directory = state.join(DIRECTORY);
        match fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // In one step, for those who read it meanwhile.
        let new = directory.join(format!("{UNFINISHED}{}", self.id));
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, directory.join(&self.id))
    }

    /// Reads the one of `id`.
    ///
    /// # Errors
    /// When there is none.
    pub fn load(state: &Path, id: &str) -> io::Result<Self> {
        let text = fs::read(state.join(DIRECTORY).join(id))?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// Forgets the one of `id`, and returns whether others are left. One that was being written
    /// when its process was killed is nobody's.
    pub fn remove(state: &Path, id: &str) -> bool {
        let directory = state.join(DIRECTORY);
        // One that is not there is as good.
        let _ = fs::remove_file(directory.join(id));
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name());
        let mut finished = names.filter(|name| !name.to_string_lossy().starts_with(UNFINISHED));
        finished.next().is_some()
    }

    /// What is printed of the container in the state `status`.
    pub fn state(&self, status: &str) -> State {
        State {
            oci_version: self.oci_version.clone(),
            id: self.id.clone(),
            pid: if status == "stopped" { 0 } else { self.pid },
            status: status.to_owned(),
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.clone(),
            created: self.created.clone(),
            annotations: self.annotations.clone(),
            owner: String::new(),
        }
    }

    /// What is printed of it while its pod lives.
    pub fn living(&self, status: Status) -> State {
        self.state(status.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_was_being_written_is_no_container() {
        let state = tempfile::tempdir().expect("a directory");
        let directory = state.path().join(DIRECTORY);
        fs::create_dir(&directory).expect("made");
        fs::write(directory.join("~web"), "{\"id\":").expect("written");
        assert!(!Record::remove(state.path(), "web"));
        fs::write(directory.join("app"), "{}").expect("written");
        assert!(Record::remove(state.path(), "web"));
        assert!(ContainerId::parse("~web").is_err());
    }
}
