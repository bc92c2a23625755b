//! The face that containerd sees: the program containerd-shim-bulkhead-v2.
//!
//! containerd starts it once for a container. The first of a pod stays, as a daemon that serves the
//! pod's machine to containerd over a socket; for the others it only tells where that socket is.
//!
//! ```text
//!   start ─► arguments, bootstrap ─► socket ──ours──► fork ─► answer, exit
//!                                       │               └───► serve: Task v2 and v3 ─► Pod
//!                                       └─served─► answer, exit        └─► events ─► containerd
//!   delete ─► what a killed daemon left is undone
//! ```

pub mod arguments;
pub mod bootstrap;
pub mod options;
pub mod socket;
pub mod start;

mod books;
mod boot;
pub mod daemon;
pub mod events;
mod failure;
pub mod metrics;
mod service;
pub mod stdio;
mod tasks;

pub mod delete;
pub mod info;
mod proto;

pub use boot::STATE_ROOT;

#[cfg(test)]
mod tests;
