//! Page numbers of the guest become ranges of its memory (virtio 1.2, section 5.5.6).

/// The unit of the driver's page numbers, whatever the guest's pages are.
pub const PAGE_BYTES: u64 = 4096;

/// The most page numbers in one request. Linux sends 256.
pub const MAX_PAGES: usize = 1024;

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Where they start in the guest's memory.
    pub start: u64,
    /// How many bytes they are.
    pub len: u64,
}

impl Range {
    /// The first byte after the range. Page numbers are 32 bits wide, so it cannot overflow.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Reads little-endian page numbers and joins consecutive ones. What is left at the end that is
/// not a whole number is ignored; a page that is named twice counts once.
///
/// ```
/// use vmm::virtio::balloon::pages::{Range, ranges};
/// let numbers = [7_u32, 9, 8, 100];
/// let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
/// assert_eq!(ranges(&bytes), [
///     Range { start: 7 * 4096, len: 3 * 4096 },
///     Range { start: 100 * 4096, len: 4096 },
/// ]);
/// ```
pub fn ranges(bytes: &[u8]) -> Vec<Range> {
    let mut numbers: Vec<u32> = bytes
        .chunks_exact(4)
        .map(|number| u32::from_le_bytes([number[0], number[1], number[2], number[3]]))
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut ranges: Vec<Range> = Vec::new();
    for number in numbers {
        let start = u64::from(number) * PAGE_BYTES;
        match ranges.last_mut() {
            Some(range) if range.end() == start => range.len += PAGE_BYTES,
            _ => ranges.push(Range {
                start,
                len: PAGE_BYTES,
            }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn half_a_page_number_is_ignored() {
        assert_eq!(ranges(&[1, 0, 0]), []);
    }

    proptest! {
        #[test]
        fn ranges_hold_each_named_page_and_no_other(
            numbers in proptest::collection::vec(prop_oneof![0..50_u32, any::<u32>()], 0..200),
        ) {
            let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            let ranges = ranges(&bytes);

            let total: u64 = ranges.iter().map(|range| range.len / PAGE_BYTES).sum();
            let mut distinct = numbers.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(total, distinct.len() as u64);
            for number in numbers {
                let at = u64::from(number) * PAGE_BYTES;
                prop_assert!(ranges.iter().any(|r| r.start <= at && at < r.end()));
            }
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].start));
        }
    }
}
