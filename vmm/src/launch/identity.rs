//! Whom the VMM is: the user and group ids of its user namespace.
//!
//! ```text
//!   launcher  | shares files | ids inside -> outside
//!   ----------+--------------+---------------------------------------------
//!   root      | no           | 0 -> an id that no account and no other VM has
//!   root      | yes          | all -> the same: it acts on files of any owner
//!   not root  | either       | 0 -> the launcher's own id
//! ```
//!
//! Inside it is uid 0, which makes it neither root outside nor privileged: it
//! needs the namespace's own privileges only to build its jail.

/// The lowest id of VMs that share no files. The ids from here on are beyond
/// those that distributions and container tools hand out, and below 2^31.
const FIRST_ID: u32 = 0x7800_0000;

/// What is written to the child's id maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Maps {
    /// `uid_map`.
    pub(super) uid: String,
    /// `gid_map`.
    pub(super) gid: String,
}

/// Who starts the VM, and what for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launcher<'a> {
    /// The launcher's effective user id.
    pub(super) uid: u32,
    /// The launcher's effective group id.
    pub(super) gid: u32,
    /// The launcher's own `uid_map`.
    pub(super) uid_map: &'a str,
    /// The launcher's own `gid_map`.
    pub(super) gid_map: &'a str,
    /// Whether the VM acts on the files of others.
    pub(super) shares_files: bool,
}

impl Launcher<'_> {
    /// Whether it may map any id and change groups.
    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// The maps of the child whose pid is `pid`.
    pub(super) fn maps(&self, pid: u32) -> Maps {
        if !self.is_root() {
            return Maps {
                uid: format!("0 {} 1\n", self.uid),
                gid: format!("0 {} 1\n", self.gid),
            };
        }
        if self.shares_files {
            return Maps {
                uid: identity(self.uid_map),
                gid: identity(self.gid_map),
            };
        }
        // The pid makes it an id of this VM alone. A launcher in a user namespace of its own
        // may not have it to give; then the VM gets the launcher's.
        let own = FIRST_ID + pid;
        let uid = if covers(self.uid_map, own) {
            own
        } else {
            self.uid
        };
        let gid = if covers(self.gid_map, own) {
            own
        } else {
            self.gid
        };
        Maps {
            uid: format!("0 {uid} 1\n"),
            gid: format!("0 {gid} 1\n"),
        }
    }
}

/// The ranges of a map: first id inside, number of ids.
fn ranges(map: &str) -> impl Iterator<Item = (u32, u32)> {
    map.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let first = numbers.next()?.ok()?;
        let count = numbers.nth(1)?.ok()?;
        Some((first, count))
    })
}

fn covers(map: &str, id: u32) -> bool {
    ranges(map).any(|(first, count)| id >= first && id - first < count)
}

/// The map in which every id that the launcher has means itself.
fn identity(map: &str) -> String {
    ranges(map)
        .map(|(first, count)| format!("{first} {first} {count}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "         0          0 4294967295\n";

    fn launcher(uid: u32, map: &'static str, shares_files: bool) -> Launcher<'static> {
        Launcher {
            uid,
            gid: uid,
            uid_map: map,
            gid_map: map,
            shares_files,
        }
    }

    #[test]
    fn a_vm_that_shares_no_files_has_an_id_of_its_own() {
        let maps = launcher(0, ALL, false).maps(42);
        assert_eq!(maps.uid, format!("0 {} 1\n", 0x7800_0000 + 42));
        assert_eq!(maps.gid, maps.uid);
    }

    #[test]
    fn a_vm_that_shares_files_sees_every_owner() {
        assert_eq!(launcher(0, ALL, true).maps(42).uid, "0 0 4294967295\n");
    }

    #[test]
    fn a_launcher_in_a_user_namespace_gives_what_it_has() {
        let nested = "0 1000 1\n1 100000 65536\n";
        assert_eq!(launcher(0, nested, true).maps(7).uid, "0 0 1\n1 1 65536\n");
        assert_eq!(launcher(0, nested, false).maps(7).uid, "0 0 1\n");
    }

    #[test]
    fn a_launcher_without_privileges_gives_its_own_id() {
        assert_eq!(launcher(1000, ALL, true).maps(7).uid, "0 1000 1\n");
    }

    #[test]
    fn lines_that_are_no_ranges_are_passed_over() {
        assert_eq!(identity("nonsense\n0 0\n5 6 7\n"), "5 5 7\n");
    }
}
