//! Questions to a name server of the host's side, and answers, as they follow each other on a stream
//! to the guest's port for them.

/// How a question came, and is to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// On a connection.
    Tcp,
}

/// What stands before a question or answer on the stream: which it is, and how long.
///
/// ```
/// use protocol::{Lookup, Transport};
/// let header = Lookup { id: 7, transport: Transport::Udp, length: 29 };
/// assert_eq!(Lookup::from_bytes(header.to_bytes()), Some(header));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lookup {
    /// The asker's number for the question, which its answer bears, too.
    pub id: u16,
    /// How it is asked.
    pub transport: Transport,
    /// Bytes of the message that follows (RFC 1035, section 4).
    pub length: u16,
}

impl Lookup {
    /// Bytes of a header.
    pub const LEN: usize = 5;
    /// The most questions without an answer.
    pub const MOST: usize = 64;

    /// The header as it is written.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let [id, length] = [self.id, self.length].map(u16::to_be_bytes);
        let transport = match self.transport {
            Transport::Udp => 0,
            Transport::Tcp => 1,
        };
        [id[0], id[1], transport, length[0], length[1]]
    }

    /// Reads a header; nothing if it is none.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Option<Self> {
        let [id0, id1, transport, length0, length1] = bytes;
        Some(Self {
            id: u16::from_be_bytes([id0, id1]),
            transport: match transport {
                0 => Transport::Udp,
                1 => Transport::Tcp,
                _ => return None,
            },
            length: u16::from_be_bytes([length0, length1]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_is_written() {
        for transport in [Transport::Udp, Transport::Tcp] {
            let header = Lookup {
                id: 0x1234,
                transport,
                length: 65535,
            };
            assert_eq!(Lookup::from_bytes(header.to_bytes()), Some(header));
        }
    }

    #[test]
    fn another_transport_is_no_header() {
        assert_eq!(Lookup::from_bytes([0, 0, 2, 0, 0]), None);
    }
}
