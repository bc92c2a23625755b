//! The OCI commands' side of a pod: a control socket, and for each container
//! and exec a relay, the host's process that stands for it.
//!
//! ```text
//!   bulkhead create ──► spawns the relay, its own child, so that the caller's parent adopts it
//!          │
//!          ├── first of its pod: a copy of itself becomes the pod's process (Pod, control socket)
//!          └── member: asks the pod's process by the control socket, descriptors come along
//!
//!   bulkhead start, state, kill, delete, exec, … ──► control socket
//!
//!   relay ◄── signals, terminal sizes, exit status ──► the pod's process
//! ```
//!
//! A pod's process that was killed leaves a state directory that nobody holds: the commands answer
//! from the records in it, and undo it.

mod client;
mod console;
mod home;
mod host;
mod message;
mod record;
mod relay;
mod server;
pub mod signal;
pub mod told;
mod tree;

pub use client::{Client, Error as ClientError};
pub use console::{Console, Error as ConsoleError};
pub use home::{Error as HomeError, Found, Home};
pub use host::{Hosted, Kept, host_detached};
pub use message::{Create, Exec, Reply, Request};
pub use record::{Record, State};
pub use relay::{
    Error as RelayError, Joined, Relay, RelayMessage, SOCKET as RELAY_SOCKET, Stand, StandIn,
    random, reap, stand_alone,
};
pub use server::Server;
pub use tree::leave_host;

/// Closes every descriptor but the standard streams, which are all that the caller is to have
/// given: pipes of its own that it forgot would otherwise be held open for a container's life.
///
/// # Errors
/// When the kernel is older than 5.9.
pub fn close_inherited() -> std::io::Result<()> {
    crate::sys::close_from(3)
}
