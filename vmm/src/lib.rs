//! Bulkhead's virtual machine monitor: one process, one microVM.
//!
//! It knows KVM and virtio and nothing of containers. Every resource comes to
//! it as an open descriptor; after its jail is shut it opens no path.

pub mod arch;
pub mod config;
pub mod control;
pub mod counters;
pub mod descriptors;
pub mod jail;
pub mod launch;
pub mod pci;
pub mod probe;
pub mod virtio;
pub mod vm;
