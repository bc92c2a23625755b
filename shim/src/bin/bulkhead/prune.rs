//! `bulkhead prune`: images without names and unfinished ones go.

use anyhow::Context as _;
use serde_json::json;

use super::{
    cli::{Format, PruneArgs},
    images::size,
    say::say,
};

/// Removes them and says what it gave back.
pub(crate) fn prune(args: &PruneArgs) -> anyhow::Result<u8> {
    let freed = args.store.open()?.prune(args.all)?;
    match args.format {
        Format::Table => {
            for id in &freed.images {
                say(format_args!("Deleted: {}", id.hex()))?;
            }
            say(format_args!("Total reclaimed space: {}", size(freed.bytes)))?;
        }
        Format::Json => {
            let images: Vec<String> = freed.images.iter().map(|id| id.hex()).collect();
            let report = json!({"deleted": images, "bytes": freed.bytes});
            let text = serde_json::to_string_pretty(&report).context("cannot write the report")?;
            say(text)?;
        }
    }
    Ok(0)
}
