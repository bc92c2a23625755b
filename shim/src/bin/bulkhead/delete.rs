//! `bulkhead delete`: removes a container, whatever there is of it.

use shim::id::ContainerId;

use super::{
    cli::{DeleteArgs, Global},
    home,
};

/// Removes it.
pub(crate) fn delete(global: &Global, args: &DeleteArgs) -> anyhow::Result<u8> {
    let id = ContainerId::parse(&args.id)?;
    home(global)?.delete(&id, args.force)?;
    Ok(0)
}
