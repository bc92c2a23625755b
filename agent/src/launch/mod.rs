//! Making a process of a container, in two steps.
//!
//! ```text
//! agent                               child
//!   launch ──────── clone3 ────────────► namespaces, file tree, terminal,
//!                                        limits, user, path of the program
//!   ready  ◄──────── ready (terminal) ── waits
//!   start  ──────── go ────────────────► capabilities, seccomp
//!          ◄──────── executing (time) ── execve
//!          ◄──────── end of the socket   (the program runs)
//! ```
//!
//! A failure at any point comes over the same socket, as one message.

mod capabilities;
mod child;
mod control;
mod hooks;
mod namespaces;
mod pod;
mod program;
mod schedule;
mod sysctl;
mod user;

use std::{
    ffi::CString,
    fs, io,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use capabilities::Capabilities;
pub(crate) use control::{Control, FailureKind, Message};
use namespaces::PidNamespace;
pub(crate) use namespaces::{Error as NamespaceError, Join, Namespaces};
pub(crate) use pod::Error as PodError;
pub(crate) use pod::configure as configure_pod;
pub(crate) use schedule::domain;
use schedule::{Affinity, Schedule};

use crate::{
    rootfs::{Granted, Scratch, Source},
    spec::{Process, Spec},
    sys::{self, CloneFlags, Forked},
};

/// Why a process could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value out of its range.
    #[error("{field} is {value:?}: {reason}")]
    Value {
        /// The property's path.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A call failed.
    #[error("cannot {doing}")]
    Step {
        /// What was being done.
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Says what was being done when a call failed.
fn doing(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Step { doing, source }
}

/// Where a process is made.
pub(crate) enum Place<'a> {
    /// In a container that it is the first process of.
    New(NewContainer<'a>),
    /// In a container that runs.
    Inside(Running<'a>),
}

/// A container to be joined.
pub(crate) struct Running<'a> {
    /// Its first process.
    pub(crate) first: BorrowedFd<'a>,
    /// The kinds of namespaces to join besides that of pids.
    pub(crate) kinds: nix::sched::CloneFlags,
}

/// A container to be built around a process.
pub(crate) struct NewContainer<'a> {
    /// Its name.
    pub(crate) id: &'a str,
    /// Its bundle's path on the host.
    pub(crate) bundle: &'a str,
    /// Its configuration.
    pub(crate) spec: &'a Spec,
    /// Where its root comes from.
    pub(crate) source: &'a Source,
    /// Where the root is put together.
    pub(crate) scratch: &'a Scratch,
    /// What it could not mount itself.
    pub(crate) granted: &'a Granted,
    /// Its cgroup's directory.
    pub(crate) cgroup: &'a Path,
    /// Its namespaces.
    pub(crate) namespaces: &'a Namespaces,
}

/// A process to be made.
pub(crate) struct Launch<'a> {
    /// Where.
    pub(crate) place: Place<'a>,
    /// What.
    pub(crate) process: &'a Process,
    /// The execution domain, where the configuration has one.
    pub(crate) domain: Option<u64>,
    /// The system calls that it may make.
    pub(crate) seccomp: Option<&'a crate::seccomp::Filter>,
    /// Its cgroup.
    pub(crate) cgroup: BorrowedFd<'a>,
    /// Its standard input, output and error, until it has a terminal.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
}

/// A process that is being made.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its id.
    pub(crate) pid: i32,
    /// Its descriptor.
    pub(crate) pidfd: OwnedFd,
    /// The way to talk to it until it executes its program.
    pub(crate) control: Control,
}

/// What the child needs, worked out before it exists: it is left with system calls alone.
struct Prepared {
    arguments: Vec<CString>,
    capabilities: Capabilities,
    limits: Vec<user::Limit>,
    schedule: Schedule,
    affinity: Affinity,
}

impl Prepared {
    fn new(launch: &Launch<'_>) -> Result<Self, Error> {
        let process = launch.process;
        let arguments = process.args.iter().filter_map(program::c_string).collect();
        let capabilities = process
            .capabilities
            .as_ref()
            .map(Capabilities::parse)
            .unwrap_or_default();
        let limits = user::limits(&process.rlimits)?;
        let (linux, affinity) = match &launch.place {
            Place::New(new) => (Some(&new.spec.linux), Affinity::default()),
            Place::Inside(_) => (None, Affinity::parse(process)?),
        };
        Ok(Self {
            arguments,
            capabilities,
            limits,
            schedule: Schedule::parse(process, linux)?.with_domain(launch.domain),
            affinity,
        })
    }
}

/// Makes the process and lets it prepare itself; [`Control`] tells when it has.
///
/// # Errors
/// When its configuration has a value out of range, or the kernel has no room for a process.
pub(crate) fn launch(launch: &Launch<'_>) -> Result<Child, Error> {
    let prepared = Prepared::new(launch)?;
    let (ours, theirs) = control::pair().map_err(doing("make a socket pair"))?;
    let control = Control::new(ours).map_err(doing("watch a socket"))?;
    let (pid, pidfd) = match joined_users(launch) {
        Some(users) => fork_through(launch, &prepared, users, &control, &theirs)?,
        None => fork(launch, &prepared, &theirs)?,
    };
    if let Some(score) = launch.process.oom_score_adj {
        fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
            .map_err(doing("set process.oomScoreAdj"))?;
    }
    if let Place::New(NewContainer { namespaces, .. }) = &launch.place
        && let Some(mappings) = namespaces.mappings()
    {
        let written = if namespaces.joined_users().is_none() {
            mappings.write(pid)
        } else {
            Ok(())
        };
        written
            .and_then(|()| control.go())
            .map_err(doing("set linux.uidMappings and linux.gidMappings"))?;
    }
    Ok(Child {
        pid,
        pidfd,
        control,
    })
}

/// The user namespace of another container that the process is to be born in.
fn joined_users<'a>(launch: &Launch<'a>) -> Option<BorrowedFd<'a>> {
    match &launch.place {
        Place::New(container) => container.namespaces.joined_users(),
        Place::Inside(_) => None,
    }
}

/// The namespaces that clone3 makes.
fn fresh(launch: &Launch<'_>) -> nix::sched::CloneFlags {
    match &launch.place {
        Place::New(container) => container.namespaces.fresh(),
        Place::Inside(_) => nix::sched::CloneFlags::empty(),
    }
}

/// Makes the process; answers its id and descriptor.
fn fork(
    launch: &Launch<'_>,
    prepared: &Prepared,
    theirs: &OwnedFd,
) -> Result<(i32, OwnedFd), Error> {
    let _pids = match &launch.place {
        Place::New(container) => container
            .namespaces
            .joined_pids()
            .map(PidNamespace::enter)
            .transpose(),
        Place::Inside(running) => PidNamespace::enter(running.first).map(Some),
    }
    .map_err(doing("enter the container's pid namespace"))?;
    let flags = CloneFlags {
        namespaces: fresh(launch),
        cgroup: Some(launch.cgroup),
    };
    match sys::clone3(&flags).map_err(doing("make a process in the container's cgroup"))? {
        Forked::Child => child::run(launch, prepared, theirs),
        Forked::Parent { pid, pidfd } => Ok((pid, pidfd)),
    }
}

/// Makes the process in the user namespace `users`. To enter one is a way of no return, so it is
/// a process between that does, makes the other a child of the agent, and ends.
fn fork_through(
    launch: &Launch<'_>,
    prepared: &Prepared,
    users: BorrowedFd<'_>,
    control: &Control,
    theirs: &OwnedFd,
) -> Result<(i32, OwnedFd), Error> {
    let flags = CloneFlags {
        namespaces: nix::sched::CloneFlags::empty(),
        cgroup: Some(launch.cgroup),
    };
    match sys::clone3(&flags).map_err(doing("make a process in the container's cgroup"))? {
        Forked::Child => child::step_between(launch, prepared, users, theirs),
        Forked::Parent { .. } => control.born().map_err(doing(
            "make a process in another container's user namespace",
        )),
    }
}
