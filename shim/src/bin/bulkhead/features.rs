//! `bulkhead features`: what this runtime can do.

use super::say::say;

/// Prints it.
pub(crate) fn features() -> anyhow::Result<u8> {
    let document = shim::features::document();
    say(serde_json::to_string_pretty(&document)?)?;
    Ok(0)
}
