//! What tests do on the host and ask of it.

use std::process::Command;

use anyhow::Result;

use crate::client::command;

/// Runs a script to its end and returns what it printed.
///
/// # Errors
/// When it fails, or takes too long.
pub fn sh(script: &str) -> Result<String> {
    let done = command::run(Command::new("sh").args(["-ec", script]))?;
    Ok(done.text()?.to_owned())
}

/// What a web server answers.
///
/// # Errors
/// When it does not, within 20 seconds.
pub fn curl(url: &str) -> Result<String> {
    sh(&format!("curl -gsS --noproxy '*' --max-time 20 '{url}'"))
}

/// The rules of the packet filter that have a word, such as a container's address or port.
///
/// # Errors
/// When the packet filter cannot be asked.
pub fn rules(word: &str) -> Result<String> {
    sh(&format!("iptables-save | grep -w -e '{word}' || true"))
}
