//! Making a process of a container, in two steps.
//!
//! ```text
//! agent                               child
//!   launch ──────── clone3 ────────────► namespaces, file tree, terminal,
//!                                        limits, user
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
mod mappings;
mod namespaces;
mod pod;
mod program;
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
pub(crate) use mappings::Mappings;
pub(crate) use namespaces::{Error as NamespaceError, Join, Namespaces};
pub(crate) use pod::Error as PodError;
pub(crate) use pod::configure as configure_pod;

use crate::{
    rootfs::{Scratch, Source},
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
    /// Whether it has a user namespace of its own.
    pub(crate) own_users: bool,
}

/// A container to be built around a process.
pub(crate) struct NewContainer<'a> {
    /// Its configuration.
    pub(crate) spec: &'a Spec,
    /// Where its root comes from.
    pub(crate) source: &'a Source,
    /// Where the root is put together.
    pub(crate) scratch: &'a Scratch,
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
}

impl Prepared {
    fn new(process: &Process) -> Result<Self, Error> {
        let arguments = process.args.iter().filter_map(program::c_string).collect();
        let capabilities = process
            .capabilities
            .as_ref()
            .map(Capabilities::parse)
            .unwrap_or_default();
        let limits = user::limits(&process.rlimits)?;
        Ok(Self {
            arguments,
            capabilities,
            limits,
        })
    }
}

/// Makes the process and lets it prepare itself; [`Control`] tells when it has.
///
/// # Errors
/// When its configuration has a value out of range, or the kernel has no room for a process.
pub(crate) fn launch(launch: &Launch<'_>) -> Result<Child, Error> {
    let prepared = Prepared::new(launch.process)?;
    let (ours, theirs) = control::pair().map_err(doing("make a socket pair"))?;
    let control = Control::new(ours).map_err(doing("watch a socket"))?;
    let pid_namespace = match &launch.place {
        Place::New(container) => container.namespaces.enter_pid(),
        Place::Inside(running) => namespaces::PidNamespace::enter(running.first).map(Some),
    }
    .map_err(doing("enter the container's pid namespace"))?;
    let flags = CloneFlags {
        namespaces: match &launch.place {
            Place::New(container) => container.namespaces.fresh(),
            Place::Inside(_) => nix::sched::CloneFlags::empty(),
        },
        cgroup: Some(launch.cgroup),
    };
    let forked = sys::clone3(&flags).map_err(doing("make a process in the container's cgroup"))?;
    match forked {
        Forked::Child => child::run(launch, &prepared, &theirs),
        Forked::Parent { pid, pidfd } => {
            drop(pid_namespace);
            if let Some(score) = launch.process.oom_score_adj {
                fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
                    .map_err(doing("set process.oomScoreAdj"))?;
            }
            if let Place::New(NewContainer { namespaces, .. }) = &launch.place
                && let Some(mappings) = namespaces.mappings()
            {
                mappings
                    .write(pid)
                    .and_then(|()| control.go())
                    .map_err(doing("set linux.uidMappings and linux.gidMappings"))?;
            }
            Ok(Child {
                pid,
                pidfd,
                control,
            })
        }
    }
}
