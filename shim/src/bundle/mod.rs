//! An OCI bundle: `config.json` and the root file system beside it.
//!
//! What must be right before a machine is started is checked here, once; the
//! rest of the configuration is the agent's to read.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use serde_json::Value;

mod disk;
mod guest;
mod role;
mod size;
mod volume;

pub use disk::{BlockDevice, Disk, is_of_disk};
pub use guest::{GuestSpec, Places};
pub(crate) use guest::{process_for_guest, resources_for_guest};
pub use role::Role;
pub use size::{Error as SizeError, Request as SizeRequest, fits, limit_fits, size};
pub use volume::{Source, Volume};

use crate::{
    id,
    sandbox::{Given, ReadOnly},
    text::printable,
};

/// The longest `config.json` that is read.
const CONFIG_MAX: u64 = 2 << 20;

/// Why a bundle cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such bundle.
    #[error("cannot open the bundle {}; name the directory with config.json by --bundle", path.display())]
    Bundle {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No configuration.
    #[error("JSON specification file {} not found; `runc spec` makes one", path.display())]
    NoConfig {
        /// Where.
        path: PathBuf,
    },
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is larger than anything sensible.
    #[error("{} has {length} bytes, at most {CONFIG_MAX} are read", path.display())]
    TooLarge {
        /// Where.
        path: PathBuf,
        /// Its length.
        length: u64,
    },
    /// It is no JSON or of another form.
    #[error("{} is not a valid configuration: {}", path.display(), printable(&source.to_string(), 300))]
    Parse {
        /// Where.
        path: PathBuf,
        /// Where and what is wrong.
        source: serde_json::Error,
    },
    /// Another version of the specification.
    #[error("ociVersion {version:?} in {} is not supported; versions 1.x are", path.display())]
    Version {
        /// Where.
        path: PathBuf,
        /// Which.
        version: String,
    },
    /// A part that must be there is not.
    #[error("{} has no {what}", path.display())]
    Missing {
        /// Where.
        path: PathBuf,
        /// What.
        what: &'static str,
    },
    /// No root file system.
    #[error("invalid rootfs {}: it must be a directory; root.path in config.json names it", path.display())]
    Root {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A volume that is not there, or none that a guest can have.
    #[error("error mounting {source_path:?} to rootfs at {destination:?}: {problem}")]
    Volume {
        /// The host's path.
        source_path: PathBuf,
        /// The container's.
        destination: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A block device that is not there.
    #[error(
        "linux.devices names the block device {major}:{minor} as {}, which this host does not have",
        path.display()
    )]
    Device {
        /// The container's path.
        path: PathBuf,
        /// Its number.
        major: u32,
        /// Its number.
        minor: u32,
    },
    /// An annotation names a sandbox that cannot be one.
    #[error("the annotation {key} names no sandbox")]
    Sandbox {
        /// The annotation.
        key: &'static str,
        /// What is wrong with the name.
        #[source]
        source: id::Error,
    },
    /// Something that cannot be done for a guest yet.
    #[error("{what} is not supported: {advice}")]
    Unsupported {
        /// The property of config.json.
        what: String,
        /// What to do.
        advice: &'static str,
    },
}

/// A bundle that can be run.
#[derive(Debug)]
pub struct Bundle {
    path: PathBuf,
    config: Value,
    spec: Spec,
    root_path: PathBuf,
    root: OwnedFd,
    role: Role,
    volumes: Vec<Volume>,
    devices: Vec<BlockDevice>,
}

impl Bundle {
    /// Reads and checks the bundle in `path`.
    ///
    /// # Errors
    /// When something of it is missing, wrong or not supported.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let path = path.canonicalize().map_err(|source| Error::Bundle {
            path: path.to_owned(),
            source,
        })?;
        let file = path.join("config.json");
        let (config, spec) = parse(&file, &read(&file)?)?;
        let missing = |what| Error::Missing {
            path: file.clone(),
            what,
        };
        let process = spec.process().as_ref().ok_or(missing("process"))?;
        let args = process.args().as_ref().filter(|args| !args.is_empty());
        args.ok_or(missing("process.args"))?;
        let root = spec.root().as_ref().ok_or(missing("root"))?;
        let role = Role::of(&spec)?;
        supported(&spec, &role)?;
        let root_path = path.join(root.path());
        let root = crate::sandbox::open_directory(&root_path).map_err(|source| Error::Root {
            path: root_path.clone(),
            source,
        })?;
        let volumes = volume::of(&spec, &path)?;
        let devices = disk::devices(&spec)?;
        Ok(Self {
            path,
            config,
            spec,
            root_path,
            root,
            role,
            volumes,
            devices,
        })
    }

    /// Where it lies: an absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where its root file system lies.
    pub fn root_path(&self) -> &Path {
        &self.root_path
    }

    /// The network namespace that the pod is to be in; none is a fresh one.
    pub fn network_path(&self) -> Option<&Path> {
        let namespaces = self.spec.linux().as_ref()?.namespaces().as_ref()?;
        let network = |namespace: &&LinuxNamespace| namespace.typ() == LinuxNamespaceType::Network;
        let path = namespaces.iter().find(network)?.path().as_deref()?;
        Some(path).filter(|path| !path.as_os_str().is_empty())
    }

    /// The configuration, typed.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The configuration as it was read.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// What the container is in its pod.
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// What of the host is mounted in the container.
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// What of the host is bound at a place in the container.
    pub fn mounted_at(&self, destination: &str) -> Option<PathBuf> {
        let mounts = self.spec.mounts().as_deref().unwrap_or_default();
        let is_there = |mount: &&oci_spec::runtime::Mount| {
            mount.destination() == Path::new(destination) && volume::is_bind(mount)
        };
        let source = mounts.iter().rfind(is_there)?.source().as_ref()?;
        Some(self.path.join(source))
    }

    /// The size of its /dev/shm in bytes, if that is one that containers of a pod share.
    pub fn shm_bytes(&self) -> Option<u64> {
        let memory = |volume: &Volume| match volume.source {
            Source::Memory { bytes } => Some(bytes),
            _ => None,
        };
        self.volumes.iter().find_map(memory)
    }

    /// The block devices of the host that the container gets.
    pub fn devices(&self) -> &[BlockDevice] {
        &self.devices
    }

    /// Whether the process is to have a terminal.
    pub fn terminal(&self) -> bool {
        let process = self.spec.process().as_ref();
        process.and_then(|process| process.terminal()) == Some(true)
    }

    /// The root file system, opened.
    pub fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// How the root file system is given to the guest.
    ///
    /// A read-only root is given read-only, so that even the guest's kernel cannot write to it,
    /// where nothing is missing in it that a container needs to be mounted on.
    pub fn given(&self) -> Given {
        let root = self.spec.root().as_ref();
        let read_only = root.and_then(|root| root.readonly()) == Some(true);
        Given {
            recursive: true,
            read_only: match read_only && self.missing_places().is_empty() {
                true => ReadOnly::All,
                false => ReadOnly::No,
            },
        }
    }

    /// The mount points and the working directory that are not in the root file system.
    fn missing_places(&self) -> Vec<PathBuf> {
        let mounts = self.spec.mounts().as_deref().unwrap_or_default();
        let mut places: Vec<&Path> = Vec::new();
        let process = self.spec.process().as_ref();
        let wanted = mounts
            .iter()
            .map(|mount| mount.destination().as_path())
            .chain(process.map(|process| process.cwd().as_path()));
        for place in wanted {
            // What lies below another mount is made there.
            if !places
                .iter()
                .any(|above| place.starts_with(above) && *above != Path::new("/"))
            {
                places.push(place);
            }
        }
        let missing = places.into_iter().filter(|place| !self.has(place));
        missing.map(Path::to_owned).collect()
    }

    fn has(&self, place: &Path) -> bool {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .mode(Mode::empty())
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        openat2(&self.root, place, how).is_ok()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::NoConfig {
            path: path.to_owned(),
        },
        _ => Error::Read {
            path: path.to_owned(),
            source,
        },
    };
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > CONFIG_MAX {
        return Err(Error::TooLarge {
            path: path.to_owned(),
            length,
        });
    }
    fs::read(path).map_err(failed)
}

fn parse(path: &Path, text: &[u8]) -> Result<(Value, Spec), Error> {
    let invalid = |source| Error::Parse {
        path: path.to_owned(),
        source,
    };
    let config: Value = serde_json::from_slice(text).map_err(invalid)?;
    let version = config.get("ociVersion").and_then(Value::as_str);
    match version {
        None => {
            return Err(Error::Missing {
                path: path.to_owned(),
                what: "ociVersion",
            });
        }
        Some(version) if version.split('.').next() != Some("1") => {
            return Err(Error::Version {
                path: path.to_owned(),
                version: printable(version, 40),
            });
        }
        Some(_) => {}
    }
    // From the text and not from the value, so that an error names its line.
    let spec = serde_json::from_slice(text).map_err(invalid)?;
    Ok((config, spec))
}

/// Refuses what would need the host's side and is not there yet, rather than to run without it.
fn supported(spec: &Spec, role: &Role) -> Result<(), Error> {
    let unsupported = |what: String, advice| Err(Error::Unsupported { what, advice });
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let namespaces = namespaces.map(Vec::as_slice).unwrap_or_default();
    let member = matches!(role, Role::Member { .. });
    for namespace in namespaces {
        let kind = namespace.typ();
        let path = namespace.path().as_ref();
        let joins = path.is_some_and(|path| !path.as_os_str().is_empty());
        match (joins, kind) {
            // The machine is put into it.
            (true, LinuxNamespaceType::Network) => {}
            (
                true,
                LinuxNamespaceType::Mount | LinuxNamespaceType::Cgroup | LinuxNamespaceType::Time,
            ) => {
                return unsupported(
                    format!("the path of the {kind} namespace"),
                    "a virtual machine cannot join the host's namespaces; remove `path`",
                );
            }
            (true, _) if !member => {
                return unsupported(
                    format!("the path of the {kind} namespace"),
                    "a virtual machine cannot join the host's namespaces; remove `path`, or make the \
                     container a member of a pod by its annotations",
                );
            }
            (false, LinuxNamespaceType::Network) if member => {
                return unsupported(
                    "a network namespace of its own in a pod".to_owned(),
                    "the machine's network is that of all its containers; name the pod's by `path`",
                );
            }
            _ => {}
        }
    }
    let own_network = namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    if !own_network {
        return unsupported(
            "the host's network".to_owned(),
            "add a namespace of type \"network\" to linux.namespaces",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
