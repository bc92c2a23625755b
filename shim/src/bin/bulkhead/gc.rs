//! `bulkhead gc`: removes what killed processes of bulkhead left behind.

use super::{cli::Global, home, say::say};

/// Removes it, and says what it was.
pub(crate) fn gc(global: &Global) -> anyhow::Result<u8> {
    for id in home(global)?.collect()? {
        say(id)?;
    }
    Ok(0)
}
