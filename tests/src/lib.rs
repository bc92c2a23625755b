//! What the system tests share.

pub mod client;
pub mod container;
pub mod guest;
pub mod hold;
pub mod host;
pub mod image;
pub mod loopback;
pub mod registry;
pub mod scratch;
pub mod slow_reader;
pub mod steps;
mod sys;
pub mod tasks;
pub mod trials;
pub mod verbs;
