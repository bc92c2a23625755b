//! Where this command's log lines go.

use std::fs::OpenOptions;

use anyhow::Context as _;
use shim::log::{self, Format};
use tracing::level_filters::LevelFilter;

use super::cli::{Global, LogFormat};

/// Sends log lines where the flags say. Without `--log` and `--debug` only warnings are shown:
/// stderr is the container's.
pub(crate) fn start(global: &Global) -> anyhow::Result<()> {
    let file = match &global.log {
        Some(path) => Some(
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .with_context(|| format!("cannot open the log file {}", path.display()))?,
        ),
        None => None,
    };
    let level = match (global.debug, &file) {
        (true, _) => LevelFilter::DEBUG,
        (false, Some(_)) => LevelFilter::INFO,
        (false, None) => LevelFilter::WARN,
    };
    let format = match global.log_format {
        LogFormat::Text => Format::Text,
        LogFormat::Json => Format::Json,
    };
    log::start(file, format, level).context("cannot start the log")
}
