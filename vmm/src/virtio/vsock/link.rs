//! A connection and its socket: what is known of the socket's readiness, and
//! what follows for the connection.

use std::os::unix::net::UnixStream;

use vm_memory::VolatileSlice;

use super::{
    connection::Connection,
    host::{HostStream, Received},
    packet::{Header, Op},
    sys,
};
use crate::virtio::{Events, slices::Slices};

/// A connection and its socket.
pub(super) struct Link {
    pub(super) connection: Connection,
    pub(super) stream: HostStream,
    /// Whether the connection is in line for its turn.
    pub(super) queued: bool,
    /// Whether the socket may have something to receive.
    pub(super) readable: bool,
    /// Whether the other end of the socket has ended its sending.
    pub(super) ending: bool,
    /// Whether the socket is watched for room.
    pub(super) watched_for_room: bool,
    /// Whether the socket's sending is ended, after all that the guest sent.
    pub(super) finished: bool,
    /// Whether the guest is gone: only what it sent remains to be delivered.
    pub(super) orphan: bool,
}

impl Link {
    pub(super) const EVENTS: Events = Events::from_bits_truncate(
        Events::IN.bits() | Events::READ_HANG_UP.bits() | Events::EDGE_TRIGGERED.bits(),
    );

    pub(super) fn new(connection: Connection, socket: UnixStream) -> Self {
        Self {
            connection,
            stream: HostStream::new(socket),
            queued: false,
            readable: false,
            ending: false,
            watched_for_room: false,
            finished: false,
            orphan: false,
        }
    }

    pub(super) fn events(&self) -> Events {
        if self.watched_for_room {
            Self::EVENTS | Events::OUT
        } else {
            Self::EVENTS
        }
    }

    /// The socket is ready for `events`.
    pub(super) fn note(&mut self, events: Events) {
        let end = Events::READ_HANG_UP | Events::HANG_UP | Events::ERROR;
        self.ending |= events.intersects(end);
        self.readable |= events.intersects(end | Events::IN);
        if events.intersects(Events::HANG_UP | Events::ERROR) {
            self.refuse();
        } else if events.contains(Events::OUT) {
            match self.stream.flush() {
                Ok(count) => self.connection.forward(count),
                Err(_) => self.refuse(),
            }
        }
    }

    /// The guest sent `data`.
    pub(super) fn deliver(&mut self, data: Slices<'_>) {
        if self.connection.host_ended().receive {
            self.connection.forward(data.len());
            return;
        }
        match self.stream.send(data) {
            Ok(count) => self.connection.forward(count),
            Err(_) => self.refuse(),
        }
    }

    /// The host takes no more: what it did not take so far is lost.
    fn refuse(&mut self) {
        self.connection.end_host_receive();
        self.connection.forward_all();
        self.stream.forget();
    }

    /// Receives into `room` for the guest.
    pub(super) fn receive(&mut self, room: &[VolatileSlice<'_>]) -> Option<(usize, Header)> {
        let room = &room[..room.len().min(sys::MAX_PIECES)];
        match self.stream.receive(room) {
            Received::Bytes(count) => {
                let asked: usize = room.iter().map(VolatileSlice::len).sum();
                // Less than asked for means that the socket is empty; but the end of the stream
                // may stand behind the last byte, and its edge may have been seen already.
                self.readable = count == asked || self.ending;
                // No more than the room was asked for, which is a u32.
                self.connection.send(count as u32);
                let header = Header {
                    op: Op::Rw as u16,
                    ..Header::default()
                };
                return Some((count, self.connection.stamp(header)));
            }
            Received::Blocked => self.readable = false,
            Received::End => {
                self.readable = false;
                self.connection.end_host_send();
            }
            Received::Gone => {
                self.readable = false;
                self.connection.end_host_send();
                self.refuse();
            }
        }
        None
    }

    /// Ends the socket's sending once the guest has sent all and the socket has it.
    pub(super) fn finish(&mut self) {
        let all_sent = self.orphan || self.connection.guest_ended().send;
        if all_sent && !self.finished && self.stream.is_flushed() {
            self.stream.end_sending();
            self.finished = true;
        }
    }

    /// Whether nothing can come any more, either way.
    pub(super) fn is_over(&self) -> bool {
        let (host, guest) = (self.connection.host_ended(), self.connection.guest_ended());
        (self.finished || host.receive) && (host.send || guest.receive)
    }

    /// Whether there is something for the guest now.
    pub(super) fn wants_turn(&mut self) -> bool {
        if self.readable {
            self.connection.want_credit();
        }
        self.connection.owes() || (self.readable && self.connection.room() > 0)
    }

    /// The last packet of a connection that is over.
    pub(super) fn farewell(&mut self) -> Header {
        self.connection.end_host_send();
        self.connection.end_host_receive();
        let header = Header {
            op: Op::Shutdown as u16,
            flags: self.connection.host_ended().flags(),
            ..Header::default()
        };
        self.connection.stamp(header)
    }
}
