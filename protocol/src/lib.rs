//! The contract between Bulkhead's host side and its agent in the guest:
//! the messages and the service of `proto/agent.proto`, the vsock ports, and
//! the small things that cross vsock outside ttrpc, [`Hello`], [`StreamId`], [`ForwardTarget`] and
//! [`Lookup`], and how connections are [`carry`]ed over it.

mod carry;
mod forward;
mod hello;
mod lookup;
mod options;
mod place;
mod stream;

pub use carry::carry;
pub use forward::ForwardTarget;
pub use hello::{Hello, HelloError};
pub use lookup::{Lookup, Transport};
pub use options::MOUNT_OPTIONS;
pub use place::{Disk, Namespace, POD_SHM, pci_address};
pub use stream::StreamId;

/// The version of this contract; both sides must speak the same.
pub const VERSION: u32 = 2;

/// The vsock port of the guest on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;

/// The vsock port of the guest that takes standard streams: the host writes a
/// [`StreamId`], then the bytes of the stream follow.
pub const STREAM_PORT: u32 = 1025;

/// The vsock port of the guest that leads to its loopback: the host writes a
/// [`ForwardTarget`], the agent answers with a byte, then both [`carry`] the connection.
pub const FORWARD_PORT: u32 = 1026;

/// The vsock port of the guest for name servers of the host's side: the host writes a
/// [`ForwardTarget`], the agent answers with a byte, then questions come, each behind a [`Lookup`],
/// and answers go in the same way.
pub const LOOKUP_PORT: u32 = 1027;

/// The vsock port of the *host* that the agent dials once it serves
/// [`AGENT_PORT`] and [`STREAM_PORT`], to write its [`Hello`].
pub const READY_PORT: u32 = 1024;

/// The vsock context id of the host (virtio 1.2, section 5.10.4).
pub const HOST_CID: u32 = 2;

/// The longest container or exec id, in bytes.
pub const MAX_ID_BYTES: usize = 1024;

/// The longest frame of an answer of the agent, in bytes: the host breaks off at a longer one. What
/// is read from one takes many times its length on the host.
pub const ANSWER_MAX: usize = 1 << 20;

/// The messages of `proto/agent.proto`.
#[allow(warnings, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The client and the server trait of `proto/agent.proto`.
#[allow(warnings, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod agent_ttrpc {
    pub use super::agent;
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}
