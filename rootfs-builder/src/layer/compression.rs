//! Layers unpacked: gzip, zstd or neither, told by their first bytes as others do it too, since
//! media types are not always right.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

/// What is read at once.
const BUFFER_BYTES: usize = 128 << 10;

/// A reader of what `input` holds, unpacked.
///
/// # Errors
///
/// When the first bytes cannot be read.
pub fn unpacked<'a>(input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut input = BufReader::with_capacity(BUFFER_BYTES, input);
    let first = input.fill_buf()?;
    if first.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(MultiGzDecoder::new(input)))
    } else if first.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Ok(Box::new(zstd::Decoder::with_buffer(input)?))
    } else {
        Ok(Box::new(input))
    }
}

/// A reader that fails where more is read than allowed.
pub struct Bounded<R> {
    input: R,
    left: u64,
    limit: u64,
}

impl<R: Read> Bounded<R> {
    /// Reads `input` up to `limit` bytes.
    pub fn new(input: R, limit: u64) -> Self {
        Self {
            input,
            left: limit,
            limit,
        }
    }
}

/// More came out than may.
#[derive(Debug, thiserror::Error)]
#[error("it unpacks to more than the {0} bytes that are allowed")]
pub struct TooMuch(pub u64);

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        match self.left.checked_sub(count as u64) {
            Some(left) => self.left = left,
            None => return Err(io::Error::other(TooMuch(self.limit))),
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn read(bytes: &[u8]) -> Vec<u8> {
        let mut content = Vec::new();
        unpacked(bytes).unwrap().read_to_end(&mut content).unwrap();
        content
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_form_is_told_by_its_first_bytes() {
        let content = b"what is in a layer".repeat(1000);
        assert_eq!(read(&content), content);
        assert_eq!(read(&gzip(&content)), content);
        assert_eq!(read(&zstd::encode_all(&content[..], 1).unwrap()), content);
        assert_eq!(read(b""), b"");
    }

    #[test]
    fn several_members_are_one_content() {
        let two = [gzip(b"one"), gzip(b"two")].concat();
        assert_eq!(read(&two), b"onetwo");
        let pack = |bytes| zstd::encode_all(bytes, 1).unwrap();
        assert_eq!(read(&[pack(&b"one"[..]), pack(b"two")].concat()), b"onetwo");
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let bomb = gzip(&vec![0; 10 << 20]);
        let mut bounded = Bounded::new(unpacked(&bomb[..]).unwrap(), 1 << 20);
        let error = io::copy(&mut bounded, &mut io::sink()).unwrap_err();
        assert!(error.to_string().contains("1048576 bytes"), "{error}");
    }
}
