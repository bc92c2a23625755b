//! `bulkhead logs`: what a detached container of an image printed.

use std::{fs::File, io};

use anyhow::Context as _;
use shim::id::ContainerId;

use super::{
    cli::{Global, IdArgs},
    home,
    run_image::LOG,
};

/// Prints it.
pub(crate) fn logs(global: &Global, args: &IdArgs) -> anyhow::Result<u8> {
    let id = ContainerId::parse(&args.id)?;
    let bundle = home(global)?.state(&id)?.bundle;
    let log = File::open(bundle.join(LOG));
    let mut log = log.with_context(|| {
        format!("{id} keeps no log: only what `bulkhead run --detach IMAGE` runs has one")
    })?;
    match io::copy(&mut log, &mut io::stdout()) {
        // Who reads has enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        copied => copied.map(|_| 0).context("cannot copy the log"),
    }
}
