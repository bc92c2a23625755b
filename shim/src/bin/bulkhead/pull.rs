//! `bulkhead pull`: an image from where it is into the store.

use super::{cli::PullArgs, say::say, store::fetch};

/// Fetches the image and prints its id.
pub(crate) fn pull(args: &PullArgs) -> anyhow::Result<u8> {
    let store = args.store.open()?;
    let location = args.image.parse()?;
    let stored = fetch(
        &store,
        &location,
        args.name.as_deref(),
        &args.access,
        args.quiet,
    )?;
    say(stored.id)?;
    Ok(0)
}
