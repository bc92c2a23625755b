//! Who a process runs as, and what it may use up.

use std::io;

use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::{Mode, umask},
    },
    unistd::{Gid, Uid, setgid, setgroups, setuid},
};

use super::Error;
use crate::spec::{Rlimit, User};

/// The limits of the configuration by their names.
const LIMITS: &[(&str, Resource)] = &[
    ("RLIMIT_AS", Resource::RLIMIT_AS),
    ("RLIMIT_CORE", Resource::RLIMIT_CORE),
    ("RLIMIT_CPU", Resource::RLIMIT_CPU),
    ("RLIMIT_DATA", Resource::RLIMIT_DATA),
    ("RLIMIT_FSIZE", Resource::RLIMIT_FSIZE),
    ("RLIMIT_LOCKS", Resource::RLIMIT_LOCKS),
    ("RLIMIT_MEMLOCK", Resource::RLIMIT_MEMLOCK),
    ("RLIMIT_MSGQUEUE", Resource::RLIMIT_MSGQUEUE),
    ("RLIMIT_NICE", Resource::RLIMIT_NICE),
    ("RLIMIT_NOFILE", Resource::RLIMIT_NOFILE),
    ("RLIMIT_NPROC", Resource::RLIMIT_NPROC),
    ("RLIMIT_RSS", Resource::RLIMIT_RSS),
    ("RLIMIT_RTPRIO", Resource::RLIMIT_RTPRIO),
    ("RLIMIT_RTTIME", Resource::RLIMIT_RTTIME),
    ("RLIMIT_SIGPENDING", Resource::RLIMIT_SIGPENDING),
    ("RLIMIT_STACK", Resource::RLIMIT_STACK),
];

/// What a process may open unless the configuration says: what a service of a usual host may,
/// and not what the agent may.
const DEFAULT_FILES: (u64, u64) = (1024, 524_288);

/// A limit, read from the configuration.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    resource: Resource,
    soft: u64,
    hard: u64,
}

/// Reads `process.rlimits`.
pub(super) fn limits(rlimits: &[Rlimit]) -> Result<Vec<Limit>, Error> {
    let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(DEFAULT_FILES.0, |(_, hard)| hard);
    let mut limits = vec![Limit {
        resource: Resource::RLIMIT_NOFILE,
        soft: DEFAULT_FILES.0.min(most),
        hard: DEFAULT_FILES.1.min(most),
    }];
    for rlimit in rlimits {
        let Some((_, resource)) = LIMITS.iter().find(|(name, _)| *name == rlimit.kind) else {
            return Err(Error::Value {
                field: "process.rlimits.type",
                value: rlimit.kind.clone(),
                reason: "it is one of RLIMIT_AS, RLIMIT_CORE and so on, see getrlimit(2)",
            });
        };
        if rlimit.soft > rlimit.hard {
            return Err(Error::Value {
                field: "process.rlimits.soft",
                value: rlimit.soft.to_string(),
                reason: "it is above the hard limit",
            });
        }
        limits.push(Limit {
            resource: *resource,
            soft: rlimit.soft,
            hard: rlimit.hard,
        });
    }
    Ok(limits)
}

impl Limit {
    /// Sets it for this process.
    pub(super) fn set(self) -> io::Result<()> {
        Ok(setrlimit(self.resource, self.soft, self.hard)?)
    }
}

/// Becomes root, of a user namespace just entered.
pub(super) fn become_root() -> io::Result<()> {
    setgroups(&[])?;
    setgid(Gid::from_raw(0))?;
    Ok(setuid(Uid::from_raw(0))?)
}

/// Becomes `user`.
pub(super) fn become_user(user: &User) -> io::Result<()> {
    let groups: Vec<_> = user
        .additional_gids
        .iter()
        .copied()
        .map(Gid::from_raw)
        .collect();
    setgroups(&groups)?;
    setgid(Gid::from_raw(user.gid))?;
    setuid(Uid::from_raw(user.uid))?;
    umask(Mode::from_bits_truncate(
        user.umask.unwrap_or(0o022) & 0o777,
    ));
    Ok(())
}

/// The home directory of `uid` by the text of an /etc/passwd; `/` where it names none.
pub(super) fn home(passwd: &str, uid: u32) -> &str {
    passwd
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let id: u32 = fields.nth(2)?.parse().ok()?;
            let home = fields.nth(2)?;
            (id == uid && !home.is_empty()).then_some(home)
        })
        .next()
        .unwrap_or("/")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\n";

    #[test]
    fn a_users_home_is_its_sixth_field() {
        assert_eq!(home(PASSWD, 33), "/var/www");
        assert_eq!(home(PASSWD, 0), "/root");
    }

    #[test]
    fn who_is_not_listed_lives_at_the_root() {
        assert_eq!(home(PASSWD, 7), "/");
        assert_eq!(home("", 0), "/");
    }

    #[test]
    fn a_soft_limit_above_the_hard_one_is_refused() {
        let rlimit = Rlimit {
            kind: "RLIMIT_NOFILE".into(),
            soft: 2,
            hard: 1,
        };
        assert!(limits(&[rlimit]).is_err());
    }

    proptest! {
        #[test]
        fn any_passwd_has_a_home_for_anyone(text in ".*", uid in any::<u32>()) {
            prop_assert!(!home(&text, uid).is_empty());
        }
    }
}
