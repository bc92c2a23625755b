//! The namespaces of a container: which are made, which are joined.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::sched::{CloneFlags, setns};

use crate::{
    log,
    mappings::Mappings,
    spec::{self, Linux},
};

/// A kind that nix does not know.
pub(crate) const TIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// The kinds by the specification's names.
const KINDS: &[(&str, CloneFlags)] = &[
    ("pid", CloneFlags::CLONE_NEWPID),
    ("network", CloneFlags::CLONE_NEWNET),
    ("mount", CloneFlags::CLONE_NEWNS),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("user", CloneFlags::CLONE_NEWUSER),
    ("time", TIME),
];

/// A container's namespaces; those it does not name are the guest's.
#[derive(Debug)]
pub(crate) struct Namespaces {
    fresh: CloneFlags,
    joined: Vec<(CloneFlags, OwnedFd)>,
    /// Those of the pod that are the guest's.
    shared: CloneFlags,
    mappings: Option<Mappings>,
    /// What is written to timens_offsets.
    time_offsets: String,
}

/// A namespace to join.
#[derive(Debug)]
pub(crate) enum Join {
    /// The guest's own: there is nothing to do.
    Guests,
    /// A user namespace, and its ids.
    Users(OwnedFd, Mappings),
    /// Another.
    Other(OwnedFd),
}

/// Why namespaces cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A kind that is not implemented.
    #[error("linux.namespaces: the type {0:?} is not supported; leave it out")]
    Kind(String),
    /// The same kind twice.
    #[error("linux.namespaces: the type {0:?} is there twice")]
    Twice(String),
    /// A container without its own mounts would change the guest's.
    #[error("linux.namespaces has no new mount namespace, which every container needs")]
    NoMounts,
    /// A user namespace must have a root.
    #[error(
        "linux.uidMappings and linux.gidMappings must each map the container's id 0, in at most 340 lines, as linux.namespaces has a user namespace"
    )]
    Mappings,
    /// Ids for a user namespace that is not there.
    #[error("linux.uidMappings needs a user namespace in linux.namespaces")]
    NoUsers,
    /// Clocks for a time namespace that is not there.
    #[error("linux.timeOffsets needs a new time namespace in linux.namespaces")]
    NoTime,
    /// A clock that a time namespace does not have.
    #[error("linux.timeOffsets: there is no clock {0:?}; there are monotonic and boottime")]
    Clock(String),
    /// More than a second of nanoseconds.
    #[error(
        "linux.timeOffsets: {0} nanoseconds are a second or more; nanosecs is below 1000000000"
    )]
    Nanoseconds(u32),
    /// A user namespace by a path that says nothing of its ids.
    #[error(
        "linux.namespaces: {0} is no user namespace of a container in this guest, which alone can be joined"
    )]
    ForeignUsers(String),
    /// What is outside a user namespace cannot be entered from inside.
    #[error(
        "linux.namespaces: a container with its own user namespace can join no other of a path"
    )]
    UserAndJoined,
    /// A path that names another kind than it stands for.
    #[error("linux.namespaces: {path} is no namespace of the type {kind:?} that can be joined")]
    NotOfKind {
        /// The path.
        path: String,
        /// What it stands for.
        kind: String,
    },
    /// A container that is not there, or has no processes any more.
    #[error("linux.namespaces: there is no running container {0} whose namespace could be joined")]
    NoContainer(String),
    /// A path that is no namespace.
    #[error("cannot open the namespace {path}")]
    Open {
        /// The path.
        path: String,
        #[source]
        source: io::Error,
    },
}

impl Namespaces {
    /// Reads `linux.namespaces`. Those of the pod and of other containers are found by `find`,
    /// of the kind that it is asked for.
    pub(crate) fn parse(
        linux: &Linux,
        mut find: impl FnMut(protocol::Namespace<'_>) -> Result<Join, Error>,
    ) -> Result<Self, Error> {
        let mut parsed = Self {
            fresh: CloneFlags::empty(),
            joined: Vec::new(),
            shared: CloneFlags::empty(),
            mappings: None,
            time_offsets: time_offsets(linux)?,
        };
        let mut seen = CloneFlags::empty();
        for namespace in &linux.namespaces {
            let kind = namespace.kind.as_str();
            let Some((_, flag)) = KINDS.iter().find(|(name, _)| *name == kind) else {
                return Err(Error::Kind(kind.to_owned()));
            };
            if seen.contains(*flag) {
                return Err(Error::Twice(kind.to_owned()));
            }
            seen |= *flag;
            match namespace.path.as_deref().filter(|path| !path.is_empty()) {
                None => parsed.fresh |= *flag,
                Some(path) => match join(namespace, path, &mut find)? {
                    Join::Guests => parsed.shared |= *flag,
                    Join::Users(fd, mappings) => {
                        parsed.mappings = Some(mappings);
                        parsed.joined.push((*flag, fd));
                    }
                    Join::Other(fd) => parsed.joined.push((*flag, fd)),
                },
            }
        }
        if !parsed.fresh.contains(CloneFlags::CLONE_NEWNS) {
            return Err(Error::NoMounts);
        }
        let users = CloneFlags::CLONE_NEWUSER;
        if parsed.fresh.contains(users) {
            if parsed
                .joined
                .iter()
                .any(|(kind, _)| *kind != CloneFlags::CLONE_NEWPID)
            {
                return Err(Error::UserAndJoined);
            }
            parsed.mappings = Some(mappings(linux)?);
        }
        let has_ids = !linux.uid_mappings.is_empty() || !linux.gid_mappings.is_empty();
        if has_ids && !seen.contains(users) {
            return Err(Error::NoUsers);
        }
        if !parsed.fresh.contains(TIME) && !parsed.time_offsets.is_empty() {
            return Err(Error::NoTime);
        }
        Ok(parsed)
    }

    /// The ids of its user namespace, if it has its own.
    pub(crate) fn mappings(&self) -> Option<&Mappings> {
        self.mappings.as_ref()
    }

    /// Those that clone makes. A cgroup namespace is left out: its root is the cgroup that its
    /// maker is in, so the child makes it when it is in its own. A time namespace is entered by
    /// execve, when its clocks are set.
    pub(super) fn fresh(&self) -> CloneFlags {
        self.fresh - CloneFlags::CLONE_NEWCGROUP - TIME
    }

    /// The clocks of its time namespace, as the kernel reads them.
    pub(super) fn time_offsets(&self) -> &str {
        &self.time_offsets
    }

    /// The user namespace that it joins.
    pub(super) fn joined_users(&self) -> Option<BorrowedFd<'_>> {
        self.joined_of(CloneFlags::CLONE_NEWUSER)
    }

    /// The pid namespace that it joins.
    pub(super) fn joined_pids(&self) -> Option<BorrowedFd<'_>> {
        self.joined_of(CloneFlags::CLONE_NEWPID)
    }

    fn joined_of(&self, kind: CloneFlags) -> Option<BorrowedFd<'_>> {
        self.joined
            .iter()
            .find(|(joined, _)| *joined == kind)
            .map(|(_, fd)| fd.as_fd())
    }

    /// The kinds that a further process joins.
    pub(crate) fn of_further_processes(&self) -> CloneFlags {
        let always = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWCGROUP;
        let own = self.joined.iter().map(|(kind, _)| *kind);
        let own = self.fresh | own.collect::<CloneFlags>();
        always
            | CloneFlags::from_bits_retain(
                own.bits() & (CloneFlags::CLONE_NEWUSER.bits() | TIME.bits()),
            )
    }

    /// Whether a new namespace of this kind is made.
    pub(crate) fn makes(&self, kind: CloneFlags) -> bool {
        self.fresh.contains(kind)
    }

    /// Whether the container has a namespace of this kind, of its own or shared with the pod or
    /// another container. The guest's network is always the pod's.
    pub(super) fn has(&self, kind: CloneFlags) -> bool {
        kind == CloneFlags::CLONE_NEWNET
            || (self.fresh | self.shared).contains(kind)
            || self.joined.iter().any(|(joined, _)| *joined == kind)
    }

    /// The kinds that are the guest's own.
    pub(crate) fn guests(&self) -> CloneFlags {
        let all = KINDS.iter().map(|(_, kind)| *kind);
        let joined = self.joined.iter().map(|(kind, _)| *kind);
        all.collect::<CloneFlags>() - self.fresh - joined.collect()
    }

    /// The descriptors of the namespaces to be joined by the child.
    pub(super) fn joined(&self) -> impl Iterator<Item = (CloneFlags, &OwnedFd)> {
        self.joined
            .iter()
            .filter(|(kind, _)| {
                !matches!(*kind, CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUSER)
            })
            .map(|(kind, fd)| (*kind, fd))
    }
}

/// The ids of a container with its own user namespace, whose root must be somebody of the guest.
fn mappings(linux: &Linux) -> Result<Mappings, Error> {
    Mappings::new(&linux.uid_mappings, &linux.gid_mappings)
        .filter(Mappings::has_root)
        .ok_or(Error::Mappings)
}

/// `linux.timeOffsets` as the kernel reads them.
fn time_offsets(linux: &Linux) -> Result<String, Error> {
    let mut text = String::new();
    for (clock, offset) in &linux.time_offsets {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Error::Clock(clock.clone()));
        }
        if offset.nanosecs >= 1_000_000_000 {
            return Err(Error::Nanoseconds(offset.nanosecs));
        }
        text.push_str(&format!("{clock} {} {}\n", offset.secs, offset.nanosecs));
    }
    Ok(text)
}

fn join(
    namespace: &spec::Namespace,
    path: &str,
    find: impl FnOnce(protocol::Namespace<'_>) -> Result<Join, Error>,
) -> Result<Join, Error> {
    let Some(named) = protocol::Namespace::parse(path) else {
        if namespace.kind == "user" {
            return Err(Error::ForeignUsers(path.to_owned()));
        }
        return File::open(path)
            .map(|file| Join::Other(file.into()))
            .map_err(|source| Error::Open {
                path: path.to_owned(),
                source,
            });
    };
    let (protocol::Namespace::Pod(kind) | protocol::Namespace::Container { kind, .. }) = named;
    if kind != namespace.kind {
        return Err(Error::NotOfKind {
            path: path.to_owned(),
            kind: namespace.kind.clone(),
        });
    }
    find(named)
}

/// The agent's children are born in another pid namespace while this lives.
pub(super) struct PidNamespace {
    own: OwnedFd,
}

impl PidNamespace {
    /// Enters the pid namespace `target`, or that of the process whose descriptor it is.
    pub(super) fn enter(target: impl AsFd) -> io::Result<Self> {
        let own = File::open("/proc/self/ns/pid")?.into();
        setns(target, CloneFlags::CLONE_NEWPID)?;
        Ok(Self { own })
    }
}

impl Drop for PidNamespace {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.own, CloneFlags::CLONE_NEWPID) {
            log!("cannot return to the agent's pid namespace: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec;

    fn parse(kinds: &[&str]) -> Result<Namespaces, Error> {
        let kinds: Vec<_> = kinds.iter().map(|kind| (*kind, None)).collect();
        parse_paths(&kinds)
    }

    fn parse_paths(namespaces: &[(&str, Option<&str>)]) -> Result<Namespaces, Error> {
        let namespaces = namespaces
            .iter()
            .map(|(kind, path)| spec::Namespace {
                kind: (*kind).into(),
                path: path.map(str::to_owned),
            })
            .collect();
        let linux = Linux {
            namespaces: spec::List(namespaces),
            ..Linux::default()
        };
        Namespaces::parse(&linux, |_| Ok(Join::Guests))
    }

    #[test]
    fn the_pods_namespaces_are_neither_made_nor_joined() {
        let shared = protocol::Namespace::Pod("ipc").to_string();
        let namespaces = parse_paths(&[("mount", None), ("ipc", Some(&shared))]).unwrap();
        assert!(!namespaces.makes(CloneFlags::CLONE_NEWIPC));
        assert_eq!(namespaces.joined().count(), 0);
        assert!(namespaces.has(CloneFlags::CLONE_NEWIPC));
        assert!(!namespaces.has(CloneFlags::CLONE_NEWUTS));
    }

    #[test]
    fn a_namespace_of_another_kind_is_refused() {
        let shared = protocol::Namespace::Pod("ipc").to_string();
        let parsed = parse_paths(&[("mount", None), ("uts", Some(&shared))]);
        assert!(matches!(parsed, Err(Error::NotOfKind { kind, .. }) if kind == "uts"));
    }

    #[test]
    fn a_cgroup_namespace_is_left_to_the_child() {
        let namespaces = parse(&["mount", "cgroup", "pid"]).unwrap();
        assert_eq!(
            namespaces.fresh(),
            CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID
        );
        assert!(namespaces.makes(CloneFlags::CLONE_NEWCGROUP));
    }

    #[test]
    fn the_clocks_of_a_time_namespace_are_written_as_the_kernel_reads_them() {
        let of = |json: &str| {
            Namespaces::parse(&serde_json::from_str(json).unwrap(), |_| Ok(Join::Guests))
        };
        let time = r#""namespaces":[{"type":"mount"},{"type":"time"}]"#;
        let offsets =
            r#""timeOffsets":{"boottime":{"secs":-5},"monotonic":{"secs":7,"nanosecs":9}}"#;
        let namespaces = of(&format!("{{{time},{offsets}}}")).unwrap();
        assert_eq!(namespaces.time_offsets(), "boottime -5 0\nmonotonic 7 9\n");
        assert_eq!(namespaces.fresh(), CloneFlags::CLONE_NEWNS);
        assert!(namespaces.of_further_processes().contains(TIME));
        let without = format!(r#"{{"namespaces":[{{"type":"mount"}}],{offsets}}}"#);
        assert!(matches!(of(&without), Err(Error::NoTime)));
        let clock = format!(r#"{{{time},"timeOffsets":{{"realtime":{{"secs":1}}}}}}"#);
        assert!(matches!(of(&clock), Err(Error::Clock(clock)) if clock == "realtime"));
    }

    #[test]
    fn what_cannot_be_made_is_refused_by_name() {
        assert!(matches!(parse(&["mount", "x"]), Err(Error::Kind(kind)) if kind == "x"));
        assert!(matches!(parse(&["mount", "mount"]), Err(Error::Twice(_))));
        assert!(matches!(parse(&["pid"]), Err(Error::NoMounts)));
        assert!(matches!(parse(&["mount", "user"]), Err(Error::Mappings)));
    }
}
