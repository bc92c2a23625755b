//! Commands that are one request: `start`, `pause`, `resume`; and those that are refused.

use shim::{id::ContainerId, oci::Request};

use super::{
    cli::{Global, IdArgs},
    home,
};

/// `bulkhead start`.
pub(crate) fn start(global: &Global, args: &IdArgs) -> anyhow::Result<u8> {
    ask(global, args, |id| Request::Start { id })
}

/// `bulkhead pause`.
pub(crate) fn pause(global: &Global, args: &IdArgs) -> anyhow::Result<u8> {
    ask(global, args, |id| Request::Pause { id })
}

/// `bulkhead resume`.
pub(crate) fn resume(global: &Global, args: &IdArgs) -> anyhow::Result<u8> {
    ask(global, args, |id| Request::Resume { id })
}

/// `bulkhead checkpoint` and `restore`.
pub(crate) fn no_checkpoints() -> anyhow::Result<u8> {
    anyhow::bail!(
        "checkpoint and restore are not supported: bulkhead cannot save a virtual machine yet"
    )
}

fn ask(
    global: &Global,
    args: &IdArgs,
    request: impl FnOnce(String) -> Request,
) -> anyhow::Result<u8> {
    let id = ContainerId::parse(&args.id)?;
    home(global)?.ask(&id, &request(id.to_string()))?;
    Ok(0)
}
