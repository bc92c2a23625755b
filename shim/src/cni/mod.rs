//! Networks by the Container Network Interface: what `bulkhead run IMAGE` is attached to.
//!
//! - [`network`]: a network's configuration: Bulkhead's own, or one of the host's.
//! - [`attachment`]: a namespace is attached to a network, and detached.
//! - [`plugin`]: one call of one plug-in.
//! - [`port`]: ports of the host that lead to the container.
//!
//! Under containerd, podman and docker it is they who do this; the pod's namespace is then ready.

pub mod attachment;
pub mod network;
pub mod plugin;
pub mod port;

pub use attachment::{Attached, Error, remove_now};
pub use network::Network;
pub use plugin::Plugins;
pub use port::{Port, Reserved};

use std::path::PathBuf;

/// What a container's namespace is to be attached to.
#[derive(Debug, Default)]
pub struct Plan {
    /// The networks; the first is `eth0`, the next `eth1`, and so on.
    pub networks: Vec<Network>,
    /// Ports of the host that lead to it.
    pub ports: Vec<Port>,
    /// What keeps those ports from others.
    pub reserved: Vec<Reserved>,
    /// Where the plug-ins are.
    pub plugins: Plugins,
    /// The container's `/etc/hosts`, to which its addresses are added, and its host name.
    pub hosts: Option<(PathBuf, String)>,
}
