//! What the host writes first on a stream to the guest's forwarding port: where
//! in the guest the stream leads. The agent answers with one byte.

use std::net::{IpAddr, SocketAddr};

/// Where a stream leads: a loopback address and port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardTarget(pub SocketAddr);

impl ForwardTarget {
    /// Bytes of a target.
    pub const LEN: usize = 19;
    /// The agent's answer when the connection stands; any other is the errno why it does not.
    pub const CONNECTED: u8 = 0;

    /// The target as it is written.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        match self.0.ip() {
            IpAddr::V4(v4) => {
                bytes[0] = 4;
                bytes[1..5].copy_from_slice(&v4.octets());
            }
            IpAddr::V6(v6) => {
                bytes[0] = 6;
                bytes[1..17].copy_from_slice(&v6.octets());
            }
        }
        bytes[17..].copy_from_slice(&self.0.port().to_be_bytes());
        bytes
    }

    /// Reads a target; nothing if it is none.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Option<Self> {
        let (address, port) = bytes[1..].split_first_chunk::<16>()?;
        let port = u16::from_be_bytes(port.try_into().ok()?);
        let ip = match bytes[0] {
            4 => {
                let (v4, rest) = address.split_first_chunk::<4>()?;
                if rest.iter().any(|byte| *byte != 0) {
                    return None;
                }
                IpAddr::from(*v4)
            }
            6 => IpAddr::from(*address),
            _ => return None,
        };
        Some(Self(SocketAddr::new(ip, port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_read_as_it_is_written() {
        for text in ["127.0.0.1:8080", "[::1]:65535", "127.3.2.1:1"] {
            let target = ForwardTarget(text.parse().unwrap());
            assert_eq!(ForwardTarget::from_bytes(target.to_bytes()), Some(target));
        }
    }

    #[test]
    fn other_bytes_are_no_target() {
        let mut bytes = [0; ForwardTarget::LEN];
        assert_eq!(ForwardTarget::from_bytes(bytes), None);
        bytes[0] = 4;
        bytes[9] = 1;
        assert_eq!(ForwardTarget::from_bytes(bytes), None);
    }
}
