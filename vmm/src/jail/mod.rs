//! The jail: what the process gives up, and when.
//!
//! ```text
//!   launch             namespaces; nothing open but what was passed
//!   main's first line  enter(): empty root, no capability, limits      the whole process
//!   guest about to run confine(kind): one seccomp allow-list           each thread
//! ```
//!
//! The kernel's image, the configuration's devices and everything of the
//! guest's are looked at only behind the first two. What is left to a thread
//! that the guest takes over is what its list in [`filters`] says.
//!
//! A thread starts with the filter of the thread that made it, and its own can
//! only take away. So the threads of vCPUs and devices are started before the
//! main thread is confined; those that come later can do no more than it can.

use std::io;

mod filters;
mod privileges;
mod root;
mod sys;

pub use filters::ThreadKind;

use crate::{
    config::{DeviceConfig, Resource, VmConfig},
    virtio::fs::OwnFiles,
};

/// What a shared directory's thread finds of its process, and where.
pub const OWN_FILES: OwnFiles = OwnFiles {
    descriptors: "/fd",
    mounts: "/mountinfo",
};

/// Shuts the jail around the process, which must have one thread.
///
/// Afterwards there is no path to open: the root is empty but for the shared directories
/// (`/shared/0`, ...) and, only beside those, the process's [`OWN_FILES`]. There is
/// no privilege either, but for those on files that a shared directory's thread takes up.
///
/// # Errors
/// When the process was not started by [`crate::launch`], or the kernel refuses a step.
pub fn enter(config: &VmConfig) -> Result<(), Error> {
    let step = |step| move |source| Error { step, source };
    let shared = shared_directories(config);
    let files = if shared.is_empty() {
        Files::None
    } else {
        Files::Shared
    };
    // The steps below would wreck a host. Only the first process of a pid namespace is certain to
    // have been put where it is on purpose.
    if sys::own_pid() != 1 {
        return Err(Error {
            step: "find itself alone in its namespaces; start it with --config or by vmm::launch",
            source: io::ErrorKind::PermissionDenied.into(),
        });
    }
    privileges::name_process().map_err(step("name its process"))?;
    privileges::die_with_launcher().map_err(step("bind its life to the launcher's"))?;
    root::enter(&shared)?;
    privileges::limit(files).map_err(step("set its limits"))?;
    privileges::give_up(files).map_err(step("give up its privileges"))?;
    Ok(())
}

/// Confines the calling thread to what its kind needs, for ever.
///
/// A call that is not on its list ends the whole process by SIGSYS; the kernel's log names it.
///
/// # Errors
/// When the kernel refuses.
pub fn confine(kind: ThreadKind) -> io::Result<()> {
    privileges::for_thread(kind)?;
    filters::install(kind)
}

/// Whether the process acts on files of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Files {
    None,
    Shared,
}

/// The numbers of the shared directories' descriptors.
fn shared_directories(config: &VmConfig) -> Vec<i32> {
    config
        .devices
        .iter()
        .filter_map(|device| match device {
            DeviceConfig::Fs {
                directory: Resource::Fd(number),
                ..
            } => Some(*number),
            _ => None,
        })
        .collect()
}

/// Why the jail could not be shut.
#[derive(Debug, thiserror::Error)]
#[error("the jail is not shut: cannot {step}")]
pub struct Error {
    /// What was being tried.
    step: &'static str,
    /// What the kernel said.
    #[source]
    source: io::Error,
}
