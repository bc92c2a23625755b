//! The header before each packet (`struct virtio_net_hdr`, virtio 1.2, section
//! 5.1.6), as the guest writes it.
//!
//! What passes here goes to the tap instead of what the guest wrote: the
//! guest cannot change it after it was looked at.

use super::features;

/// Length of the header, which always has the field `num_buffers`.
pub const HEADER_BYTES: usize = 12;
/// Where `num_buffers` is.
pub const NUM_BUFFERS: usize = 10;
/// A frame has at least both addresses and a type.
pub const MIN_FRAME: usize = 14;
/// The longest frame: 64 KiB of IP with both addresses, a type and a VLAN's tag.
pub const MAX_FRAME: usize = 65_535 + MIN_FRAME + 4;
/// The longest packet: header and frame.
pub const MAX_PACKET: usize = HEADER_BYTES + MAX_FRAME;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_ECN`
const GSO_ECN: u8 = 0x80;

/// What is left to do for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Where the checksum that is missing goes.
    pub checksum: Option<Checksum>,
    /// How the frame is to be cut.
    pub segments: Option<Segments>,
}

/// A checksum to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum {
    /// Where the bytes begin that it is of.
    pub start: u16,
    /// Where it goes, from there.
    pub offset: u16,
}

/// A frame that is many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    /// `VIRTIO_NET_HDR_GSO_*`, with or without ECN.
    kind: u8,
    /// How long the headers are, for what it is worth.
    header_len: u16,
    /// How much of the rest each segment carries.
    size: u16,
}

/// Why a packet is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bad {
    /// Too short or too long.
    Length,
    /// A checksum that was not agreed on or lies outside.
    Checksum,
    /// Segments that were not agreed on or make no sense.
    Segments,
}

impl Header {
    /// Reads the header of a frame of `frame_len` bytes, sent under `features`. Flags that are
    /// not the driver's to set are ignored (virtio 1.2, section 5.1.6.2.2).
    ///
    /// # Errors
    /// When it asks for what was not agreed on or speaks of bytes outside of the frame.
    pub fn parse(bytes: &[u8; HEADER_BYTES], features: u64, frame_len: usize) -> Result<Self, Bad> {
        if !(MIN_FRAME..=MAX_FRAME).contains(&frame_len) {
            return Err(Bad::Length);
        }
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let checksum = (bytes[0] & NEEDS_CSUM != 0).then(|| Checksum {
            start: short(6),
            offset: short(8),
        });
        if let Some(Checksum { start, offset }) = checksum {
            let end = usize::from(start) + usize::from(offset) + 2;
            if features & features::CSUM == 0 || end > frame_len {
                return Err(Bad::Checksum);
            }
        }
        let segments = match bytes[1] {
            0 => None,
            kind => Some(Segments {
                kind,
                header_len: short(2).min(u16::try_from(frame_len).unwrap_or(u16::MAX)),
                size: short(4),
            }),
        };
        if let Some(segments) = segments {
            let agreed = features & segments.needed_features() == segments.needed_features();
            if !agreed || segments.size == 0 || checksum.is_none() {
                return Err(Bad::Segments);
            }
        }
        Ok(Self { checksum, segments })
    }

    /// The header as the tap takes it.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        if let Some(Checksum { start, offset }) = self.checksum {
            bytes[0] = NEEDS_CSUM;
            bytes[6..8].copy_from_slice(&start.to_le_bytes());
            bytes[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        if let Some(segments) = self.segments {
            bytes[1] = segments.kind;
            bytes[2..4].copy_from_slice(&segments.header_len.to_le_bytes());
            bytes[4..6].copy_from_slice(&segments.size.to_le_bytes());
        }
        bytes
    }
}

impl Segments {
    /// What must have been agreed on; of an unknown kind what never is.
    fn needed_features(self) -> u64 {
        let kind = match self.kind & !GSO_ECN {
            1 => features::HOST_TSO4,
            4 => features::HOST_TSO6,
            5 => features::HOST_USO,
            _ => u64::MAX,
        };
        match self.kind & GSO_ECN {
            0 => kind,
            _ => kind | features::HOST_ECN,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = u64::MAX >> 1;

    fn tcp4() -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..10].copy_from_slice(&[1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
        bytes
    }

    #[test]
    fn a_segmented_packet_passes_as_it_is() {
        let header = Header::parse(&tcp4(), ALL, 9000).unwrap();
        assert_eq!(header.encode(), tcp4());
    }

    #[test]
    fn what_was_not_agreed_on_is_refused() {
        let bad = |without: u64, length| Header::parse(&tcp4(), ALL & !without, length);
        assert_eq!(bad(features::CSUM, 9000), Err(Bad::Checksum));
        assert_eq!(bad(features::HOST_TSO4, 9000), Err(Bad::Segments));
        assert_eq!(bad(0, 51), Err(Bad::Checksum));
        assert_eq!(bad(0, 13), Err(Bad::Length));
        assert_eq!(bad(0, MAX_FRAME + 1), Err(Bad::Length));
    }

    #[test]
    fn segments_need_a_size_a_kind_and_a_checksum() {
        for (at, value) in [(0, 0), (1, 3), (1, 0x80), (4, 0)] {
            let mut bytes = tcp4();
            bytes[5] = 0;
            bytes[at] = value;
            assert_eq!(Header::parse(&bytes, ALL, 9000), Err(Bad::Segments));
        }
    }

    #[test]
    fn flags_of_the_device_are_not_taken_from_the_driver() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = 0xfe;
        bytes[10] = 7;
        let header = Header::parse(&bytes, ALL, 60).unwrap();
        assert_eq!(header.encode(), [0; HEADER_BYTES]);
    }

    proptest! {
        #[test]
        fn a_header_that_passes_stays_within_its_frame(
            bytes: [u8; HEADER_BYTES], features: u64, length in 0..MAX_FRAME + 9,
        ) {
            if let Ok(header) = Header::parse(&bytes, features, length) {
                let again = header.encode();
                prop_assert_eq!(Header::parse(&again, features, length), Ok(header));
                if let Some(Checksum { start, offset }) = header.checksum {
                    prop_assert!(usize::from(start) + usize::from(offset) + 2 <= length);
                }
                if let Some(segments) = header.segments {
                    prop_assert!(usize::from(segments.header_len) <= length && segments.size > 0);
                }
            }
        }
    }
}
