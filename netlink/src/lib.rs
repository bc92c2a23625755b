//! The kernel's network settings over netlink (rtnetlink(7)): what the host
//! side and the agent need of it, and no more.
//!
//! A [`Socket`] belongs to the network namespace of the thread that opened it,
//! for ever; it may be used from any. Every call is one question and one answer.
//!
//! ```no_run
//! let kernel = netlink::Socket::open()?;
//! for link in kernel.links()? {
//!     println!("{} {}", link.index, link.name);
//! }
//! # Ok::<(), std::io::Error>(())
//! ```

mod address;
mod changes;
mod link;
mod message;
mod neighbour;
mod route;
mod socket;
mod traffic;

pub use address::Address;
pub use changes::{Heard, listen};
pub use link::{Change, Link, LinkFlags};
pub use neighbour::Neighbour;
pub use route::{Destination, Hop, Route};
pub use socket::Socket;
pub use traffic::{Instruction, Verdict};
