//! Which ids of a container's user namespace are which of the guest.

use std::{fmt::Write as _, fs, io};

use super::namespaces::Error;
use crate::spec::{IdMapping, Linux};

/// The kernel's limit of lines.
const MOST: usize = 340;

/// The ids of a user namespace.
#[derive(Debug, Clone)]
pub(crate) struct Mappings {
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
}

impl Mappings {
    /// Reads `linux.uidMappings` and `linux.gidMappings` of a container with its own user
    /// namespace, whose root must be somebody of the guest.
    pub(super) fn parse(linux: &Linux) -> Result<Self, Error> {
        for (field, mappings) in [
            ("linux.uidMappings", &linux.uid_mappings),
            ("linux.gidMappings", &linux.gid_mappings),
        ] {
            if mappings.len() > MOST || outside(mappings, 0).is_none() {
                return Err(Error::Mappings(field));
            }
        }
        Ok(Self {
            uids: linux.uid_mappings.0.clone(),
            gids: linux.gid_mappings.0.clone(),
        })
    }

    /// The guest's id of the container's user `uid`.
    pub(crate) fn user(&self, uid: u32) -> Option<u32> {
        outside(&self.uids, uid)
    }

    /// Sets the ids of the namespace that the process `pid` is the first of.
    pub(super) fn write(&self, pid: i32) -> io::Result<()> {
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
    fn a_container_without_a_root_is_refused() {
        assert!(Mappings::parse(&Linux::default()).is_err());
    }

    proptest! {
        #[test]
        fn any_mapping_is_searched(c in any::<u32>(), h in any::<u32>(), s in any::<u32>(), id in any::<u32>()) {
            let _ = outside(&[mapping(c, h, s)], id);
        }
    }
}
