//! Bulkhead's host side: a bundle becomes a container in a virtual machine of
//! its own.
//!
//! - [`sandbox`]: one pod, one virtual machine: its start recipe and its end.
//! - [`bundle`]: `config.json` and the root file system, read and rewritten for the guest.
//! - [`container`]: a container in a sandbox: its streams, terminal, signals and exit status.
//! - [`host`]: what the host is, as far as it concerns virtual machines.
//! - [`task`]: what containerd calls: the shim's commands and its Task service.
//! - [`id`]: the names that people give.
//! - [`log`]: log lines in the forms that callers read.
//! - [`text`]: text of strangers, made fit for a terminal.

pub mod sandbox;

pub mod bundle;
pub mod container;
pub mod host;
pub mod id;
pub mod log;
pub mod task;
pub mod text;

mod sys;
