//! Makes devices from their configuration.

use super::{Memory, VirtioDevice};
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
    /// The device itself.
    #[error("cannot make the {device} device: {reason}")]
    Device {
        /// Its kind.
        device: &'static str,
        /// Why.
        reason: String,
    },
}

/// Makes a device that takes its resources from `descriptors`.
///
/// # Errors
/// When a resource is not what the device needs.
pub fn build(
    config: &DeviceConfig,
    descriptors: &mut Descriptors,
    memory: &Memory,
) -> Result<Box<dyn VirtioDevice>, Error> {
    let _ = (descriptors, memory);
    Err(Error::Device {
        device: "?",
        reason: format!("{config:?}"),
    })
}
