//! `bulkhead kill`: sends a signal.

use anyhow::Context as _;
use shim::{
    id::ContainerId,
    oci::{Request, signal},
};

use super::{
    cli::{Global, KillArgs},
    home,
};

/// Sends it.
pub(crate) fn kill(global: &Global, args: &KillArgs) -> anyhow::Result<u8> {
    let id = ContainerId::parse(&args.id)?;
    let signal =
        signal::parse(&args.signal).with_context(|| format!("unknown signal {:?}", args.signal))?;
    let request = Request::Kill {
        id: id.to_string(),
        signal,
        all: args.all,
    };
    home(global)?.ask(&id, &request)?;
    Ok(0)
}
