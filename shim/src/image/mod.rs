//! Container images by the names that people give them, and what is run of them.
//!
//! - [`location`]: what a name says about where an image is.
//! - [`pull`]: from there into the store.
//! - [`registry`], [`credentials`] and [`certificates`]: the way to registries.
//! - [`volume`]: directories that outlive their containers.
//! - [`spec`] and [`users`]: an image's configuration and the command line become a container's.

pub mod location;
pub mod pull;

pub mod certificates;
pub mod credentials;
pub mod registry;

pub mod spec;
pub mod users;
pub mod volume;

pub use location::Location;
pub use pull::{Access, Event, pull};
