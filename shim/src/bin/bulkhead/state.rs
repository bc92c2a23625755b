//! `bulkhead state`: what is known of a container.

use shim::id::ContainerId;

use super::{
    cli::{Global, IdArgs},
    home,
    say::say,
};

/// Prints it.
pub(crate) fn state(global: &Global, args: &IdArgs) -> anyhow::Result<u8> {
    let id = ContainerId::parse(&args.id)?;
    let state = home(global)?.state(&id)?;
    say(serde_json::to_string_pretty(&state)?)?;
    Ok(0)
}
