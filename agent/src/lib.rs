//! Bulkhead's agent: process 1 of the guest, which makes containers for the
//! host and watches over them.
//!
//! Read in this order: [`boot`] is the way from the kernel to serving, [`rpc`]
//! is what the host can ask, [`container`] does it, `launch` makes a process,
//! in two steps across clone3, and `rootfs`, [`cgroup`] and `seccomp` build
//! what surrounds it. [`stream`] and `relay` carry its standard streams, [`pod`]
//! is what containers share, [`network`] is the pod's, and [`events`] is what the host learns unasked.
//!
//! One thread, always: a child that clone3 makes from a process with threads
//! could do nothing but execute a program, and ours sets up its container.

pub mod boot;
mod causes;
pub mod cgroup;
pub mod container;
mod devices;
mod disks;
pub mod events;
pub mod forward;
pub mod guest;
pub mod id;
mod launch;
pub mod log;
pub mod lookup;
mod mappings;
pub mod network;
mod parameters;
pub mod pod;
pub mod port;
pub mod processes;
pub mod reaper;
mod relay;
mod rootfs;
pub mod rpc;
pub mod seccomp;
pub mod spec;
pub mod stream;
mod sys;
