//! The first packet of a TCP connection to a loopback address: told from all
//! others by a program for the kernel, and read.

use std::net::{IpAddr, SocketAddr};

use netlink::Instruction;

/// What the packets that we send again are marked with, so that they pass.
pub(super) const MARK: u32 = 0x6268_6c6f;

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const IPV6_HEADER: usize = 40;
const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
/// Where the checksum is in the header of TCP.
const CHECKSUM: usize = 16;

/// The beginning of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Syn {
    /// Who connects.
    pub(super) from: SocketAddr,
    /// To what.
    pub(super) to: SocketAddr,
}

/// Reads the packet in an Ethernet frame and completes its checksum, which the kernel leaves open
/// on the loopback. Nothing if it is no such packet.
pub(super) fn read(frame: &mut [u8]) -> Option<Syn> {
    let kind = u16_at(frame, 12)?;
    let packet = frame.get_mut(ETHERNET..)?;
    let (from, to, header, end) = match kind {
        IPV4 => {
            let header = usize::from(*packet.first()? & 0xf) * 4;
            let from = <[u8; 4]>::try_from(packet.get(12..16)?).ok()?;
            let to = <[u8; 4]>::try_from(packet.get(16..20)?).ok()?;
            if packet[9] != TCP || header < 20 {
                return None;
            }
            let end = usize::from(u16_at(packet, 2)?);
            (IpAddr::from(from), IpAddr::from(to), header, end)
        }
        IPV6 => {
            let from = <[u8; 16]>::try_from(packet.get(8..24)?).ok()?;
            let to = <[u8; 16]>::try_from(packet.get(24..40)?).ok()?;
            if packet[6] != TCP {
                return None;
            }
            let end = IPV6_HEADER + usize::from(u16_at(packet, 4)?);
            (IpAddr::from(from), IpAddr::from(to), IPV6_HEADER, end)
        }
        _ => return None,
    };
    let segment = packet.get_mut(header..end)?;
    if segment.len() < TCP_HEADER || segment[13] & 0x12 != 2 || !to.is_loopback() {
        return None;
    }
    let syn = Syn {
        from: SocketAddr::new(from, u16_at(segment, 0)?),
        to: SocketAddr::new(to, u16_at(segment, 2)?),
    };
    segment[CHECKSUM..CHECKSUM + 2].fill(0);
    let sum = checksum(from, to, segment);
    segment[CHECKSUM..CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
    Some(syn)
}

/// The checksum of a segment whose own is zero.
fn checksum(from: IpAddr, to: IpAddr, segment: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        bytes
            .chunks(2)
            .map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)))
            .sum()
    };
    let address = |address: IpAddr| match address {
        IpAddr::V4(v4) => words(&v4.octets()),
        IpAddr::V6(v6) => words(&v6.octets()),
    };
    let mut sum =
        address(from) + address(to) + u64::from(TCP) + segment.len() as u64 + words(segment);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// The program that wants those packets which are not marked, as they come in.
pub(super) fn program() -> Vec<Instruction> {
    // `BPF_*` of linux/bpf_common.h
    const LOAD_WORD: u16 = 0x20;
    const LOAD_SHORT: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_BYTE_AT_X: u16 = 0x50;
    const LOAD_IP_HEADER_LEN: u16 = 0xb1;
    const AND: u16 = 0x54;
    const IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// `SKF_AD_OFF` and what lies there.
    const PACKET_TYPE: u32 = 0xffff_f000 + 4;
    const PACKET_MARK: u32 = 0xffff_f000 + 20;
    const OUTGOING: u32 = 4;

    let load = |code, value| Instruction {
        code,
        yes: 0,
        no: 0,
        value,
    };
    const LAST: u8 = 28;
    // each jump is from its own place to the two ends
    let unless = |at: u8, value| Instruction {
        code: IF_EQUAL,
        yes: 0,
        no: LAST - at - 1,
        value,
    };
    let if_not = |at: u8, value| Instruction {
        code: IF_EQUAL,
        yes: LAST - at - 1,
        no: 0,
        value,
    };
    let wanted_if = |at: u8, value| Instruction {
        code: IF_EQUAL,
        yes: LAST - at,
        no: LAST - at - 1,
        value,
    };
    vec![
        load(LOAD_WORD, PACKET_TYPE),
        if_not(1, OUTGOING),
        load(LOAD_WORD, PACKET_MARK),
        if_not(3, MARK),
        load(LOAD_SHORT, 12),
        Instruction {
            code: IF_EQUAL,
            yes: 0,
            no: 8,
            value: IPV4.into(),
        },
        load(LOAD_BYTE, 23),
        unless(7, TCP.into()),
        load(LOAD_BYTE, 30),
        unless(9, 127),
        load(LOAD_IP_HEADER_LEN, 14),
        load(LOAD_BYTE_AT_X, 14 + 13),
        load(AND, 0x12),
        wanted_if(13, 2),
        unless(14, IPV6.into()),
        load(LOAD_BYTE, 20),
        unless(16, TCP.into()),
        load(LOAD_WORD, 38),
        unless(18, 0),
        load(LOAD_WORD, 42),
        unless(20, 0),
        load(LOAD_WORD, 46),
        unless(22, 0),
        load(LOAD_WORD, 50),
        unless(24, 1),
        load(LOAD_BYTE, 14 + 40 + 13),
        load(AND, 0x12),
        wanted_if(27, 2),
        load(RETURN, 0),
        load(RETURN, u32::MAX),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A SYN from 127.0.0.1:40000 to 127.0.0.1:80 as it is on the wire.
    fn frame() -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend(IPV4.to_be_bytes());
        frame.extend([0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0]);
        frame.extend([127, 0, 0, 1, 127, 0, 0, 1]);
        frame.extend(40000_u16.to_be_bytes());
        frame.extend(80_u16.to_be_bytes());
        frame.extend([
            0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0xab, 0xcd, 0, 0,
        ]);
        frame
    }

    #[test]
    fn the_beginning_of_a_connection_is_read() {
        let mut frame = frame();
        let syn = read(&mut frame).unwrap();
        assert_eq!(syn.from, "127.0.0.1:40000".parse().unwrap());
        assert_eq!(syn.to, "127.0.0.1:80".parse().unwrap());
        // with its checksum in place the sum over a segment is zero
        let [from, to] = [syn.from.ip(), syn.to.ip()];
        assert_eq!(checksum(from, to, &frame[34..54]), 0);
    }

    #[test]
    fn other_packets_are_left_alone() {
        for (at, value) in [
            (47, 0x12),
            (47, 0x10),
            (23, 17),
            (30, 10),
            (12, 9),
            (14, 0x40),
        ] {
            let mut frame = frame();
            frame[at] = value;
            assert_eq!(read(&mut frame), None, "{at}");
        }
    }

    #[test]
    fn every_jump_of_the_program_stays_within() {
        let program = program();
        for (at, instruction) in program.iter().enumerate() {
            let farthest = at + 1 + usize::from(instruction.yes.max(instruction.no));
            assert!(farthest < program.len() || instruction.code == 6, "{at}");
        }
        assert_eq!(program[28].value, 0);
        assert_eq!(program[29].value, u32::MAX);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(mut bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = read(&mut bytes);
        }

        #[test]
        fn what_is_cut_off_is_no_packet(keep in 0..53_usize) {
            let mut frame = frame();
            prop_assert_eq!(read(&mut frame[..keep]), None);
        }
    }
}
