//! What commands print. A reader that has gone (`bulkhead images | head -n 1`) is no failure of
//! theirs: they end as a program ends that SIGPIPE kills, which this one ignores, as the output of
//! containers is written by others than the main thread.

use std::{
    fmt::Display,
    io::{self, Write as _},
};

use anyhow::Context as _;

/// The status of a program that SIGPIPE killed.
pub(crate) const UNREAD_STATUS: u8 = 128 + 13;

/// Nobody reads standard output any more.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output")]
pub(crate) struct Unread;

/// Prints a line, or several that end with one.
///
/// # Errors
/// [`Unread`], or when it cannot be written.
pub(crate) fn say(text: impl Display) -> anyhow::Result<()> {
    let mut text = text.to_string();
    if !text.ends_with('\n') {
        text.push('\n');
    }
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Unread.into()),
        written => written.context("cannot write to standard output"),
    }
}

/// Prints to standard error, if somebody reads that.
pub(crate) fn complain(text: impl Display) {
    let _ = io::stderr().lock().write_all(text.to_string().as_bytes());
}
