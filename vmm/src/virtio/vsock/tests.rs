//! The device between a guest's driver and programs of the host.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
};

use super::{
    connection::BUF_ALLOC,
    packet::{Op, TYPE_STREAM},
    *,
};
use crate::virtio::testing::{Buffer, Chain, Rig};

const CID: u32 = 3;
const GUEST_BUFFER: u32 = 256 << 10;
const ROOM: usize = 4096 + HEADER_BYTES;

/// A guest's driver and the programs of its host.
struct Machine {
    rig: Rig<Vsock>,
    directory: tempfile::TempDir,
    /// The receive buffers on offer, in order.
    rooms: VecDeque<Chain>,
}

impl Machine {
    fn new() -> Self {
        Self::with_ports(Vec::new())
    }

    fn with_ports(ports: Vec<(u32, UnixStream)>) -> Self {
        let mut machine = Self::without_rooms(ports);
        machine.offer_rooms(60, ROOM);
        machine
    }

    fn without_rooms(ports: Vec<(u32, UnixStream)>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        Self {
            rig: Rig::with_event_index(Vsock::new(CID, listener, ports).unwrap()),
            directory,
            rooms: VecDeque::new(),
        }
    }

    fn muxer(&mut self) -> &mut Muxer {
        &mut self.rig.device.muxer
    }

    fn offer_rooms(&mut self, count: usize, bytes: usize) {
        for _ in 0..count {
            let room = self.rig.offer(RX, &[Buffer::In(bytes)]);
            self.rooms.push_back(room);
        }
        self.rig.kick(RX).unwrap();
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    /// Lets the device work until it has nothing to do.
    fn settle(&mut self) {
        while self.rig.poll(0) {}
    }

    /// A program of the host that asks for a port of the guest.
    fn ask(&mut self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.path()).unwrap();
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        self.settle();
        client
    }

    /// A program of the host, connected to a port of the guest.
    fn connect(&mut self, port: u32) -> (UnixStream, Peer) {
        let client = self.ask(port);
        let (request, _) = self.receive_one();
        assert_eq!(request.op, Op::Request as u16);
        let peer = Peer {
            guest_port: port,
            host_port: request.src_port,
        };
        self.send(peer.header(Op::Response), &[]);
        let mut line = vec![0; format!("OK {}\n", peer.host_port).len()];
        (&client).read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", peer.host_port).as_bytes());
        (client, peer)
    }

    /// The guest sends a packet.
    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..header
        };
        self.send_raw(header, data);
    }

    fn send_raw(&mut self, header: Header, data: &[u8]) {
        self.rig
            .offer(TX, &[Buffer::Out(&header.encode()), Buffer::Out(data)]);
        self.rig.kick(TX).unwrap();
        self.settle();
        self.rig.used(TX);
    }

    /// The packets that the guest got since the last call; their buffers are on offer again.
    fn receive(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        for (head, len) in self.rig.used(RX) {
            let room = self.rooms.pop_front().unwrap();
            assert_eq!(room.head, head, "buffers are used in order");
            let bytes = self.rig.written(&room);
            let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(len as usize, HEADER_BYTES + header.len as usize);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, u64::from(CID)));
            packets.push((header, bytes[HEADER_BYTES..len as usize].to_vec()));
            self.rig.offer_again(RX, &room);
            self.rooms.push_back(room);
        }
        packets
    }

    fn receive_one(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.receive();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// The operations of the packets that the guest got since the last call.
    fn receive_ops(&mut self) -> Vec<u16> {
        self.receive().iter().map(|(header, _)| header.op).collect()
    }

    fn kick_rx(&mut self) {
        self.rig.kick(RX).unwrap();
        self.settle();
    }
}

/// The two ports of a connection.
#[derive(Clone, Copy)]
struct Peer {
    guest_port: u32,
    host_port: u32,
}

impl Peer {
    /// A packet of the guest.
    fn header(self, op: Op) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: GUEST_BUFFER,
            ..Header::default()
        }
    }

    fn shutdown(self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(Op::Shutdown)
        }
    }
}

const RECEIVE: u32 = 1;
const SEND: u32 = 2;

const RST: u16 = Op::Rst as u16;
const SHUTDOWN: u16 = Op::Shutdown as u16;
const CREDIT_REQUEST: u16 = Op::CreditRequest as u16;
const CREDIT_UPDATE: u16 = Op::CreditUpdate as u16;

fn read_to_end(client: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Whether nothing can be read now, not even the end.
fn is_silent(client: &UnixStream) -> bool {
    client.set_nonblocking(true).unwrap();
    let outcome = (&*client).read(&mut [0]);
    client.set_nonblocking(false).unwrap();
    matches!(outcome, Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn bytes_go_both_ways() {
    let mut machine = Machine::new();
    let (mut client, peer) = machine.connect(1024);

    client.write_all(b"to the guest").unwrap();
    machine.settle();
    let (header, data) = machine.receive_one();
    machine.send(peer.header(Op::Rw), b"to the host");

    assert_eq!((header.src_port, header.dst_port), (peer.host_port, 1024));
    assert_eq!(data, b"to the guest");
    let mut received = [0; 11];
    client.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"to the host");
}

#[test]
fn what_a_program_writes_behind_its_greeting_reaches_the_guest() {
    let mut machine = Machine::new();
    let mut client = UnixStream::connect(machine.path()).unwrap();
    client.write_all(b"CONNECT 7\nearly bird").unwrap();
    machine.settle();
    let (request, _) = machine.receive_one();
    let peer = Peer {
        guest_port: 7,
        host_port: request.src_port,
    };

    machine.send(peer.header(Op::Response), &[]);

    assert_eq!(machine.receive_one().1, b"early bird");
}

#[test]
fn a_request_waits_until_the_guest_has_receive_buffers() {
    let mut machine = Machine::without_rooms(Vec::new());
    let client = machine.ask(1024);
    assert!(is_silent(&client));

    machine.offer_rooms(1, ROOM);

    assert_eq!(machine.receive_one().0.op, Op::Request as u16);
}

#[test]
fn a_program_that_the_guest_refuses_sees_the_end() {
    let mut machine = Machine::new();
    let mut client = machine.ask(9);
    let (request, _) = machine.receive_one();
    let peer = Peer {
        guest_port: 9,
        host_port: request.src_port,
    };

    machine.send(peer.header(Op::Rst), &[]);

    assert_eq!(read_to_end(&mut client), b"");
    assert!(machine.receive_ops().is_empty());
}

#[test]
fn a_bad_greeting_ends_the_program_s_connection() {
    let mut machine = Machine::new();
    let mut client = UnixStream::connect(machine.path()).unwrap();
    client.write_all(b"HELLO\n").unwrap();
    machine.settle();
    assert_eq!(read_to_end(&mut client), b"");
}

#[test]
fn the_guest_may_connect_to_a_given_port_once() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut machine = Machine::with_ports(vec![(1024, theirs)]);
    let peer = |guest_port| Peer {
        guest_port,
        host_port: 1024,
    };

    machine.send(peer(5000).header(Op::Request), &[]);
    machine.send(peer(5000).header(Op::Rw), b"hello");
    machine.send(peer(5001).header(Op::Request), &[]);

    assert_eq!(machine.receive_ops(), [Op::Response as u16, RST]);
    let mut received = [0; 5];
    ours.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"hello");
}

#[test]
fn the_guest_s_other_connects_are_reset() {
    let mut machine = Machine::new();
    let peer = Peer {
        guest_port: 5000,
        host_port: 22,
    };
    machine.send(peer.header(Op::Request), &[]);
    let (reset, _) = machine.receive_one();
    assert_eq!((reset.op, reset.src_port, reset.dst_port), (RST, 22, 5000));
}

#[test]
fn the_end_of_a_program_s_input_is_a_half_close() {
    let mut machine = Machine::new();
    let (mut client, peer) = machine.connect(1);
    client.write_all(b"all").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    machine.settle();

    let packets = machine.receive();
    machine.send(peer.header(Op::Rw), b"answer");
    machine.send(peer.shutdown(RECEIVE | SEND), &[]);

    assert_eq!(packets[0].1, b"all");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (SHUTDOWN, SEND));
    assert_eq!(packets.len(), 2);
    assert_eq!(read_to_end(&mut client), b"answer");
    assert_eq!(machine.receive_ops(), [RST]);
}

#[test]
fn the_guest_s_half_close_ends_the_program_s_reading_only() {
    let mut machine = Machine::new();
    let (mut client, peer) = machine.connect(1);

    machine.send(peer.header(Op::Rw), b"last words");
    machine.send(peer.shutdown(SEND), &[]);

    assert_eq!(read_to_end(&mut client), b"last words");
    client.write_all(b"still heard").unwrap();
    machine.settle();
    assert_eq!(machine.receive_one().1, b"still heard");
}

#[test]
fn a_guest_that_receives_no_more_breaks_the_program_s_pipe() {
    let mut machine = Machine::new();
    let (mut client, peer) = machine.connect(1);

    machine.send(peer.shutdown(RECEIVE), &[]);

    let error = client.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    machine.send(peer.header(Op::Rw), b"y");
    client.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_program_that_goes_is_a_full_shutdown_after_its_last_byte() {
    let mut machine = Machine::new();
    let (mut client, _) = machine.connect(1);
    client.write_all(&[7; 10_000]).unwrap();
    drop(client);
    machine.settle();

    let packets = machine.receive();

    let data: Vec<u8> = packets.iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!(data, [7; 10_000]);
    let last = packets.last().unwrap().0;
    assert_eq!((last.op, last.flags), (SHUTDOWN, RECEIVE | SEND));
}

#[test]
fn data_for_a_program_that_is_gone_is_answered_with_a_reset() {
    let mut machine = Machine::new();
    let (client, peer) = machine.connect(1);
    drop(client);
    machine.settle();
    machine.receive();

    machine.send(peer.header(Op::Rw), b"x");
    assert_eq!(machine.receive_ops(), [RST]);
    machine.send(peer.header(Op::Rst), b"");
    assert!(machine.receive_ops().is_empty());
}

#[test]
fn a_program_that_gives_up_before_the_answer_is_a_reset() {
    let mut machine = Machine::new();
    let client = machine.ask(1);
    machine.receive_one();
    drop(client);
    machine.settle();
    assert_eq!(machine.receive_ops(), [RST]);
}

#[test]
fn the_guest_is_never_given_more_than_its_credit() {
    let mut machine = Machine::new();
    let (client, peer) = machine.connect(1);
    client.set_nonblocking(true).unwrap();
    let bytes: Vec<u8> = (0..400_000_u32).map(|i| (i % 251) as u8).collect();
    let (mut written, mut received) = (0, Vec::new());
    let mut told = 0;
    while received.len() < bytes.len() {
        if let Ok(count) = (&client).write(&bytes[written..]) {
            written += count;
        }
        machine.settle();
        machine.kick_rx();
        let packets = machine.receive();
        let stalled = packets.is_empty();
        for (_, data) in packets {
            received.extend_from_slice(&data);
        }
        assert!(received.len() - told <= GUEST_BUFFER as usize);
        if stalled {
            told = received.len();
            let update = Header {
                fwd_cnt: told as u32,
                ..peer.header(Op::CreditUpdate)
            };
            machine.send(update, &[]);
        }
    }
    assert!(told > 0 && received == bytes);
}

#[test]
fn credit_is_asked_for_once() {
    let mut machine = Machine::new();
    let (mut client, peer) = machine.connect(1);
    let small = Header {
        buf_alloc: 10,
        ..peer.header(Op::CreditUpdate)
    };
    machine.send(small, &[]);

    client.write_all(&[1; 100]).unwrap();
    machine.settle();

    assert_eq!(machine.receive_ops(), [Op::Rw as u16, CREDIT_REQUEST]);
    machine.send(small, &[]);
    client.write_all(&[1; 100]).unwrap();
    machine.settle();
    assert!(machine.receive_ops().is_empty());
}

#[test]
fn the_guest_gets_our_credit_when_it_asks() {
    let mut machine = Machine::new();
    let (_client, peer) = machine.connect(1);
    machine.send(peer.header(Op::Rw), &[1; 1000]);

    machine.send(peer.header(Op::CreditRequest), &[]);

    let (update, _) = machine.receive_one();
    assert_eq!(update.op, CREDIT_UPDATE);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUF_ALLOC, 1000));
}

#[test]
fn a_slow_program_loses_nothing_and_holds_the_guest_back() {
    let mut machine = Machine::new();
    let (mut client, peer) = machine.connect(1);
    let piece: Vec<u8> = (0..65_536_u32).map(|i| (i % 241) as u8).collect();
    let mut fwd_cnt = 0;
    let mut sent = 0;
    while sent - fwd_cnt <= BUF_ALLOC as usize - piece.len() {
        machine.send(peer.header(Op::Rw), &piece);
        sent += piece.len();
        for (header, _) in machine.receive() {
            fwd_cnt = header.fwd_cnt as usize;
        }
    }
    // The socket's own buffer and ours are full; more would break the credit.
    let mut received = vec![0; sent];
    for part in received.chunks_mut(10_000) {
        client.read_exact(part).unwrap();
        machine.settle();
    }

    assert!(received.chunks(piece.len()).all(|part| part == piece));
    let updates = machine.receive();
    assert!(updates.iter().all(|(header, _)| header.op == CREDIT_UPDATE));
    let last = updates.last().unwrap().0.fwd_cnt as usize;
    assert!(sent - last < BUF_ALLOC as usize / 2);
}

#[test]
fn more_data_than_the_credit_resets_the_connection() {
    let mut machine = Machine::new();
    let (mut client, peer) = machine.connect(1);
    let piece = vec![0; 65_536];
    let mut ops = Vec::new();
    // The socket takes some at once; without a reader it cannot take this much.
    for _ in 0..20 {
        machine.send(peer.header(Op::Rw), &piece);
        ops.extend(machine.receive_ops());
    }
    assert!(ops.contains(&RST));
    assert!(read_to_end(&mut client).len() < 20 * piece.len());
}

#[test]
fn what_the_guest_sent_before_it_went_is_still_delivered() {
    for last in [Op::Rst, Op::Shutdown] {
        let mut machine = Machine::new();
        let (client, peer) = machine.connect(1);
        let mut sent = 0;
        for _ in 0..6 {
            machine.send(peer.header(Op::Rw), &[5; 65_536]);
            sent += 65_536;
        }
        let header = Header {
            flags: RECEIVE | SEND,
            ..peer.header(last)
        };
        machine.send(header, &[]);

        let mut received = 0;
        let mut piece = vec![0; 65_536];
        loop {
            let count = (&client).read(&mut piece).unwrap();
            if count == 0 {
                break;
            }
            received += count;
            machine.settle();
        }
        assert_eq!(received, sent);
    }
}

#[test]
fn two_streams_take_turns() {
    let mut machine = Machine::new();
    let (first, one) = machine.connect(1);
    let (second, two) = machine.connect(2);
    for client in [&first, &second] {
        client.set_nonblocking(true).unwrap();
        while (&*client).write(&[1; 65_536]).is_ok() {}
    }
    let mut counts = [0, 0];
    for _ in 0..4 {
        machine.settle();
        machine.kick_rx();
        for (header, data) in machine.receive() {
            let index = usize::from(header.src_port == two.host_port);
            assert!(index == 1 || header.src_port == one.host_port);
            counts[index] += data.len();
        }
    }
    assert!(counts[0] > 65_536 && counts[1] > 65_536, "{counts:?}");
    assert!(counts[0].abs_diff(counts[1]) <= TURN_BYTES, "{counts:?}");
}

#[test]
fn a_reset_device_starts_afresh() {
    let mut machine = Machine::new();
    let (mut client, peer) = machine.connect(1);

    machine.rig.device.reset();

    assert_eq!(read_to_end(&mut client), b"");
    machine.send(peer.header(Op::Rw), b"x");
    assert_eq!(machine.receive_ops(), [RST]);
}

#[test]
fn a_packet_in_the_name_of_another_guest_is_not_answered() {
    let mut machine = Machine::new();
    let (_client, peer) = machine.connect(1);
    let header = Header {
        src_cid: 9,
        ..peer.header(Op::Rst)
    };
    machine.send(header, &[]);
    machine.send(peer.header(Op::CreditRequest), &[]);
    assert_eq!(machine.receive_ops(), [CREDIT_UPDATE]);
}

#[test]
fn nonsense_ends_its_connection_and_no_other() {
    for (op, len) in [(0, 0), (8, 0), (0xffff, 0), (Op::Rw as u16, 1 << 31)] {
        let mut machine = Machine::new();
        let (mut victim, one) = machine.connect(1);
        let (mut other, two) = machine.connect(2);
        let header = Header {
            op,
            len,
            ..one.header(Op::Rw)
        };

        machine.send_raw(header, b"x");
        machine.send(two.header(Op::Rw), b"y");

        assert_eq!(machine.receive_ops(), [RST], "{op}");
        assert_eq!(read_to_end(&mut victim), b"");
        other.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn packets_that_do_not_fit_the_state_end_the_connection() {
    for op in [Op::Request, Op::Response] {
        let mut machine = Machine::new();
        let (mut client, peer) = machine.connect(1);
        machine.send(peer.header(op), &[]);
        assert_eq!(machine.receive_ops(), [RST]);
        assert_eq!(read_to_end(&mut client), b"");
    }
    let mut machine = Machine::new();
    let (_client, peer) = machine.connect(1);
    machine.send(peer.shutdown(SEND), &[]);
    machine.send(peer.header(Op::Rw), b"after the end");
    assert_eq!(machine.receive_ops(), [RST]);
}

#[test]
fn an_answer_to_a_request_that_was_not_given_yet_is_refused() {
    let mut machine = Machine::without_rooms(Vec::new());
    let mut client = machine.ask(7);
    let peer = Peer {
        guest_port: 7,
        host_port: FIRST_HOST_PORT,
    };
    machine.send(peer.header(Op::Response), &[]);
    assert_eq!(read_to_end(&mut client), b"");
}

#[test]
fn a_packet_of_another_kind_of_socket_is_reset_in_kind() {
    let mut machine = Machine::new();
    let (_client, peer) = machine.connect(1);
    let header = Header {
        kind: 2,
        ..peer.header(Op::Rw)
    };
    machine.send(header, b"x");
    let (reset, _) = machine.receive_one();
    assert_eq!((reset.op, reset.kind), (RST, 2));
    machine.send(peer.header(Op::CreditRequest), &[]);
    assert_eq!(machine.receive_ops(), [CREDIT_UPDATE]);
}

#[test]
fn a_flood_of_requests_waits_in_the_guest_and_not_in_the_host() {
    let mut machine = Machine::without_rooms(Vec::new());
    let mut taken = 0;
    for round in 0..6 {
        for i in 0..60 {
            let peer = Peer {
                guest_port: round * 60 + i,
                host_port: 80,
            };
            machine
                .rig
                .offer(TX, &[Buffer::Out(&peer.header(Op::Request).encode())]);
        }
        machine.rig.kick(TX).unwrap();
        machine.settle();
        let used = machine.rig.used(TX).len();
        taken += used;
        if used < 60 {
            break;
        }
    }
    assert!(taken < 300, "{taken}");
    assert!(machine.muxer().is_congested());

    let offered = 300;
    let mut resets = 0;
    machine.offer_rooms(32, ROOM);
    for _ in 0..20 {
        machine.settle();
        resets += machine.receive_ops().len();
        machine.rig.kick_if_wanted(RX).unwrap();
        machine.rig.used(TX);
    }
    assert_eq!(resets, offered);
}

#[test]
fn bad_buffers_stop_the_device() {
    let mut machine = Machine::without_rooms(Vec::new());
    machine.rig.offer(TX, &[Buffer::Out(&[0; 43])]);
    assert!(matches!(
        machine.rig.kick(TX),
        Err(Error::BadRequest { queue: TX, .. })
    ));

    let mut machine = Machine::without_rooms(Vec::new());
    let _client = machine.ask(1);
    machine.rig.offer(RX, &[Buffer::In(HEADER_BYTES)]);
    assert!(matches!(
        machine.rig.kick(RX),
        Err(Error::BadRequest { queue: RX, .. })
    ));

    let mut machine = Machine::without_rooms(Vec::new());
    machine.rig.offer(TX, &[Buffer::Out(&[0; 44])]);
    machine.rig.write_descriptor(TX, 0, 1 << 40, 44, 0, 0);
    assert!(machine.rig.kick(TX).is_err());
}

#[test]
fn programs_see_the_end_when_the_device_stops() {
    let mut machine = Machine::new();
    let (mut client, _) = machine.connect(1);
    machine.rig.offer(TX, &[Buffer::Out(&[0; 43])]);
    assert!(machine.rig.kick(TX).is_err());
    assert_eq!(read_to_end(&mut client), b"");
}

#[test]
fn a_header_may_lie_in_pieces() {
    let mut machine = Machine::without_rooms(Vec::new());
    let _client = machine.ask(1);
    let room = machine
        .rig
        .offer(RX, &[Buffer::In(1), Buffer::In(42), Buffer::In(9)]);
    machine.kick_rx();
    let bytes = machine.rig.written(&room);
    let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
    assert_eq!((header.op, header.dst_port), (Op::Request as u16, 1));

    let peer = Peer {
        guest_port: 1,
        host_port: header.src_port,
    };
    let answer = peer.header(Op::Response).encode();
    machine
        .rig
        .offer(TX, &[Buffer::Out(&answer[..3]), Buffer::Out(&answer[3..])]);
    machine.rig.kick(TX).unwrap();
    let mut line = [0; 14];
    (&_client).read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 1073741824\n");
}

#[test]
fn programs_beyond_the_limit_wait_for_room() {
    let mut machine = Machine::new();
    machine.muxer().limit = 2;
    let (first, _) = machine.connect(1);
    let _second = machine.connect(2);
    let mut third = UnixStream::connect(machine.path()).unwrap();
    third.write_all(b"CONNECT 3\n").unwrap();
    machine.settle();
    assert!(machine.receive_ops().is_empty());

    drop(first);
    machine.settle();

    assert_eq!(machine.receive_ops(), [SHUTDOWN, Op::Request as u16]);
}

/// Streams through a connection, in both directions at once, with as many kicks as the device asks
/// for and no more.
#[test]
fn a_long_stream_loses_no_byte_and_no_wake_up() {
    const BYTES: usize = 8 << 20;
    let mut machine = Machine::new();
    let (client, peer) = machine.connect(1);
    client.set_nonblocking(true).unwrap();
    let pattern = |at: usize| (at % 251) as u8;
    let blank = vec![0; HEADER_BYTES + 65_536];
    let packets: Vec<Chain> = (0..8)
        .map(|_| machine.rig.offer(TX, &[Buffer::Out(&blank)]))
        .collect();
    machine.rig.kick_if_wanted(TX).unwrap();
    machine.settle();
    machine.rig.used(TX);
    machine.receive();

    let (mut up, mut down, mut written, mut read) = (0_usize, 0_usize, 0, 0);
    let (mut told, mut fwd_cnt, mut idle) = (0, 0, 0);
    let mut buffer = vec![0; 100_000];
    while down < BYTES || read < BYTES {
        let before = (written, down, up, read);
        // The program of the host.
        let next: Vec<u8> = (written..BYTES.min(written + 50_000))
            .map(pattern)
            .collect();
        written += (&client).write(&next).unwrap_or(0);
        if let Ok(count) = (&client).read(&mut buffer) {
            assert!((0..count).all(|i| buffer[i] == pattern(read + i)));
            read += count;
        }
        machine.settle();
        // The guest.
        for (header, data) in machine.receive() {
            fwd_cnt = header.fwd_cnt as usize;
            assert!(
                data.iter()
                    .enumerate()
                    .all(|(i, &b)| b == pattern(down + i))
            );
            down += data.len();
        }
        let mut offered = 0;
        for chain in &packets {
            let free = BUF_ALLOC as usize - (up - fwd_cnt);
            let len = free.min(65_536).min(BYTES - up);
            if len == 0 && down - told < 60_000 {
                break;
            }
            told = down;
            let data: Vec<u8> = (up..up + len).map(pattern).collect();
            let header = Header {
                fwd_cnt: down as u32,
                len: len as u32,
                ..peer.header(Op::Rw)
            };
            machine
                .rig
                .rewrite(chain, &[&header.encode(), data.as_slice()].concat());
            machine.rig.offer_again(TX, chain);
            up += len;
            offered += 1;
        }
        machine.rig.kick_if_wanted(RX).unwrap();
        machine.rig.kick_if_wanted(TX).unwrap();
        machine.settle();
        assert_eq!(machine.rig.used(TX).len(), offered);

        idle = if before == (written, down, up, read) {
            idle + 1
        } else {
            0
        };
        assert!(idle < 3, "stands still at {before:?}");
    }
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    /// What happens to the device.
    #[derive(Debug, Clone)]
    enum Event {
        Packet(Header, usize),
        Client(u32),
        Write(usize, usize),
        Read(usize),
        Leave(usize),
        Rooms,
    }

    fn header() -> impl Strategy<Value = Header> {
        let ports = (0..3_u32, 0..6_u32);
        let cids = prop_oneof![9 => Just((u64::from(CID), HOST_CID)), 1 => any::<(u64, u64)>()];
        let op = prop_oneof![4 => Just(5_u16), 4 => 1..8_u16, 1 => any::<u16>()];
        let kind = prop_oneof![9 => Just(TYPE_STREAM), 1 => any::<u16>()];
        let credit = (
            prop_oneof![Just(0), Just(GUEST_BUFFER), any::<u32>()],
            any::<u32>(),
        );
        (ports, cids, op, kind, any::<u32>(), credit, 0..70_000_u32).prop_map(
            |((guest, host), (src_cid, dst_cid), op, kind, flags, (buf_alloc, fwd_cnt), len)| {
                Header {
                    src_cid,
                    dst_cid,
                    src_port: guest,
                    dst_port: if host == 5 {
                        1024
                    } else {
                        FIRST_HOST_PORT + host
                    },
                    len: if op == 5 { len } else { 0 },
                    kind,
                    op,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                }
            },
        )
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            8 => (header(), 0..70_000_usize).prop_map(|(header, len)| Event::Packet(header, len)),
            3 => (0..3_u32).prop_map(Event::Client),
            2 => (0..4_usize, 1..100_000_usize).prop_map(|(i, len)| Event::Write(i, len)),
            2 => (0..4_usize).prop_map(Event::Read),
            1 => (0..4_usize).prop_map(Event::Leave),
            3 => Just(Event::Rooms),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_guest_and_no_program_bring_the_device_down(
            events in proptest::collection::vec(event(), 1..60),
        ) {
            let (_ours, theirs) = UnixStream::pair().unwrap();
            let mut machine = Machine::without_rooms(vec![(1024, theirs)]);
            let mut clients = Vec::new();
            for event in events {
                match event {
                    Event::Packet(header, len) => {
                        let data = vec![7; len];
                        machine.rig.offer(TX, &[Buffer::Out(&header.encode()), Buffer::Out(&data)]);
                        machine.rig.kick_if_wanted(TX).unwrap();
                    }
                    Event::Client(port) => clients.push(machine.ask(port)),
                    Event::Write(i, len) => {
                        if let Some(client) = clients.get_mut(i) {
                            client.set_nonblocking(true).unwrap();
                            let _ = client.write(&vec![1; len]);
                        }
                    }
                    Event::Read(i) => {
                        if let Some(client) = clients.get_mut(i) {
                            client.set_nonblocking(true).unwrap();
                            let _ = client.read(&mut [0; 50_000]);
                        }
                    }
                    Event::Leave(i) if i < clients.len() => drop(clients.remove(i)),
                    Event::Leave(_) => {}
                    Event::Rooms => {
                        machine.receive();
                        if machine.rooms.len() < 32 {
                            machine.offer_rooms(8, ROOM);
                        }
                        machine.rig.kick_if_wanted(RX).unwrap();
                    }
                }
                machine.settle();
                machine.rig.used(TX);
                prop_assert!(machine.muxer().kept_bytes() <= 5 * BUF_ALLOC as usize);
            }
        }
    }
}
