//! Makes devices from their configuration.

use std::{fs::File, os::fd::OwnedFd};

use vm_memory::GuestAddress;

use super::{VirtioDevice, balloon, blk, console::Console, fs, net, pmem::Pmem, rng::Rng, vsock};
use crate::{
    config::{DeviceConfig, NetConfig, Resource},
    descriptors::{self, Descriptors},
    jail,
    vm::images::{self, Images},
};

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One of its resources.
    #[error(transparent)]
    Descriptor(#[from] descriptors::Error),
    /// A disk.
    #[error("{name}, a disk")]
    Blk {
        /// Its name in the configuration.
        name: String,
        /// Why.
        #[source]
        source: blk::disk::Error,
    },
    /// A socket device.
    #[error("{name}, a socket device")]
    Vsock {
        /// Its name in the configuration.
        name: String,
        /// Why.
        #[source]
        source: vsock::NewError,
    },
    /// A network card.
    #[error("{name}, a network card")]
    Net {
        /// Its name in the configuration.
        name: String,
        /// Why.
        #[source]
        source: net::NewError,
    },
    /// A directory to share.
    #[error(transparent)]
    Fs(#[from] fs::PrepareError),
    /// A console.
    #[error("{name}, a console, cannot use its output")]
    Console {
        /// Its name in the configuration.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// An image.
    #[error(transparent)]
    Image(#[from] images::Error),
    /// A balloon.
    #[error(transparent)]
    Balloon(#[from] balloon::NewError),
}

/// Whether system calls are restricted already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jail {
    /// They are not: a device can have made for it what cannot be made later.
    Open,
    /// They are: the device is added to a VM that runs.
    Shut,
}

/// Makes the device that the configuration calls `name`, which takes its resources from `descriptors` and, if it is
/// memory, its place from `images`.
///
/// # Errors
/// When a resource is not what the device needs.
pub fn build(
    name: &str,
    config: &DeviceConfig,
    descriptors: &mut Descriptors,
    images: &mut Images,
    jail: Jail,
) -> Result<Box<dyn VirtioDevice>, Error> {
    let mut take =
        |field: &str, resource: &Resource| descriptors.take(&format!("{name}.{field}"), resource);
    Ok(match config {
        DeviceConfig::Blk {
            disk,
            read_only,
            serial,
        } => {
            let settings = blk::Settings {
                read_only: *read_only,
                serial: serial.clone(),
            };
            let disk = File::from(take("disk", disk)?);
            let device = blk::Blk::new(disk, &settings).map_err(|source| Error::Blk {
                name: name.to_owned(),
                source,
            })?;
            match jail {
                Jail::Open => Box::new(device.with_ring()),
                Jail::Shut => Box::new(device),
            }
        }
        DeviceConfig::Vsock {
            cid,
            listener,
            guest_ports,
        } => {
            let listener = take("listener", listener)?.into();
            let ports = guest_ports
                .iter()
                .map(|port| Ok((port.port, take("guest_ports", &port.socket)?.into())))
                .collect::<Result<_, descriptors::Error>>()?;
            let device = vsock::Vsock::new(*cid, listener, ports);
            Box::new(device.map_err(|source| Error::Vsock {
                name: name.to_owned(),
                source,
            })?)
        }
        DeviceConfig::Fs {
            tag,
            directory,
            read_only,
        } => {
            let settings = fs::Settings {
                tag: tag.clone(),
                read_only: *read_only,
            };
            let directory = take("directory", directory)?;
            Box::new(fs::Fs::prepare(directory, settings, jail::OWN_FILES)?)
        }
        DeviceConfig::Net(config) => {
            let taps = config.taps.iter().map(|tap| take("taps", tap));
            let taps = taps.collect::<Result<_, _>>()?;
            let vhost = config.vhost.iter().map(|vhost| take("vhost", vhost));
            let vhost = vhost.collect::<Result<_, _>>()?;
            Box::new(
                network_card(config, taps, vhost).map_err(|source| Error::Net {
                    name: name.to_owned(),
                    source,
                })?,
            )
        }
        DeviceConfig::Rng { source } => Box::new(Rng::new(take("source", source)?.into())),
        DeviceConfig::Console { output, input } => {
            let output = take("output", output)?.into();
            let input = input
                .as_ref()
                .map(|input| take("input", input))
                .transpose()?;
            let device = Console::new(output, input);
            Box::new(device.map_err(|source| Error::Console {
                name: name.to_owned(),
                source,
            })?)
        }
        DeviceConfig::Pmem { file, read_only } => {
            let file = File::from(take("file", file)?);
            let backing = match read_only {
                true => None,
                false => Some(file.try_clone().map_err(images::Error::Duplicate)?),
            };
            let placed = images.add(file.into(), *read_only)?;
            Box::new(Pmem::new(GuestAddress(placed.address), placed.len, backing))
        }
        DeviceConfig::Balloon { inflate_mib } => Box::new(balloon::Balloon::new(*inflate_mib)?),
    })
}

fn network_card(
    config: &NetConfig,
    taps: Vec<OwnedFd>,
    vhost: Vec<OwnedFd>,
) -> Result<net::Net, net::NewError> {
    let settings = net::Settings {
        mac: config.mac,
        mtu: config.mtu,
        to_guest: config.to_guest,
        from_guest: config.from_guest,
    };
    let taps = net::tap::Tap::queues(taps)?;
    let vhost: Result<_, _> = vhost.into_iter().map(net::vhost::Vhost::new).collect();
    net::Net::new(taps, vhost?, settings)
}
