//! Which ids of a container's user namespace, or of an id-mapped mount, are
//! which of the guest.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::sched::CloneFlags as Namespaces;

use crate::{
    spec::IdMapping,
    sys::{self, CloneFlags, Forked},
};

/// The kernel's limit of lines.
const MOST: usize = 340;

/// The ids of a user namespace.
#[derive(Debug, Clone)]
pub(crate) struct Mappings {
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
}

impl Mappings {
    /// Ids of a namespace; nothing if there are none, or more than the kernel takes.
    pub(crate) fn new(uids: &[IdMapping], gids: &[IdMapping]) -> Option<Self> {
        let fits = |mappings: &[IdMapping]| (1..=MOST).contains(&mappings.len());
        (fits(uids) && fits(gids)).then(|| Self {
            uids: uids.to_vec(),
            gids: gids.to_vec(),
        })
    }

    /// Whether the namespace has a root, user and group, who is somebody of the guest.
    pub(crate) fn has_root(&self) -> bool {
        outside(&self.uids, 0).is_some() && outside(&self.gids, 0).is_some()
    }

    /// A user namespace of these ids without a process, for id-mapped mounts.
    pub(crate) fn namespace(&self) -> io::Result<OwnedFd> {
        let flags = CloneFlags {
            namespaces: Namespaces::CLONE_NEWUSER,
            cgroup: None,
        };
        match sys::clone3(&flags)? {
            Forked::Child => sys::be_first_process(),
            Forked::Parent { pid, pidfd } => {
                let namespace = self
                    .write(pid)
                    .and_then(|()| File::open(format!("/proc/{pid}/ns/user")));
                sys::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL)?;
                namespace.map(Into::into)
            }
        }
    }

    /// The guest's id of the container's user `uid`.
    pub(crate) fn user(&self, uid: u32) -> Option<u32> {
        outside(&self.uids, uid)
    }

    /// Sets the ids of the namespace that the process `pid` is the first of.
    pub(crate) fn write(&self, pid: i32) -> io::Result<()> {
        fs::write(format!("/proc/{pid}/uid_map"), text(&self.uids))?;
        fs::write(format!("/proc/{pid}/gid_map"), text(&self.gids))
    }
}

/// The guest's id for the container's `id`.
fn outside(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id)?;
        if offset < mapping.size {
            mapping.host_id.checked_add(offset)
        } else {
            None
        }
    })
}

/// The mappings as the kernel reads them.
fn text(mappings: &[IdMapping]) -> String {
    mappings.iter().fold(String::new(), |mut text, mapping| {
        let IdMapping {
            container_id,
            host_id,
            size,
        } = mapping;
        // Writing to a string does not fail.
        let _ = writeln!(text, "{container_id} {host_id} {size}");
        text
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mapping(container_id: u32, host_id: u32, size: u32) -> IdMapping {
        IdMapping {
            container_id,
            host_id,
            size,
        }
    }

    #[test]
    fn ids_are_found_in_their_range() {
        let mappings = [mapping(0, 100_000, 10), mapping(1000, 7, 1)];
        assert_eq!(outside(&mappings, 9), Some(100_009));
        assert_eq!(outside(&mappings, 10), None);
        assert_eq!(outside(&mappings, 1000), Some(7));
        assert_eq!(text(&mappings), "0 100000 10\n1000 7 1\n");
    }

    #[test]
    fn a_namespace_without_ids_is_none() {
        assert!(Mappings::new(&[], &[mapping(0, 1, 1)]).is_none());
        let without_root = Mappings::new(&[mapping(1, 1, 1)], &[mapping(0, 1, 1)]);
        assert!(!without_root.unwrap().has_root());
    }

    proptest! {
        #[test]
        fn any_mapping_is_searched(c in any::<u32>(), h in any::<u32>(), s in any::<u32>(), id in any::<u32>()) {
            let _ = outside(&[mapping(c, h, s)], id);
        }
    }
}
