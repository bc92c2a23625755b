//! The OCI runtime configuration, as far as it concerns the guest.
//!
//! Own types rather than a crate's: they hold what the agent acts on and what
//! it must refuse, and nothing of other platforms. Unknown properties are
//! ignored, as the specification demands.

mod linux;
mod list;
mod process;
mod refuse;

pub use linux::*;
pub use list::List;
pub use process::*;

use serde::Deserialize;

/// Why a configuration cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Longer than [`MAX_BYTES`].
    #[error("the container's configuration has {0} bytes; at most {MAX_BYTES} are allowed")]
    TooLong(usize),
    /// No such JSON.
    #[error("the container's configuration is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A version that is not 1.x.
    #[error("ociVersion {0:?} is not supported; 1.x is")]
    Version(String),
    /// A property that must be there is not.
    #[error("{0} is missing in the container's configuration")]
    Missing(&'static str),
    /// A property that the agent does not implement.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// The property's path.
        field: String,
        /// Why, or what to do instead.
        reason: &'static str,
    },
    /// A value out of its range.
    #[error("{field} is {value:?}: {reason}")]
    Value {
        /// The property's path.
        field: String,
        /// What it holds.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// The longest configuration that is read.
pub const MAX_BYTES: usize = 2 << 20;

/// `config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Spec {
    /// The specification's version that the configuration follows.
    pub oci_version: String,
    /// The container's root directory.
    pub root: Root,
    /// Further mounts, in order.
    pub mounts: List<Mount>,
    /// The first process.
    pub process: Option<Process>,
    /// The host name of its UTS namespace.
    pub hostname: Option<String>,
    /// The NIS domain name of its UTS namespace.
    pub domainname: Option<String>,
    /// What is particular to Linux.
    pub linux: Linux,
    /// Programs to run around the container's life.
    pub hooks: Hooks,
    /// Any text, which hooks are told.
    pub annotations: Annotations,
    /// A virtual machine of the configuration's choice; refused.
    pub vm: Option<serde_json::Value>,
}

/// `annotations`; `null` is none.
pub type Annotations = Option<std::collections::BTreeMap<String, String>>;

/// `root`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Root {
    /// Whether the container cannot write to it.
    pub readonly: bool,
}

/// One of `mounts`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Mount {
    /// Where in the container.
    pub destination: String,
    /// The file system's type.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// What is mounted: a path of the guest for bind mounts.
    pub source: Option<String>,
    /// fstab-style options.
    pub options: List<String>,
    /// Users mapped on the mount.
    pub uid_mappings: List<IdMapping>,
    /// Groups mapped on the mount.
    pub gid_mappings: List<IdMapping>,
}

/// `hooks`: those that would run in the guest. The host runs the others.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hooks {
    /// Run in the container's namespaces before its root is entered.
    pub create_container: List<Hook>,
    /// Run in the container before its process.
    pub start_container: List<Hook>,
}

/// One of them.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Hook {
    /// The program.
    pub path: String,
    /// Its arguments, its name first.
    pub args: List<String>,
    /// Its environment, `NAME=value`.
    pub env: List<String>,
    /// Seconds after which it is ended; none where absent.
    pub timeout: Option<i64>,
}

impl Spec {
    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// When it is too long, not valid, of another version, or asks for what the agent cannot do.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let spec = Self::parse_placeholder(json)?;
        match &spec.process {
            Some(process) => process.check()?,
            None => return Err(Error::Missing("process")),
        }
        Ok(spec)
    }

    /// Reads and checks the `config.json` of a container that has no process.
    ///
    /// # Errors
    /// As [`Self::parse`], but for the process.
    pub fn parse_placeholder(json: &[u8]) -> Result<Self, Error> {
        if json.len() > MAX_BYTES {
            return Err(Error::TooLong(json.len()));
        }
        let spec: Self = serde_json::from_slice(json)?;
        if spec.oci_version.split('.').next() != Some("1") {
            return Err(Error::Version(spec.oci_version));
        }
        refuse::unsupported(&spec)?;
        Ok(spec)
    }
}

#[cfg(test)]
mod tests;
