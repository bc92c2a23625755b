//! `bulkhead features`: what this runtime can do.

/// Prints it.
pub(crate) fn features() -> anyhow::Result<u8> {
    let document = shim::features::document();
    println!("{}", serde_json::to_string_pretty(&document)?);
    Ok(0)
}
