//! What KVM itself counts: its binary statistics (Linux
//! `Documentation/virt/kvm/api.rst`, `KVM_GET_STATS_FD`). They hold the exits
//! that never leave the kernel, such as page faults, CPUID and MSR accesses.

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::FileExt};

const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;
/// Names and numbers of a few hundred statistics fit.
const MAX_BYTES: usize = 1 << 20;
const MAX_DESCRIPTORS: usize = 1024;

/// The statistics of one vCPU or VM.
pub struct Statistics {
    file: File,
    /// Name and place of each number.
    fields: Vec<(String, u64)>,
}

impl Statistics {
    /// Reads the names; the numbers are read by [`Statistics::read`].
    ///
    /// # Errors
    /// When the descriptor is not one of statistics.
    pub fn new(file: File) -> io::Result<Self> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let malformed = || io::Error::other("kvm's statistics are malformed");
        let header = Header::parse(&header).ok_or_else(malformed)?;
        let mut descriptors = vec![0; header.descriptors_bytes()];
        file.read_exact_at(&mut descriptors, header.descriptors_offset)?;
        let fields = header.fields(&descriptors);
        Ok(Self { file, fields })
    }

    /// All numbers by their names; of histograms the first.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn read(&self) -> io::Result<BTreeMap<String, u64>> {
        let mut numbers = BTreeMap::new();
        for (name, offset) in &self.fields {
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, *offset)?;
            numbers.insert(name.clone(), u64::from_le_bytes(bytes));
        }
        Ok(numbers)
    }
}

/// `struct kvm_stats_header`.
struct Header {
    name_bytes: usize,
    count: usize,
    descriptors_offset: u64,
    data_offset: u64,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let header = Self {
            name_bytes: word(4) as usize,
            count: word(8) as usize,
            descriptors_offset: u64::from(word(16)),
            data_offset: u64::from(word(20)),
        };
        let sane = header.count <= MAX_DESCRIPTORS
            && header.name_bytes <= 256
            && header.descriptors_bytes() <= MAX_BYTES;
        sane.then_some(header)
    }

    fn descriptors_bytes(&self) -> usize {
        self.count * (DESCRIPTOR_BYTES + self.name_bytes)
    }

    /// Name and place of each number, from `struct kvm_stats_desc`.
    fn fields(&self, descriptors: &[u8]) -> Vec<(String, u64)> {
        descriptors
            .chunks_exact(DESCRIPTOR_BYTES + self.name_bytes)
            .map(|descriptor| {
                let offset = u32::from_le_bytes(std::array::from_fn(|i| descriptor[8 + i]));
                let name = &descriptor[DESCRIPTOR_BYTES..];
                let end = name
                    .iter()
                    .position(|byte| *byte == 0)
                    .unwrap_or(name.len());
                let name = String::from_utf8_lossy(&name[..end]).into_owned();
                (name, self.data_offset + u64::from(offset))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// One number called "exits" with value 7, as KVM lays it out.
    fn file() -> File {
        let mut bytes = Vec::new();
        for word in [0u32, 8, 1, 0, 24, 48] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(b"exits\0\0\0");
        bytes.extend_from_slice(&7u64.to_le_bytes());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn numbers_are_found_by_their_names() {
        let numbers = Statistics::new(file()).unwrap().read().unwrap();
        assert_eq!(numbers, BTreeMap::from([("exits".to_owned(), 7)]));
    }

    #[test]
    fn a_header_that_promises_too_much_is_refused() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Header::parse(&bytes).is_none());
    }
}
