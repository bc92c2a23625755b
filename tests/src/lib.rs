//! What the system tests share.

pub mod client;
pub mod container;
pub mod guest;
pub mod image;
pub mod scratch;
