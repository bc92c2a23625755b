//! What files hold while an image is in the making: one nameless file, one piece after the other.
//!
//! Blocks of zeros take no room, so what unpacks to nothing but zeros fills no disk.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Pieces begin at a multiple of this.
const BLOCK_BYTES: usize = 4096;

/// What is read at once.
const CHUNK_BYTES: usize = 64 * BLOCK_BYTES;

/// Where a file's content lies in the spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first byte's place.
    pub offset: u64,
    /// How many there are.
    pub length: u64,
}

/// The file. It has no name: whatever happens, nothing is left of it.
#[derive(Debug)]
pub struct Spool {
    file: File,
    end: u64,
    buffer: Vec<u8>,
}

impl Spool {
    /// An empty one on the file system of `directory`.
    ///
    /// # Errors
    ///
    /// When no file can be made there.
    pub fn new(directory: &Path) -> io::Result<Self> {
        Ok(Self {
            file: tempfile::tempfile_in(directory)?,
            end: 0,
            buffer: vec![0; CHUNK_BYTES],
        })
    }

    /// Keeps all that `content` gives.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or there is no room.
    pub fn append(&mut self, mut content: impl Read) -> io::Result<Extent> {
        let offset = self.end;
        let mut length = 0;
        loop {
            let count = fill(&mut content, &mut self.buffer)?;
            for range in data(&self.buffer[..count]) {
                let at = offset + length + range.start as u64;
                self.file.write_all_at(&self.buffer[range], at)?;
            }
            length += count as u64;
            if count < self.buffer.len() {
                break;
            }
        }
        self.end = (offset + length).next_multiple_of(BLOCK_BYTES as u64);
        self.file.set_len(self.end)?;
        Ok(Extent { offset, length })
    }

    /// What was kept.
    #[must_use]
    pub fn read(&self, extent: Extent) -> impl Read + '_ {
        Piece::new(&self.file, extent)
    }
}

/// Whether there is nothing but zeros.
fn is_zero(bytes: &[u8]) -> bool {
    // Wide comparisons, which the compiler makes of this.
    bytes
        .chunks(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The parts of `bytes` that are more than blocks of zeros.
pub fn data(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let mut blocks = bytes[at..].chunks(BLOCK_BYTES);
        let start = at + blocks.by_ref().take_while(|block| is_zero(block)).count() * BLOCK_BYTES;
        if start >= bytes.len() {
            return None;
        }
        let blocks = bytes[start..].chunks(BLOCK_BYTES);
        let length = blocks.take_while(|block| !is_zero(block)).count() * BLOCK_BYTES;
        at = (start + length).min(bytes.len());
        Some(start..at)
    })
}

/// Reads until the buffer is full or the input ends.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while count < buffer.len() {
        match input.read(&mut buffer[count..]) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// A piece of a file, read without moving the file's own place.
pub(crate) struct Piece<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl<'a> Piece<'a> {
    pub(crate) fn new(file: &'a File, extent: Extent) -> Self {
        Self {
            file,
            at: extent.offset,
            left: extent.length,
        }
    }
}

impl Read for Piece<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let count = self.file.read_at(&mut buffer[..room], self.at)?;
        if count == 0 && room > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    fn read(spool: &Spool, extent: Extent) -> Vec<u8> {
        let mut bytes = Vec::new();
        spool.read(extent).read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn zeros_take_no_room() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(directory.path()).unwrap();
        let extent = spool.append(io::repeat(0).take(64 << 20)).unwrap();
        assert_eq!(extent.length, 64 << 20);
        assert!(spool.file.metadata().unwrap().blocks() * 512 < 1 << 20);
        assert!(is_zero(&read(&spool, extent)));
    }

    #[test]
    fn nothing_is_left_in_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(directory.path()).unwrap();
        spool.append(&b"content"[..]).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn data_is_what_is_between_blocks_of_zeros() {
        let mut bytes = vec![0; 6 * BLOCK_BYTES + 10];
        for at in [BLOCK_BYTES, 2 * BLOCK_BYTES + 7, 6 * BLOCK_BYTES + 9] {
            bytes[at] = 1;
        }
        let parts: Vec<_> = data(&bytes).collect();
        assert_eq!(parts, [4096..3 * 4096, 6 * 4096..6 * 4096 + 10]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_piece_is_read_as_it_was_kept(
            pieces in proptest::collection::vec((any::<u8>(), 0usize..20_000), 0..8),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let mut spool = Spool::new(directory.path()).unwrap();
            let kept: Vec<(Vec<u8>, Extent)> = pieces
                .into_iter()
                .map(|(byte, length)| {
                    let bytes = vec![byte; length];
                    let extent = spool.append(&bytes[..]).unwrap();
                    (bytes, extent)
                })
                .collect();
            for (bytes, extent) in kept {
                prop_assert_eq!(read(&spool, extent), bytes);
            }
        }
    }
}
