//! What a placeholder's configuration says of the pod as a whole.

use std::io;

use nix::{sched::CloneFlags, unistd::sethostname};

use super::sysctl;
use crate::{spec::Spec, sys};

/// Why the pod is not as configured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name was not taken.
    #[error("cannot set {field} to {value:?}")]
    Name {
        /// The property's path.
        field: &'static str,
        /// What it holds.
        value: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A kernel parameter.
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
}

/// The namespaces of the pod that are the guest's own.
const PODS: CloneFlags = CloneFlags::CLONE_NEWNET
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// Gives the guest the host name, domain name and kernel parameters of `spec`.
pub(crate) fn configure(spec: &Spec) -> Result<(), Error> {
    let name = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());
    if let Some(name) = name(&spec.hostname) {
        sethostname(&name).map_err(|error| Error::Name {
            field: "hostname",
            value: name,
            source: error.into(),
        })?;
    }
    if let Some(name) = name(&spec.domainname) {
        sys::set_domain_name(&name).map_err(|source| Error::Name {
            field: "domainname",
            value: name,
            source,
        })?;
    }
    for (name, value) in &spec.linux.sysctl {
        sysctl::set(name, value, |kind| PODS.contains(kind))?;
    }
    Ok(())
}
