//! Bulkhead's host side: a bundle becomes a container in a virtual machine of
//! its own.
//!
//! - [`pod`]: a sandbox with its containers: what both faces, the OCI commands and containerd's
//!   shim, are made of.
//! - [`sandbox`]: one pod, one virtual machine: its start recipe and its end.
//! - [`bundle`]: `config.json` and the root file system, read and rewritten for the guest.
//! - [`cgroup`]: a container's cgroup on the host.
//! - [`hooks`]: the hooks that run on the host.
//! - [`cni`]: networks that containers of images are attached to.
//! - [`container`]: what a container is connected to: streams, a terminal, signals.
//! - [`network`]: the pod's network namespace and the guest's cards in it.
//! - [`features`]: what this runtime can do, for those who ask before.
//! - [`host`]: what the host is, as far as it concerns virtual machines.
//! - [`oci`]: the OCI commands' side of a pod: its control socket, relays, records.
//! - [`task`]: what containerd calls: the shim's commands and its Task service.
//! - [`image`]: container images by their names, and what is run of them.
//! - [`id`]: the names that people give.
//! - [`log`]: log lines in the forms that callers read.
//! - [`text`]: text of strangers, made fit for a terminal.

pub mod pod;
pub mod sandbox;

pub mod bundle;
pub mod cgroup;
pub mod cni;
pub mod container;
pub mod features;
pub mod hooks;
pub mod host;
pub mod id;
pub mod image;
pub mod log;
pub mod network;
pub mod oci;
pub mod task;
pub mod text;

mod sys;
#[cfg(test)]
mod testing;
