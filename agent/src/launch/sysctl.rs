//! Kernel parameters that belong to a container's namespaces.

use std::{fs, io};

use nix::sched::CloneFlags;

/// Why a parameter is not set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not made of words and dots.
    #[error("linux.sysctl: {0:?} is no name of a kernel parameter")]
    Name(String),
    /// It belongs to the whole guest, or to a namespace that the container shares with it.
    #[error("linux.sysctl: {0} is not of a namespace that this container has for itself")]
    Shared(String),
    /// The kernel did not take it.
    #[error("cannot set linux.sysctl {name} to {value:?}")]
    Write {
        /// The name.
        name: String,
        /// The value.
        value: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Sets the parameter `name` for the namespaces this process is in, of the kinds that are `own`.
pub(super) fn set(
    name: &str,
    value: &str,
    own: impl FnOnce(CloneFlags) -> bool,
) -> Result<(), Error> {
    let path = path(name).ok_or_else(|| Error::Name(name.to_owned()))?;
    if !kind(&path).is_some_and(own) {
        return Err(Error::Shared(name.to_owned()));
    }
    fs::write(format!("/proc/sys/{path}"), value).map_err(|source| Error::Write {
        name: name.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// The path of a parameter below /proc/sys. As for sysctl(8), whichever of `.` and `/` comes
/// first separates, and the other stands for the one within a word.
fn path(name: &str) -> Option<String> {
    let slashes = matches!(name.find(['.', '/']), Some(at) if name.as_bytes()[at] == b'/');
    let path: String = if slashes {
        name.to_owned()
    } else {
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    };
    let word = |word: &str| {
        !word.is_empty()
            && word != "."
            && word != ".."
            && word
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-.:@".contains(&b))
    };
    path.split('/').all(word).then_some(path)
}

/// The kind of namespace that a parameter belongs to.
fn kind(path: &str) -> Option<CloneFlags> {
    const IPC: &[&str] = &[
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    if path.starts_with("net/") {
        Some(CloneFlags::CLONE_NEWNET)
    } else if IPC.contains(&path) || path.starts_with("fs/mqueue/") {
        Some(CloneFlags::CLONE_NEWIPC)
    } else if path == "kernel/domainname" || path == "kernel/hostname" {
        Some(CloneFlags::CLONE_NEWUTS)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dots_separate_and_slashes_stand_for_dots() {
        assert_eq!(
            path("net.ipv4.ip_forward").as_deref(),
            Some("net/ipv4/ip_forward")
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.rp_filter").as_deref(),
            Some("net/ipv4/conf/eth0.1/rp_filter")
        );
        assert_eq!(
            path("net/ipv4/ip_forward").as_deref(),
            Some("net/ipv4/ip_forward")
        );
    }

    #[test]
    fn parameters_are_known_by_their_namespace() {
        assert_eq!(kind("kernel/sem"), Some(CloneFlags::CLONE_NEWIPC));
        assert_eq!(kind("net/core/somaxconn"), Some(CloneFlags::CLONE_NEWNET));
        assert_eq!(kind("kernel/panic"), None);
    }

    proptest! {
        #[test]
        fn a_path_stays_below_proc_sys(name in "[a-z./]{0,20}") {
            if let Some(path) = path(&name) {
                prop_assert!(!path.starts_with('/'));
                prop_assert!(path.split('/').all(|word| word != ".." && !word.is_empty()));
            }
        }
    }
}
