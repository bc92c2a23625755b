//! `bulkhead rmi`: names and images that are not wanted any more.

use anyhow::Context as _;
use rootfs_builder::image::Store;
use shim::image::Location;

use super::{cli::RmiArgs, say::say};

/// Removes what was named and says what went.
pub(crate) fn rmi(args: &RmiArgs) -> anyhow::Result<u8> {
    let store = args.store.open()?;
    for image in &args.images {
        let removed = store
            .remove(&as_kept(&store, image)?, args.force)
            .with_context(|| format!("cannot remove {image:?}"))?;
        for name in &removed.names {
            say(format_args!("Untagged: {name}"))?;
        }
        for id in &removed.images {
            say(format_args!("Deleted: {}", id.hex()))?;
        }
    }
    Ok(0)
}

/// A name as the store has it: written whole, where it is not there as it was given.
pub(crate) fn as_kept(store: &Store, image: &str) -> anyhow::Result<String> {
    if store.find(image)?.is_some() {
        return Ok(image.to_owned());
    }
    Ok(match image.parse() {
        Ok(Location::Registry(reference)) => reference.whole(),
        _ => image.to_owned(),
    })
}
