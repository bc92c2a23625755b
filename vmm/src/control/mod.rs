//! The control socket: how the host asks a running VM for things.
//!
//! [`serve`] runs on the VMM's main thread until the VM ends; [`Client`] is
//! the other side. What is said is in [`message`].

use std::os::fd::OwnedFd;

mod client;
mod connection;
pub mod message;
mod server;
mod sys;

pub use client::{Client, Error};
pub use server::serve;

use message::{Reply, Request};

/// Who carries out what is asked for on the control socket.
pub trait Commands {
    /// Carries out one request, with the descriptors that came with it.
    fn carry_out(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Reply;
}

#[cfg(test)]
mod tests;
