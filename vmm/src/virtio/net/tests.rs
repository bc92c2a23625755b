use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use vm_memory::Bytes;

use super::*;
use crate::virtio::testing::{Buffer, Rig};

const RX: usize = 0;
const TX: usize = 1;
const HEADER: [u8; 12] = [0; 12];

fn settings() -> Settings {
    Settings {
        mac: Mac([2, 0, 0, 0, 0, 1]),
        mtu: None,
        to_guest: Rate::default(),
        from_guest: Rate::default(),
    }
}

fn card(pairs: usize, settings: Settings) -> (Net, Vec<File>) {
    let (mut taps, mut cables) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let (ours, theirs) = cable();
        taps.push(Tap::packets(ours).unwrap());
        cables.push(theirs);
    }
    let abilities = tap::Abilities { udp_segments: true };
    (
        Net::new((taps, abilities), Vec::new(), settings).unwrap(),
        cables,
    )
}

/// Both ends of a cable; what is written at one end is read at the other, packet by packet.
fn cable() -> (OwnedFd, File) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    (ours, theirs.into())
}

fn send(mut cable: &File, frame_len: usize) {
    cable.write_all(&packet(&frame(frame_len))).unwrap();
}

fn rig() -> (Rig<Net>, File) {
    let (card, mut cables) = card(1, settings());
    (Rig::with_event_index(card), cables.remove(0))
}

fn packet(frame: &[u8]) -> Vec<u8> {
    [&HEADER[..], frame].concat()
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + len) as u8).collect()
}

fn received(cable: &File) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let mut bytes = vec![0; 70_000];
    let mut cable = cable;
    while let Ok(len @ 1..) = cable.read(&mut bytes) {
        packets.push(bytes[..len].to_vec());
    }
    packets
}

#[test]
fn a_packet_of_the_guest_reaches_the_host_from_all_its_pieces() {
    let (mut rig, cable) = rig();
    let frame = frame(300);
    let chain = rig.offer(
        TX,
        &[
            Buffer::Out(&HEADER[..5]),
            Buffer::Out(&[&HEADER[5..], &frame[..9]].concat()),
            Buffer::Out(&frame[9..]),
        ],
    );
    rig.kick(TX).unwrap();
    assert_eq!(received(&cable), [packet(&frame)]);
    assert_eq!(rig.used(TX), [(chain.head, 0)]);
    assert_eq!(rig.active.counters.bytes_from_guest.get(), 300);
}

#[test]
fn the_header_that_reaches_the_host_is_the_one_that_was_looked_at() {
    let (mut rig, cable) = rig();
    let mut header = HEADER;
    header[0] = 0x06;
    header[10] = 9;
    rig.offer(TX, &[Buffer::Out(&[&header[..], &frame(60)].concat())]);
    rig.kick(TX).unwrap();
    assert_eq!(received(&cable), [packet(&frame(60))]);
}

#[test]
fn a_bad_packet_is_dropped_and_the_next_one_sent() {
    let (mut rig, cable) = rig();
    let mut segments = HEADER;
    segments[1] = 1;
    rig.offer(TX, &[Buffer::Out(&[&segments[..], &frame(60)].concat())]);
    rig.offer(TX, &[Buffer::Out(&HEADER[..3])]);
    rig.offer(TX, &[Buffer::Out(&packet(&frame(13)))]);
    rig.offer(TX, &[Buffer::Out(&packet(&frame(60))), Buffer::In(60)]);
    let far = rig.offer(TX, &[Buffer::Out(&HEADER), Buffer::Out(&frame(60))]);
    rig.write_descriptor(TX, far.head + 1, u64::MAX - 32, 60, 0, 0);
    let long = rig.offer(TX, &[Buffer::Out(&HEADER), Buffer::Out(&frame(60))]);
    rig.write_descriptor(TX, long.head + 1, 0, u32::MAX, 0, 0);
    rig.offer(TX, &[Buffer::Out(&packet(&frame(61)))]);

    rig.kick(TX).unwrap();

    assert_eq!(received(&cable), [packet(&frame(61))]);
    assert_eq!(rig.used(TX).len(), 7);
    assert_eq!(rig.active.counters.dropped.get(), 6);
}

#[test]
fn packets_wait_until_the_host_takes_them() {
    let (mut rig, cable) = rig();
    // more than a socket keeps
    let packets: Vec<_> = (60_000..60_040).map(|len| packet(&frame(len))).collect();
    for packet in &packets {
        rig.offer(TX, &[Buffer::Out(packet)]);
    }
    rig.kick(TX).unwrap();
    let mut arrived = received(&cable);
    assert!(arrived.len() < packets.len());
    while arrived.len() < packets.len() {
        assert!(rig.poll(1000));
        arrived.extend(received(&cable));
    }
    assert_eq!(arrived, packets);
    assert_eq!(rig.used(TX).len(), packets.len());
}

#[test]
fn a_packet_for_the_guest_takes_as_many_buffers_as_it_needs() {
    let (mut rig, cable) = rig();
    let rooms: Vec<_> = (0..50)
        .map(|_| rig.offer(RX, &[Buffer::In(1536)]))
        .collect();
    rig.kick(RX).unwrap();
    send(&cable, 4000);
    send(&cable, 60);

    assert!(rig.poll(1000));

    let heads: Vec<_> = rooms.iter().map(|room| room.head).collect();
    let used = rig.used(RX);
    let lens = [1536, 1536, 4012 - 2 * 1536, 72];
    assert_eq!(used, heads.into_iter().zip(lens).collect::<Vec<_>>());
    let bytes: Vec<_> = rooms[..3]
        .iter()
        .flat_map(|room| rig.written(room))
        .collect();
    assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    assert_eq!(bytes[12..4012], frame(4000));
    assert_eq!(
        rig.written(&rooms[3])[..12],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
    assert_eq!(rig.written(&rooms[3])[12..72], frame(60));
    assert!(rig.interrupted(RX));
}

#[test]
fn while_more_of_the_guest_is_awaited_the_host_is_heard() {
    let (mut rig, cable) = rig();
    let room = rig.offer(RX, &[Buffer::In(2000)]);
    rig.kick(RX).unwrap();
    send(&cable, 60);
    rig.offer(TX, &[Buffer::Out(&packet(&frame(60)))]);
    rig.kick(TX).unwrap();
    assert_eq!(rig.used(RX), [(room.head, 72)]);
    assert_eq!(received(&cable), [packet(&frame(60))]);
}

#[test]
fn an_answer_is_awaited_on_the_queue_beside_the_one_of_the_question() {
    let (card, _cables) = card(2, settings());
    let rig = Rig::with_event_index(card);
    assert_eq!(rig.device.answered_on(0), Some(TX));
    assert_eq!(rig.device.answered_on(1), None, "the second pair rests");
    assert!(rig.device.awaits_more(TX, 1));
    assert!(!rig.device.awaits_more(RX, 1));
}

#[test]
fn a_packet_waits_for_buffers_and_is_not_cut() {
    let (mut rig, cable) = rig();
    send(&cable, 3000);
    rig.kick(RX).unwrap();
    assert!(!rig.poll(0), "nothing is read while there is no buffer");
    let first = rig.offer(RX, &[Buffer::In(2000)]);
    assert!(rig.kick_if_wanted(RX).unwrap());
    assert_eq!(rig.used(RX), []);
    let second = rig.offer(RX, &[Buffer::In(2000)]);
    assert!(rig.kick_if_wanted(RX).unwrap());
    assert_eq!(rig.used(RX), [(first.head, 2000), (second.head, 1012)]);
    let bytes = [rig.written(&first), rig.written(&second)].concat();
    assert_eq!(bytes[10..12], [2, 0]);
    assert_eq!(bytes[12..3012], frame(3000));
}

#[test]
fn a_packet_that_never_fits_is_dropped() {
    let (mut rig, cable) = rig();
    for _ in 0..64 {
        rig.offer(RX, &[Buffer::In(20)]);
    }
    rig.kick(RX).unwrap();
    send(&cable, 3000);
    send(&cable, 14);
    assert!(rig.poll(1000));
    assert_eq!(rig.active.counters.dropped.get(), 1);
    assert_eq!(rig.used(RX).len(), 2);
}

#[test]
fn a_receive_buffer_that_cannot_be_one_stops_the_card() {
    for (address, len, flags) in [(0, 64, 0), (u64::MAX - 64, 64, 2), (0, 11, 2)] {
        let (mut rig, _cable) = rig();
        let chain = rig.offer(RX, &[Buffer::In(64)]);
        rig.write_descriptor(RX, chain.head, address, len, flags, 0);
        assert!(matches!(
            rig.kick(RX),
            Err(Error::BadRequest { queue: RX, .. })
        ));
    }
}

#[test]
fn a_link_that_is_down_carries_nothing() {
    let (mut rig, cable) = rig();
    let room = rig.offer(RX, &[Buffer::In(2000)]);
    rig.kick(RX).unwrap();
    rig.device
        .set_link(Link::Down, Some(&mut rig.active))
        .unwrap();
    assert_eq!(rig.device.config_space()[6], 0);
    send(&cable, 60);
    rig.offer(TX, &[Buffer::Out(&packet(&frame(60)))]);
    rig.kick(TX).unwrap();
    assert!(!rig.poll(0));
    assert_eq!((received(&cable).len(), rig.used(TX).len()), (0, 1));

    rig.device
        .set_link(Link::Up, Some(&mut rig.active))
        .unwrap();
    assert_eq!(rig.device.config_space()[6], 1);
    assert!(rig.poll(1000));
    assert_eq!(rig.used(RX), [(room.head, 72)]);
}

#[test]
fn a_cable_that_is_cut_at_the_host_is_seen_in_the_guest() {
    let (mut rig, cable) = rig();
    rig.offer(RX, &[Buffer::In(2000)]);
    rig.kick(RX).unwrap();
    drop(cable);
    assert!(rig.poll(1000));
    assert_eq!(rig.device.config_space()[6], 0);
    assert!(!rig.poll(0), "it says so once");
}

#[test]
fn what_goes_beyond_a_limit_is_late_and_not_lost() {
    let limit = Rate {
        bytes: None,
        packets: Some(config::Bucket {
            per_second: 50,
            burst: 1,
        }),
    };
    let limited = Settings {
        to_guest: limit,
        from_guest: limit,
        ..settings()
    };
    let (card, mut cables) = card(1, limited);
    let (mut rig, cable) = (Rig::with_event_index(card), cables.remove(0));
    let start = Instant::now();
    for _ in 0..3 {
        rig.offer(RX, &[Buffer::In(2000)]);
        rig.offer(TX, &[Buffer::Out(&packet(&frame(60)))]);
        send(&cable, 60);
    }
    rig.kick(RX).unwrap();
    rig.kick(TX).unwrap();
    let (mut there, mut back) = (received(&cable).len(), rig.used(RX).len());
    while there < 3 || back < 3 {
        assert!(rig.poll(1000));
        there += received(&cable).len();
        back += rig.used(RX).len();
    }
    // at 50 a second, one of them at once and one on credit
    assert!(start.elapsed() >= Duration::from_millis(19));
}

#[test]
fn the_driver_sets_how_many_pairs_are_in_use() {
    let (card, cables) = card(2, settings());
    let mut rig = Rig::with_event_index(card);
    let room = rig.offer(2, &[Buffer::In(2000)]);
    rig.kick(2).unwrap();
    send(&cables[1], 60);
    assert!(!rig.poll(0), "the second pair rests at first");

    let command = rig.offer(
        4,
        &[Buffer::Out(&[4, 0]), Buffer::Out(&[2, 0]), Buffer::In(1)],
    );
    rig.kick(4).unwrap();
    assert_eq!(rig.used(4), [(command.head, 1)]);
    assert_eq!(rig.written(&command), [control::OK]);
    assert!(rig.poll(1000));
    assert_eq!(rig.used(2), [(room.head, 72)]);

    let command = rig.offer(4, &[Buffer::Out(&[4, 0, 3, 0]), Buffer::In(1)]);
    rig.kick(4).unwrap();
    assert_eq!(rig.written(&command), [control::ERR]);
}

#[test]
fn a_card_starts_anew_after_a_reset() {
    let (mut rig, cable) = rig();
    rig.offer(RX, &[Buffer::In(2000)]);
    rig.kick(RX).unwrap();
    rig.device.reset();
    send(&cable, 60);
    let mut rig = Rig::with_event_index(rig.device);
    let room = rig.offer(RX, &[Buffer::In(2000)]);
    rig.kick(RX).unwrap();
    assert_eq!(rig.used(RX), [(room.head, 72)]);
}

#[test]
fn the_configuration_says_address_link_pairs_and_longest_packet() {
    let with_mtu = Settings {
        mtu: Some(9000),
        ..settings()
    };
    let (card, _cables) = card(2, with_mtu);
    let expected = [2, 0, 0, 0, 0, 1, 1, 0, 2, 0, 0x28, 0x23];
    assert_eq!(card.config_space(), expected);
    assert_eq!(card.queue_sizes(), [256, 256, 256, 256, 16]);
    assert!(card.features() & features::MTU != 0);
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let new = |settings| {
        let (ours, _) = cable();
        let taps = vec![Tap::packets(ours).unwrap()];
        let abilities = tap::Abilities {
            udp_segments: false,
        };
        Net::new((taps, abilities), Vec::new(), settings).err()
    };
    let mut group = settings();
    group.mac.0[0] |= 1;
    assert!(matches!(new(group), Some(NewError::Mac(_))));
    let mut short = settings();
    short.mtu = Some(67);
    assert!(matches!(new(short), Some(NewError::Mtu(67))));
    let mut empty = settings();
    empty.to_guest.bytes = Some(config::Bucket {
        per_second: 0,
        burst: 1,
    });
    assert!(matches!(new(empty), Some(NewError::Bucket("to_guest"))));
}

#[test]
fn a_ring_index_out_of_bounds_stops_the_card() {
    let (mut rig, _cable) = rig();
    rig.active
        .memory
        .write_obj(1000_u16, vm_memory::GuestAddress(0x4000 + 0x1002))
        .unwrap();
    assert!(matches!(rig.kick(TX), Err(Error::Queue { queue: TX, .. })));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(256))]

    /// What a driver may do to its rings: the card answers, drops or stops, and does not panic.
    #[test]
    fn no_chain_of_descriptors_harms_the_card(
        chains in proptest::collection::vec(
            (
                0..5_usize,
                proptest::collection::vec(
                    (0..0x20_0000_u64, 0..70_000_u32, 0..4_u16, 0..64_u16), 1..6,
                ),
            ),
            1..24,
        ),
        lens in proptest::collection::vec(14..4000_usize, 0..24),
    ) {
        let (card, cables) = card(2, settings());
        let mut rig = Rig::with_event_index(card);
        let mut lens = lens.into_iter();
        for (queue, descriptors) in chains {
            if let Some(len) = lens.next() {
                send(&cables[0], len);
            }
            let whole: Vec<_> = descriptors.iter().map(|_| Buffer::In(64)).collect();
            let head = rig.offer(queue, &whole).head;
            for (slot, (address, len, flags, next)) in descriptors.into_iter().enumerate() {
                let slot = (head + slot as u16) % 64;
                // the rings themselves are left alone, so that the chain is one
                rig.write_descriptor(queue, slot, 0x10_0000 + address, len, flags, next);
            }
            let done = rig
                .kick(queue)
                .and_then(|()| rig.device.handle_source(0, Events::IN, &mut rig.active));
            if done.is_err() {
                break;
            }
            received(&cables[0]);
        }
    }
}
