//! The agent's first words: 32 bytes on [`READY_PORT`](crate::READY_PORT).

/// Sent once by the agent when it serves its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// The agent's [`VERSION`](crate::VERSION).
    pub version: u32,
    /// The guest's clock in nanoseconds since its boot when the agent's `main` began.
    pub main_ns: u64,
    /// The same clock when the agent's ports were open.
    pub ready_ns: u64,
}

/// Why bytes are no [`Hello`].
#[derive(Debug, PartialEq, Eq)]
pub enum HelloError {
    /// The first eight bytes are not the agent's mark.
    NotAnAgent,
    /// The agent speaks another version of the contract.
    Version(u32),
}

impl std::fmt::Display for HelloError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotAnAgent => f.write_str("the guest's first bytes are not an agent's"),
            Self::Version(version) => write!(
                f,
                "the agent speaks protocol version {version}, this host {}; use the guest image that came with this bulkhead",
                crate::VERSION
            ),
        }
    }
}

impl std::error::Error for HelloError {}

const MARK: [u8; 8] = *b"bulkhead";

impl Hello {
    /// Bytes on the wire: mark, version, zero, `main_ns`, `ready_ns`; little endian.
    pub const LEN: usize = 32;

    /// The wire form.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&MARK);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.main_ns.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.ready_ns.to_le_bytes());
        bytes
    }

    /// Reads the wire form.
    ///
    /// # Errors
    /// When the mark is missing or the version is not ours.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Result<Self, HelloError> {
        if bytes[..8] != MARK {
            return Err(HelloError::NotAnAgent);
        }
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let version = (u64_at(8) & 0xffff_ffff) as u32;
        if version != crate::VERSION {
            return Err(HelloError::Version(version));
        }
        Ok(Self {
            version,
            main_ns: u64_at(16),
            ready_ns: u64_at(24),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_survives_the_wire() {
        let hello = Hello {
            version: crate::VERSION,
            main_ns: 7,
            ready_ns: u64::MAX,
        };
        assert_eq!(Hello::from_bytes(&hello.to_bytes()), Ok(hello));
    }

    #[test]
    fn other_first_bytes_are_refused() {
        assert_eq!(
            Hello::from_bytes(&[0; Hello::LEN]),
            Err(HelloError::NotAnAgent)
        );
    }

    #[test]
    fn another_version_is_refused_by_its_number() {
        let hello = Hello {
            version: 9,
            main_ns: 0,
            ready_ns: 0,
        };
        assert_eq!(
            Hello::from_bytes(&hello.to_bytes()),
            Err(HelloError::Version(9))
        );
    }
}
