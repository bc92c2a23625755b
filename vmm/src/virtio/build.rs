//! Makes devices from their configuration.

use super::{
    VirtioDevice,
    fs::{self, Fs},
};
use crate::{
    config::DeviceConfig,
    descriptors::{self, Descriptors},
};

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One of its resources.
    #[error(transparent)]
    Descriptor(#[from] descriptors::Error),
    /// A directory to share.
    #[error(transparent)]
    Fs(#[from] fs::PrepareError),
    /// A device of a kind that this VMM does not have.
    #[error("there is no device of kind {0} in this version")]
    Kind(&'static str),
}

/// Makes the device `devices[index]`, which takes its resources from `descriptors`.
///
/// # Errors
/// When a resource is not what the device needs.
pub fn build(
    index: usize,
    config: &DeviceConfig,
    descriptors: &mut Descriptors,
) -> Result<Box<dyn VirtioDevice>, Error> {
    let mut take =
        |field: &str, resource| descriptors.take(&format!("devices[{index}].{field}"), resource);
    match config {
        DeviceConfig::Fs {
            tag,
            directory,
            read_only,
        } => {
            let settings = fs::Settings {
                tag: tag.clone(),
                read_only: *read_only,
            };
            Ok(Box::new(Fs::prepare(
                take("directory", directory)?,
                settings,
            )?))
        }
        DeviceConfig::Blk { .. } => Err(Error::Kind("blk")),
        DeviceConfig::Vsock { .. } => Err(Error::Kind("vsock")),
        DeviceConfig::Rng {} => Err(Error::Kind("rng")),
        DeviceConfig::Console { .. } => Err(Error::Kind("console")),
        DeviceConfig::Pmem { .. } => Err(Error::Kind("pmem")),
        DeviceConfig::Balloon { .. } => Err(Error::Kind("balloon")),
    }
}
