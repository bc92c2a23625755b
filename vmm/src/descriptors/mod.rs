//! From the configuration's resources to open descriptors, in two steps: the
//! launcher opens what is named by path ([`open`]), and the VMM, which opens
//! nothing, takes what it was started with ([`Descriptors`]).

use std::{
    collections::HashSet,
    fs,
    io::{self, Read},
    os::{
        fd::{OwnedFd, RawFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

mod sys;

use crate::{
    config::{DeviceConfig, Resource, VmConfig},
    virtio::net::tap,
};

/// Where KVM is, unless the configuration says otherwise.
const KVM: &str = "/dev/kvm";
/// A configuration is a few KiB.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The size that a new `console_log` file is given.
const CONSOLE_LOG_BYTES: u64 = 64 << 10;

/// What the VMM does with a resource, and so how its path is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Reads it.
    Read,
    /// Reads and writes it.
    ReadWrite,
    /// Appends to it; it is made if need be.
    Append,
    /// Maps it as the ring of the kernel's log; it is made, with a size, if need be.
    Ring,
    /// Accepts connections on it; it is made and must not exist.
    Listen,
    /// Talks to whoever listens there.
    Connect,
    /// Shares the tree below it.
    Directory,
    /// Sends and receives by it: a queue of a tap device.
    Tap,
}

/// Every resource of a VM, with its name for messages.
fn resources(config: &mut VmConfig) -> Vec<(String, Use, &mut Resource)> {
    let mut all = Vec::new();
    let mut add = |field: &str, to: Use, resource| all.push((field.to_owned(), to, resource));
    add("boot.kernel", Use::Read, &mut config.boot.kernel);
    for (field, to, optional) in [
        ("boot.image", Use::Read, &mut config.boot.image),
        ("boot.initrd", Use::Read, &mut config.boot.initrd),
        ("kvm", Use::ReadWrite, &mut config.kvm),
        ("console_log", Use::Ring, &mut config.console_log),
        ("control", Use::Listen, &mut config.control),
        ("serial", Use::Append, &mut config.serial),
    ] {
        if let Some(resource) = optional {
            add(field, to, resource);
        }
    }
    for (index, device) in config.devices.iter_mut().enumerate() {
        all.extend(
            device_resources(device)
                .into_iter()
                .map(|(field, to, resource)| (format!("devices[{index}].{field}"), to, resource)),
        );
    }
    all
}

fn device_resources(device: &mut DeviceConfig) -> Vec<(&'static str, Use, &mut Resource)> {
    let by = |read_only: &bool| {
        if *read_only {
            Use::Read
        } else {
            Use::ReadWrite
        }
    };
    match device {
        DeviceConfig::Blk {
            disk, read_only, ..
        } => vec![("disk", by(read_only), disk)],
        DeviceConfig::Vsock {
            listener,
            guest_ports,
            ..
        } => {
            let mut all = vec![("listener", Use::Listen, listener)];
            all.extend(
                guest_ports
                    .iter_mut()
                    .map(|port| ("guest_ports", Use::Connect, &mut port.socket)),
            );
            all
        }
        DeviceConfig::Fs { directory, .. } => vec![("directory", Use::Directory, directory)],
        DeviceConfig::Net(net) => {
            let taps = net.taps.iter_mut().map(|tap| ("taps", Use::Tap, tap));
            let vhost = net.vhost.iter_mut();
            taps.chain(vhost.map(|vhost| ("vhost", Use::ReadWrite, vhost)))
                .collect()
        }
        DeviceConfig::Rng { source } => vec![("source", Use::Read, source)],
        DeviceConfig::Balloon { .. } => Vec::new(),
        DeviceConfig::Console { output, input } => {
            let mut all = vec![("output", Use::Append, output)];
            all.extend(input.iter_mut().map(|input| ("input", Use::Read, input)));
            all
        }
        DeviceConfig::Pmem { file, read_only } => vec![("file", by(read_only), file)],
    }
}

/// Opens what `config` names by path, and `/dev/kvm` if nothing is said about it, and puts what
/// `pass` makes of each in its place.
///
/// # Errors
/// When one of them cannot be opened; what was passed before stays so.
pub fn open(config: &mut VmConfig, mut pass: impl FnMut(OwnedFd) -> Resource) -> Result<(), Error> {
    config.kvm.get_or_insert_with(|| Resource::Path(KVM.into()));
    for (field, to, resource) in resources(config) {
        if let Resource::Path(path) = &*resource {
            let opened = open_path(path, to).map_err(|source| Error::Open {
                advice: advice(&source, to),
                field,
                path: path.clone(),
                source,
            })?;
            *resource = pass(opened);
        }
    }
    Ok(())
}

fn open_path(path: &Path, to: Use) -> io::Result<OwnedFd> {
    let mut options = fs::File::options();
    let file = match to {
        Use::Read => options.read(true).open(path)?,
        Use::ReadWrite => options.read(true).write(true).open(path)?,
        Use::Append => options.append(true).create(true).mode(0o600).open(path)?,
        Use::Ring => {
            let file = options
                .read(true)
                .write(true)
                .create(true)
                .mode(0o600)
                .open(path)?;
            if file.metadata()?.len() == 0 {
                file.set_len(CONSOLE_LOG_BYTES)?;
            }
            file
        }
        Use::Listen => return Ok(UnixListener::bind(path)?.into()),
        Use::Connect => return Ok(UnixStream::connect(path)?.into()),
        Use::Tap => {
            let name = path.file_name().and_then(|name| name.to_str());
            return tap::open_existing(name.unwrap_or_default());
        }
        // Any access mode is ignored with O_PATH, but the standard library wants one.
        Use::Directory => options
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(path)?,
    };
    Ok(file.into())
}

fn advice(error: &io::Error, to: Use) -> &'static str {
    match (error.kind(), to) {
        (io::ErrorKind::NotFound, Use::Append | Use::Ring | Use::Listen) => {
            "make the directory it is to be in"
        }
        (io::ErrorKind::NotFound, Use::Connect) => "start what listens there",
        (io::ErrorKind::NotFound, Use::Tap) => {
            "name a persistent tap by its directory, /sys/class/net/NAME"
        }
        (io::ErrorKind::NotFound, _) => "check that it exists",
        (io::ErrorKind::PermissionDenied, _) => "run as a user who may open it",
        (io::ErrorKind::AddrInUse, _) => "remove it if no other VM uses it",
        (io::ErrorKind::NotADirectory, Use::Directory) => "share a directory, not a file",
        (io::ErrorKind::IsADirectory, _) => "name a file, not a directory",
        (io::ErrorKind::ReadOnlyFilesystem, Use::ReadWrite) => "set read_only for it",
        _ => "see the cause",
    }
}

/// Reads the configuration that the launcher put at `number`, the first that it passed. To be
/// called before the process opens anything: what is open now is what it was passed.
///
/// # Errors
/// When the number is no descriptor to read from or what is there is no configuration.
pub fn read_config(number: RawFd) -> Result<VmConfig, Error> {
    sys::remember(number);
    let file = Descriptors::default().take("--config-fd", &Resource::Fd(number))?;
    let mut text = String::new();
    fs::File::from(file)
        .take(MAX_CONFIG_BYTES)
        .read_to_string(&mut text)
        .map_err(|source| Error::ReadConfig {
            from: format!("descriptor {number}"),
            source,
        })?;
    parse(&text)
}

/// Reads a configuration from a file.
///
/// # Errors
/// When the file cannot be read or is no configuration.
pub fn read_config_file(path: &Path) -> Result<VmConfig, Error> {
    let read = || {
        let mut text = String::new();
        fs::File::open(path)?
            .take(MAX_CONFIG_BYTES)
            .read_to_string(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|source| Error::ReadConfig {
        from: path.display().to_string(),
        source,
    })?;
    parse(&text)
}

fn parse(text: &str) -> Result<VmConfig, Error> {
    serde_json::from_str(text).map_err(Error::ParseConfig)
}

/// The descriptors that resources name by number: those that the process was
/// started with, or those that came with a request on the control socket.
#[derive(Debug, Default)]
pub struct Descriptors {
    taken: HashSet<RawFd>,
    received: Option<Vec<Option<OwnedFd>>>,
}

impl Descriptors {
    /// What came with a request: `Fd(0)` is the first.
    pub fn received(descriptors: Vec<OwnedFd>) -> Self {
        Self {
            taken: HashSet::new(),
            received: Some(descriptors.into_iter().map(Some).collect()),
        }
    }

    /// Takes a resource, once. `field` is its name in messages.
    ///
    /// # Errors
    /// When it is a path, when its number is not of an open descriptor that the process was
    /// started with or received, or was taken before.
    pub fn take(&mut self, field: &str, resource: &Resource) -> Result<OwnedFd, Error> {
        let number = match resource {
            Resource::Fd(number) => *number,
            Resource::Path(path) => {
                return Err(Error::Path {
                    field: field.to_owned(),
                    path: path.clone(),
                });
            }
        };
        self.take_number(number).map_err(|what| Error::Number {
            field: field.to_owned(),
            number,
            what,
        })
    }

    fn take_number(&mut self, number: RawFd) -> Result<OwnedFd, &'static str> {
        if let Some(received) = &mut self.received {
            return usize::try_from(number)
                .ok()
                .and_then(|index| received.get_mut(index))
                .ok_or("not so many came with the request")?
                .take()
                .ok_or("it is named twice; send a duplicate");
        }
        if number < 3 {
            return Err("0, 1 and 2 are the standard streams; pass 3 or more");
        }
        if !self.taken.insert(number) {
            return Err("it is named twice; pass a duplicate");
        }
        match sys::take(number) {
            Ok(Some(fd)) => Ok(fd),
            Ok(None) => Err("the process was not started with it"),
            Err(_) => Err("it is not open; pass it without close-on-exec"),
        }
    }
}

/// Why a resource of the configuration is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path cannot be opened.
    #[error("cannot open {field} {}: {advice}", path.display())]
    Open {
        /// The resource's name in the configuration.
        field: String,
        /// Its path.
        path: PathBuf,
        /// What to do about it.
        advice: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A path where only descriptors are taken.
    #[error("{field} is the path {}, but the jailed VMM opens none: pass a descriptor, or start it with --config", path.display())]
    Path {
        /// The resource's name in the configuration.
        field: String,
        /// Its path.
        path: PathBuf,
    },
    /// A number that is not a descriptor to take.
    #[error("{field} cannot be descriptor {number}: {what}")]
    Number {
        /// The resource's name in the configuration.
        field: String,
        /// The number.
        number: RawFd,
        /// Why, and what to do.
        what: &'static str,
    },
    /// The configuration cannot be read.
    #[error("cannot read the configuration from {from}")]
    ReadConfig {
        /// Where it should be.
        from: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The configuration is not one.
    #[error("the configuration is not valid")]
    ParseConfig(#[source] serde_json::Error),
}

#[cfg(test)]
mod tests;
