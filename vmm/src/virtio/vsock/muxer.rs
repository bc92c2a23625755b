//! All connections of one guest, each between a port of the guest and a stream
//! socket of the host, and whose turn it is to give the guest something.
//!
//! A packet of the guest takes this way: [`Muxer::packet`], the connection's
//! state machine, the socket. The other way round, a socket that has something
//! makes its connection *ready*; ready connections take turns
//! ([`Muxer::next_turn`]) whenever the guest has receive buffers.
//!
//! Sockets are watched edge-triggered, so that a connection that has to wait
//! for the guest costs nothing; what is known of a socket is kept in its [`Link`].

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::unix::net::{UnixListener, UnixStream},
};

use vm_memory::VolatileSlice;

use super::{
    HOST_CID,
    connection::{Connection, Step},
    greeting::{self, Line},
    host::{HostStream, Received},
    packet::{self, Header, Key, Message, Op, Packet, Reject, TYPE_STREAM},
    sys,
};
use crate::virtio::{Events, Sources, slices::Slices};

/// The most connections at a time, those that are only asked for counted.
pub const MAX_CONNECTIONS: usize = 1024;

/// The first of the ports that connections of the host get, in turn. The ports
/// that the guest may connect to lie below.
pub const FIRST_HOST_PORT: u32 = 1 << 30;

/// How many answers may wait for receive buffers before the guest's packets have to wait.
const MAX_ANSWERS: usize = 256;

/// The guest's end of a [`Key`] while the host's program has not said it: `VMADDR_PORT_ANY`.
const NO_PORT: u32 = u32::MAX;

/// The token of the listener among the sources; no connection has port 0.
pub(super) const LISTENER: u64 = 0;

pub(super) struct Muxer {
    guest_cid: u32,
    listener: UnixListener,
    /// Whether programs may wait at the listener that were not accepted for want of room.
    overfull: bool,
    /// Ports of the host that the guest may still connect to.
    guest_ports: BTreeMap<u32, UnixStream>,
    /// Programs that did not say yet what they want, by the host's port.
    clients: BTreeMap<u32, Client>,
    links: BTreeMap<Key, Link>,
    /// Connections that have something for the guest; each has its turn.
    ready: VecDeque<Key>,
    /// Packets for the guest that belong to no connection.
    answers: VecDeque<Header>,
    next_host_port: u32,
    /// [`MAX_CONNECTIONS`]
    pub(super) limit: usize,
}

struct Client {
    socket: UnixStream,
    line: Line,
}

/// A connection and its socket.
struct Link {
    connection: Connection,
    stream: HostStream,
    /// Whether the connection is in [`Muxer::ready`].
    queued: bool,
    /// Whether the socket may have something to receive.
    readable: bool,
    /// Whether the other end of the socket has ended its sending.
    ending: bool,
    /// Whether the socket is watched for room.
    watched_for_room: bool,
    /// Whether the socket's sending is ended, after all that the guest sent.
    finished: bool,
    /// Whether the guest is gone: only what it sent remains to be delivered.
    orphan: bool,
}

/// What the guest gets next.
pub(super) enum Turn {
    /// A packet without data.
    Packet(Header),
    /// Data of a connection, at most that many bytes.
    Data(Key, usize),
}

impl Muxer {
    pub(super) fn new(
        guest_cid: u32,
        listener: UnixListener,
        guest_ports: BTreeMap<u32, UnixStream>,
    ) -> Self {
        Self {
            guest_cid,
            listener,
            overfull: false,
            guest_ports,
            clients: BTreeMap::new(),
            links: BTreeMap::new(),
            ready: VecDeque::new(),
            answers: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            limit: MAX_CONNECTIONS,
        }
    }

    pub(super) fn start(&mut self, sources: &Sources) -> io::Result<()> {
        let events = Events::IN | Events::EDGE_TRIGGERED;
        sources.add(&self.listener, events, LISTENER)
    }

    /// Forgets all connections.
    pub(super) fn reset(&mut self) {
        self.clients.clear();
        self.links.clear();
        self.ready.clear();
        self.answers.clear();
        self.overfull = false;
    }

    /// Whether the guest must read before more of its packets are taken.
    pub(super) fn is_congested(&self) -> bool {
        self.answers.len() >= MAX_ANSWERS
    }

    /// Whether [`Muxer::next_turn`] may have something.
    pub(super) fn has_turns(&self) -> bool {
        !self.answers.is_empty() || !self.ready.is_empty()
    }

    /// Takes a packet of the guest; `payload` is what follows its header.
    pub(super) fn packet(&mut self, header: &Header, payload: Slices<'_>, sources: &Sources) {
        match packet::parse(header, payload.len(), self.guest_cid) {
            Ok(packet) => self.take(header, &packet, payload, sources),
            Err(Reject::Drop) => {}
            Err(Reject::Reset) => self.answers.push_back(header.reset()),
            Err(Reject::Kill(key)) => {
                self.answers.push_back(header.reset());
                self.remove(key, sources);
            }
        }
    }

    fn take(
        &mut self,
        header: &Header,
        packet: &Packet,
        mut payload: Slices<'_>,
        sources: &Sources,
    ) {
        let key = packet.key;
        let Some(link) = self.links.get_mut(&key).filter(|link| !link.orphan) else {
            self.take_unknown(header, packet, sources);
            return;
        };
        match link.connection.handle(packet) {
            Ok(Step::None) => {}
            Ok(Step::Opened) => {
                let greeting = format!("OK {}\n", key.host_port);
                if link.stream.write_line(&greeting).is_err() {
                    self.answers.push_back(header.reset());
                    self.remove(key, sources);
                }
            }
            Ok(Step::Data(len)) => {
                payload.truncate(len as usize);
                link.deliver(payload);
            }
            Ok(Step::Ended) => {
                if link.connection.guest_ended().both() {
                    self.answers.push_back(header.reset());
                    link.orphan = true;
                } else if link.connection.guest_ended().receive {
                    link.stream.end_receiving();
                }
            }
            Ok(Step::Reset) => {
                link.orphan = true;
                if !link.connection.is_established() {
                    self.remove(key, sources);
                }
            }
            Err(_) => {
                self.answers.push_back(header.reset());
                self.remove(key, sources);
            }
        }
        self.settle(key, sources);
    }

    /// A packet without a connection: the guest may connect to each of its ports once.
    fn take_unknown(&mut self, header: &Header, packet: &Packet, sources: &Sources) {
        let key = packet.key;
        if packet.message == Message::Reset {
            return;
        }
        if packet.message == Message::Request
            && !self.links.contains_key(&key)
            && key.guest_port != NO_PORT
            && let Some(socket) = self.guest_ports.remove(&key.host_port)
        {
            let link = Link::new(Connection::accepted(packet), socket);
            if sources.add(&link.stream, link.events(), token(key)).is_ok() {
                self.links.insert(key, link);
                self.settle(key, sources);
                return;
            }
        }
        self.answers.push_back(header.reset());
    }

    /// A socket that is watched under `token` is ready for `events`.
    pub(super) fn handle_source(&mut self, token: u64, events: Events, sources: &Sources) {
        if token == LISTENER {
            self.accept(sources);
            return;
        }
        let key = key(token);
        if key.guest_port == NO_PORT {
            self.handle_client(key.host_port, sources);
        } else if let Some(link) = self.links.get_mut(&key) {
            link.note(events);
            if events.contains(Events::HANG_UP) && !link.connection.is_established() {
                if !link.connection.is_unasked() {
                    self.answers.push_back(self.header(key, Op::Rst));
                }
                self.remove(key, sources);
            }
            self.settle(key, sources);
        }
    }

    fn accept(&mut self, sources: &Sources) {
        loop {
            // Also true when the process has no descriptors left: the next one that a
            // connection gives back is the chance of those who wait.
            self.overfull = true;
            if self.clients.len() + self.links.len() >= self.limit {
                return;
            }
            match self.listener.accept() {
                Ok((socket, _)) => self.greet(socket, sources),
                Err(error) => {
                    self.overfull = error.kind() != io::ErrorKind::WouldBlock;
                    return;
                }
            }
        }
    }

    fn greet(&mut self, socket: UnixStream, sources: &Sources) {
        let host_port = self.take_host_port();
        let key = Key {
            host_port,
            guest_port: NO_PORT,
        };
        if sources.add(&socket, Link::EVENTS, token(key)).is_ok() {
            let line = Line::default();
            self.clients.insert(host_port, Client { socket, line });
        }
    }

    fn take_host_port(&mut self) -> u32 {
        loop {
            let port = self.next_host_port;
            self.next_host_port = match port {
                0x7fff_ffff => FIRST_HOST_PORT,
                port => port + 1,
            };
            let keys = Key {
                host_port: port,
                guest_port: 0,
            }..=Key {
                host_port: port,
                guest_port: NO_PORT,
            };
            // At most MAX_CONNECTIONS of 2^30 are taken.
            if self.links.range(keys).next().is_none() && !self.clients.contains_key(&port) {
                return port;
            }
        }
    }

    fn handle_client(&mut self, host_port: u32, sources: &Sources) {
        let Some(mut client) = self.clients.remove(&host_port) else {
            return;
        };
        match client.advance() {
            Progress::Waiting => {
                self.clients.insert(host_port, client);
            }
            Progress::Refused => self.accept_waiting(sources),
            Progress::Wants(guest_port) => {
                let key = Key {
                    host_port,
                    guest_port,
                };
                let link = Link::new(Connection::requested(), client.socket);
                // This also tells anew what the socket is ready for.
                if sources
                    .modify(&link.stream, link.events(), token(key))
                    .is_ok()
                {
                    self.links.insert(key, link);
                    self.settle(key, sources);
                }
            }
        }
    }

    fn remove(&mut self, key: Key, sources: &Sources) {
        if let Some(link) = self.links.remove(&key) {
            if link.queued {
                self.ready.retain(|ready| *ready != key);
            }
            drop(link);
            self.accept_waiting(sources);
        }
    }

    fn accept_waiting(&mut self, sources: &Sources) {
        if self.overfull {
            self.accept(sources);
        }
    }

    /// What follows from a change of a connection: its end, its turn, what its socket is
    /// watched for.
    fn settle(&mut self, key: Key, sources: &Sources) {
        let Some(link) = self.links.get_mut(&key) else {
            return;
        };
        link.finish();
        let over = if link.orphan {
            link.finished
        } else {
            link.is_over()
        };
        if over {
            if !link.orphan {
                let farewell = addressed(link.farewell(), self.guest_cid, key);
                self.answers.push_back(farewell);
            }
            self.remove(key, sources);
            return;
        }
        if !link.orphan && !link.queued && link.wants_turn() {
            link.queued = true;
            self.ready.push_back(key);
        }
        let watch = !link.stream.is_flushed();
        if watch != link.watched_for_room {
            link.watched_for_room = watch;
            // The socket is in the set: it was added when the connection was made.
            let _ = sources.modify(&link.stream, link.events(), token(key));
        }
    }

    /// What the guest gets next, when there is anything.
    pub(super) fn next_turn(&mut self) -> Option<Turn> {
        if let Some(header) = self.answers.pop_front() {
            return Some(Turn::Packet(header));
        }
        while let Some(key) = self.ready.pop_front() {
            let Some(link) = self.links.get_mut(&key) else {
                continue;
            };
            link.queued = false;
            if link.orphan {
                continue;
            }
            // Data brings the credit along, and the end of the stream may be behind it: often
            // it spares the packets that are owed.
            let room = link.connection.room();
            let in_the_way = link.connection.owes_shutdown() && !link.ending;
            if link.readable && room > 0 && !in_the_way {
                return Some(Turn::Data(key, room as usize));
            }
            if let Some(header) = link.connection.next_packet() {
                if link.wants_turn() {
                    link.queued = true;
                    self.ready.push_back(key);
                }
                return Some(Turn::Packet(addressed(header, self.guest_cid, key)));
            }
        }
        None
    }

    /// Receives into `room`, which is neither empty nor larger than the turn said. Says how many
    /// bytes came, and with which header they go to the guest; its `len` is up to the caller.
    pub(super) fn receive(
        &mut self,
        key: Key,
        room: &[VolatileSlice<'_>],
        sources: &Sources,
    ) -> Option<(usize, Header)> {
        let guest_cid = self.guest_cid;
        let data = self.links.get_mut(&key)?.receive(room);
        self.settle(key, sources);
        data.map(|(count, header)| (count, addressed(header, guest_cid, key)))
    }

    /// What is kept for programs that read slowly.
    #[cfg(test)]
    pub(super) fn kept_bytes(&self) -> usize {
        self.links.values().map(|link| link.stream.kept()).sum()
    }

    fn header(&self, key: Key, op: Op) -> Header {
        let header = Header {
            op: op as u16,
            ..Header::default()
        };
        addressed(header, self.guest_cid, key)
    }
}

impl Link {
    const EVENTS: Events = Events::from_bits_truncate(
        Events::IN.bits() | Events::READ_HANG_UP.bits() | Events::EDGE_TRIGGERED.bits(),
    );

    fn new(connection: Connection, socket: UnixStream) -> Self {
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

    fn events(&self) -> Events {
        if self.watched_for_room {
            Self::EVENTS | Events::OUT
        } else {
            Self::EVENTS
        }
    }

    /// The socket is ready for `events`.
    fn note(&mut self, events: Events) {
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
    fn deliver(&mut self, data: Slices<'_>) {
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
    fn receive(&mut self, room: &[VolatileSlice<'_>]) -> Option<(usize, Header)> {
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
    fn finish(&mut self) {
        let all_sent = self.orphan || self.connection.guest_ended().send;
        if all_sent && !self.finished && self.stream.is_flushed() {
            self.stream.end_sending();
            self.finished = true;
        }
    }

    /// Whether nothing can come any more, either way.
    fn is_over(&self) -> bool {
        let (host, guest) = (self.connection.host_ended(), self.connection.guest_ended());
        (self.finished || host.receive) && (host.send || guest.receive)
    }

    /// Whether there is something for the guest now.
    fn wants_turn(&mut self) -> bool {
        if self.readable {
            self.connection.want_credit();
        }
        self.connection.owes() || (self.readable && self.connection.room() > 0)
    }

    /// The last packet of a connection that is over.
    fn farewell(&mut self) -> Header {
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

/// How far a program is with saying what it wants.
enum Progress {
    Waiting,
    Wants(u32),
    Refused,
}

impl Client {
    /// Reads as much of the line as there is, and not a byte beyond it.
    fn advance(&mut self) -> Progress {
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

/// Puts the addresses of a connection on a packet to the guest.
fn addressed(header: Header, guest_cid: u32, key: Key) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: u64::from(guest_cid),
        src_port: key.host_port,
        dst_port: key.guest_port,
        kind: TYPE_STREAM,
        ..header
    }
}

/// The token of a connection's socket; below 2^63 because host ports are below 2^31.
fn token(key: Key) -> u64 {
    u64::from(key.host_port) << 32 | u64::from(key.guest_port)
}

fn key(token: u64) -> Key {
    Key {
        host_port: (token >> 32) as u32,
        guest_port: token as u32,
    }
}
