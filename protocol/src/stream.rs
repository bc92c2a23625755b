//! The name of one standard stream, the first eight bytes on its vsock stream.

/// Names one standard stream of one process. The host draws it at random, so
/// that no process of the guest can guess another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamId(pub u64);

impl StreamId {
    /// Bytes on the wire.
    pub const LEN: usize = 8;

    /// The wire form: little endian.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        self.0.to_le_bytes()
    }

    /// Reads the wire form; 0 names no stream.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Option<Self> {
        match u64::from_le_bytes(bytes) {
            0 => None,
            id => Some(Self(id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_the_wire() {
        let id = StreamId(0x0102_0304_0506_0708);
        assert_eq!(StreamId::from_bytes(id.to_bytes()), Some(id));
    }

    #[test]
    fn zero_names_no_stream() {
        assert_eq!(StreamId::from_bytes([0; 8]), None);
    }
}
