//! SHA-256 digests, as images name their parts: `sha256:` and 64 hexadecimal digits.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The SHA-256 digest of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// Why a text is no digest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a digest: `sha256:` and 64 lower-case hexadecimal digits are")]
pub struct Error {
    text: String,
}

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The 32 bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 digits.
    #[must_use]
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bytes = || {
            let hex = text.strip_prefix("sha256:")?.as_bytes();
            let mut bytes = [0; 32];
            if hex.len() != 2 * bytes.len() {
                return None;
            }
            for (byte, pair) in bytes.iter_mut().zip(hex.chunks(2)) {
                *byte = digit(pair[0])? << 4 | digit(pair[1])?;
            }
            Some(bytes)
        };
        bytes().map(Self).ok_or_else(|| Error {
            text: text.chars().take(100).collect(),
        })
    }
}

fn digit(character: u8) -> Option<u8> {
    match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// Takes bytes piece by piece and tells their digest.
#[derive(Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// One that has taken nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all that was taken.
    #[must_use]
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// A reader that knows length and digest of what was read through it.
pub struct Hashing<R> {
    input: R,
    hasher: Hasher,
    length: u64,
}

impl<R: Read> Hashing<R> {
    /// Reads from `input`.
    pub fn new(input: R) -> Self {
        Self {
            input,
            hasher: Hasher::new(),
            length: 0,
        }
    }

    /// Length and digest of what was read.
    #[must_use]
    pub fn finish(self) -> (u64, Digest) {
        (self.length, self.hasher.finish())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.length += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_digest_of_nothing_is_the_known_one() {
        let known = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), known);
        assert_eq!(known.parse(), Ok(Digest::of(b"")));
    }

    #[test]
    fn other_texts_are_no_digests() {
        let short = "sha256:e3b0";
        let other = format!("sha512:{}", "0".repeat(64));
        let upper = format!("sha256:{}", "E".repeat(64));
        let path = format!("sha256:../{}", "0".repeat(61));
        for text in [short, &other, &upper, &path, ""] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_reader_tells_the_digest_of_what_went_through(
            bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut reader = Hashing::new(&bytes[..]);
            io::copy(&mut reader, &mut io::sink()).unwrap();
            prop_assert_eq!(reader.finish(), (bytes.len() as u64, Digest::of(&bytes)));
        }
    }
}
