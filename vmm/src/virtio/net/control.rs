//! Commands of the driver (virtio 1.2, section 5.1.6.5): how many pairs of
//! queues it uses.

/// The longest command that is understood.
pub const COMMAND_BYTES: usize = 4;

/// `VIRTIO_NET_OK`
pub const OK: u8 = 0;
/// `VIRTIO_NET_ERR`
pub const ERR: u8 = 1;

/// `VIRTIO_NET_CTRL_MQ`, `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`
const SET_PAIRS: [u8; 2] = [4, 0];

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// To use the first so many pairs of queues.
    SetPairs(usize),
}

impl Command {
    /// Reads a command for a device with `max_pairs`; nothing that the device cannot do.
    pub fn parse(bytes: &[u8], max_pairs: usize) -> Option<Self> {
        let (class, pairs) = bytes.split_first_chunk::<2>()?;
        let pairs = usize::from(u16::from_le_bytes(pairs.try_into().ok()?));
        (*class == SET_PAIRS && (1..=max_pairs).contains(&pairs)).then_some(Self::SetPairs(pairs))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_driver_sets_the_number_of_pairs() {
        assert_eq!(Command::parse(&[4, 0, 2, 0], 2), Some(Command::SetPairs(2)));
        for bytes in [
            &[4, 0, 3, 0][..],
            &[4, 0, 0, 0],
            &[4, 1, 1, 0],
            &[0, 0, 1, 0],
            &[4, 0, 1],
        ] {
            assert_eq!(Command::parse(bytes, 2), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_command_asks_for_more_than_there_is(
            bytes in proptest::collection::vec(any::<u8>(), 0..6), max in 1..9_usize,
        ) {
            if let Some(Command::SetPairs(pairs)) = Command::parse(&bytes, max) {
                prop_assert!((1..=max).contains(&pairs));
            }
        }
    }
}
