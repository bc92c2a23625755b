//! `bulkhead-relay`: the host's process that stands for a container.
//!
//! It is started by `bulkhead` with all signals blocked and a socket as
//! descriptor 3 (`shim::oci`). There is one for each container and exec of the
//! command line, so it has no heap to speak of and one thread, and gives back
//! the memory that only its start needed.

use std::{os::fd::AsFd, process::ExitCode};

mod sys;

fn main() -> ExitCode {
    let stood = sys::socket().and_then(|socket| {
        shim::oci::leave_host()?;
        shim::oci::stand_alone(socket.as_fd(), sys::terminal_size)
    });
    match stood {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            // There is nobody who reads it but a person who starts this by hand.
            eprintln!("bulkhead-relay: it is started by bulkhead: {error}");
            ExitCode::FAILURE
        }
    }
}
