//! `bulkhead create`: a container whose program waits for `start`.

use shim::sandbox::Trace;

use super::{
    cli::{CreateArgs, Global},
    home,
    new::{New, write_pid},
};

/// Makes it.
pub(crate) fn create(global: &Global, args: &CreateArgs, trace: &Trace) -> anyhow::Result<u8> {
    let new = New::load(global, (&args.id, &args.bundle), &args.make)?;
    let id = new.id.clone();
    let relay = new.detached(global, &args.make, None, trace)?;
    if let Err(error) = write_pid(args.make.pid_file.as_deref(), relay.pid) {
        // Without its pid the caller has no container.
        home(global)?.delete(&id, true)?;
        relay.reap();
        return Err(error);
    }
    Ok(0)
}
