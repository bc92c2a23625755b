//! The host's end of a connection: a stream socket, and the bytes of the guest
//! that it did not take yet. It knows nothing of packets.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
};

use vm_memory::VolatileSlice;

use super::sys;
use crate::virtio::slices::Slices;

/// A stream socket that never blocks.
#[derive(Debug)]
pub(super) struct HostStream {
    socket: UnixStream,
    /// What the socket did not take, from `sent` on. Its owner bounds it by the credit.
    backlog: Vec<u8>,
    sent: usize,
}

/// What came of receiving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// That many bytes, at least one.
    Bytes(usize),
    /// None now.
    Blocked,
    /// None any more: the other end sends no more.
    End,
    /// The other end is gone.
    Gone,
}

impl HostStream {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            backlog: Vec::new(),
            sent: 0,
        }
    }

    /// Receives into `room`, which is not empty.
    pub(super) fn receive(&self, room: &[VolatileSlice<'_>]) -> Received {
        match sys::receive(&self.socket, room) {
            Ok(0) => Received::End,
            Ok(count) => Received::Bytes(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Received::Blocked,
            Err(_) => Received::Gone,
        }
    }

    /// Sends `data`, keeps what the socket does not take, and says how much it took.
    pub(super) fn send(&mut self, mut data: Slices<'_>) -> io::Result<usize> {
        let mut taken = 0;
        while self.is_flushed() && !data.is_empty() {
            match sys::send(&self.socket, data.parts()) {
                Ok(count) => {
                    taken += count;
                    data.skip(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if !data.is_empty() {
            self.keep(&data);
        }
        Ok(taken)
    }

    fn keep(&mut self, data: &Slices<'_>) {
        if self.sent >= self.backlog.len() / 2 {
            self.backlog.drain(..self.sent);
            self.sent = 0;
        }
        let start = self.backlog.len();
        self.backlog.resize(start + data.len(), 0);
        data.read(&mut self.backlog[start..]);
    }

    /// Sends what was kept, and says how much the socket took.
    pub(super) fn flush(&mut self) -> io::Result<usize> {
        let start = self.sent;
        while !self.is_flushed() {
            match sys::send_bytes(&self.socket, &self.backlog[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let taken = self.sent - start;
        if self.is_flushed() {
            self.forget();
        }
        Ok(taken)
    }

    /// Throws away what was kept.
    pub(super) fn forget(&mut self) {
        self.backlog = Vec::new();
        self.sent = 0;
    }

    /// How many bytes the socket did not take yet.
    pub(super) fn kept(&self) -> usize {
        self.backlog.len() - self.sent
    }

    /// Whether the socket took everything.
    pub(super) fn is_flushed(&self) -> bool {
        self.kept() == 0
    }

    /// Writes a short line to a socket that nothing was written to so far.
    pub(super) fn write_line(&self, line: &str) -> io::Result<()> {
        match sys::send_bytes(&self.socket, line.as_bytes())? {
            count if count == line.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Tells the other end that no more comes.
    pub(super) fn end_sending(&self) {
        // It fails only when the other end is gone already.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Tells the other end that no more is taken.
    pub(super) fn end_receiving(&self) {
        // It fails only when the other end is gone already.
        let _ = self.socket.shutdown(Shutdown::Read);
    }
}

impl AsRawFd for HostStream {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn send(stream: &mut HostStream, bytes: &mut [u8]) -> usize {
        let data = Slices::from(VolatileSlice::from(bytes));
        stream.send(data).unwrap()
    }

    #[test]
    fn what_a_slow_reader_does_not_take_is_kept_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut stream = HostStream::new(ours);
        let mut sent = Vec::new();
        let mut taken = 0;
        for round in 0..16_u8 {
            let mut bytes = vec![round; 40_000];
            sent.extend_from_slice(&bytes);
            taken += send(&mut stream, &mut bytes);
        }
        assert!(taken < sent.len() && !stream.is_flushed());

        let mut received = Vec::new();
        let mut piece = vec![0; 70_000];
        while received.len() < sent.len() {
            let count = theirs.read(&mut piece).unwrap();
            received.extend_from_slice(&piece[..count]);
            taken += stream.flush().unwrap();
        }

        assert_eq!(taken, sent.len());
        assert!(stream.is_flushed());
        assert!(received == sent);
    }

    #[test]
    fn a_reader_that_is_gone_is_an_error_and_no_signal() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let mut stream = HostStream::new(ours);
        let data = &mut [1, 2, 3][..];
        let error = stream.send(Slices::from(VolatileSlice::from(data)));
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
