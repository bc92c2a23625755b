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
    client::{Client, Progress},
    connection::{Connection, Step},
    link::Link,
    packet::{self, Header, Key, Message, Op, Packet, Reject, TYPE_STREAM},
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
            self.clients.insert(host_port, Client::new(socket));
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
                let link = Link::new(Connection::requested(), client.into_socket());
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
