//! A program of the host that did not say yet what it wants.

use std::{io, os::unix::net::UnixStream};

use vm_memory::VolatileSlice;

use super::{
    greeting::{self, Line},
    sys,
};

pub(super) struct Client {
    socket: UnixStream,
    line: Line,
}

/// How far a program is with saying what it wants.
pub(super) enum Progress {
    /// The line is not whole.
    Waiting,
    /// It wants this port of the guest.
    Wants(u32),
    /// It is gone, or what it said is not a greeting.
    Refused,
}

impl Client {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            line: Line::default(),
        }
    }

    /// The socket, for the connection that it becomes.
    pub(super) fn into_socket(self) -> UnixStream {
        self.socket
    }

    /// Reads as much of the line as there is, and not a byte beyond it.
    pub(super) fn advance(&mut self) -> Progress {
        loop {
            let mut next = [0; greeting::MAX_LINE_BYTES];
            let room = self.line.room();
            let count = match sys::peek(&self.socket, &mut next[..room]) {
                Ok(0) => return Progress::Refused,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Progress::Waiting;
                }
                Err(_) => return Progress::Refused,
            };
            let line = self.line.take(&next[..count]);
            // A socket that is closed with something unread is an error at its other end.
            let taken = line.map_or(count, |(taken, _)| taken);
            let seen = VolatileSlice::from(&mut next[..taken]);
            if sys::receive(&self.socket, &[seen]).ok() != Some(taken) {
                return Progress::Refused;
            }
            match line {
                Ok((_, Some(port))) => return Progress::Wants(port),
                Ok((_, None)) => {}
                Err(_) => return Progress::Refused,
            }
        }
    }
}
