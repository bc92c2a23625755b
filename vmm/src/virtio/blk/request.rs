//! A request to a disk as the guest wrote it, made into a value (virtio 1.2,
//! section 5.2.6).
//!
//! ```text
//!   device reads            device writes
//!   ┌──────┬──────────┬────────┬──────┬─────────────────────┬────────┐
//!   │ type │ reserved │ sector │ data │ data                │ status │
//!   │ le32 │ le32     │ le64   │ ...  │ ...                 │ u8     │
//!   └──────┴──────────┴────────┴──────┴─────────────────────┴────────┘
//! ```

use std::ops::Range;

/// The unit of sectors and of every transfer, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of type, reserved and sector.
pub const HEADER_BYTES: usize = 16;
/// Bytes of the answer to [`Request::GetId`].
pub const ID_BYTES: usize = 20;
/// Bytes of one range to discard or zero.
pub const RANGE_BYTES: usize = 16;
/// How many ranges one request may have.
pub const MAX_RANGES: usize = 16;
/// The longest range, in sectors: 1 GiB, so that one request does not hold up all others.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`
const FLAG_UNMAP: u32 = 1;

/// What the last byte of a request says when it is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = 2,
}

/// What the disk allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The disk's size.
    pub sectors: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// The bytes of a request beside header and status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    /// Bytes for the device to read.
    pub readable: u64,
    /// Room for the device to write.
    pub writable: u64,
}

/// A request that may be done. Offsets and lengths are in bytes and lie within the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Fill all the room with what is at the offset.
    Read {
        /// Where on the disk.
        offset: u64,
    },
    /// Write all the data to the offset.
    Write {
        /// Where on the disk.
        offset: u64,
    },
    /// Make everything written so far outlast a crash of the host.
    Flush,
    /// Write the disk's serial number.
    GetId,
    /// Give ranges up; the data holds them, see [`ranges`].
    Discard,
    /// Zero ranges; the data holds them, see [`ranges`].
    WriteZeroes,
}

/// A range to discard or zero, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Where on the disk.
    pub bytes: Range<u64>,
    /// Whether the space may be given back.
    pub unmap: bool,
}

/// Makes a header into a request.
///
/// # Errors
/// With what to answer: [`Status::Unsupported`] for types not known, [`Status::IoError`] for
/// what lies outside of the disk, is no whole number of sectors or changes a read-only disk.
pub fn parse(header: &[u8; HEADER_BYTES], data: Data, limits: Limits) -> Result<Request, Status> {
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(*sector);
    match u32::from_le_bytes([*t0, *t1, *t2, *t3]) {
        T_IN => Ok(Request::Read {
            offset: offset(sector, data.writable, limits)?,
        }),
        T_OUT => {
            may_write(limits)?;
            Ok(Request::Write {
                offset: offset(sector, data.readable, limits)?,
            })
        }
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD => may_write(limits).map(|()| Request::Discard),
        T_WRITE_ZEROES => may_write(limits).map(|()| Request::WriteZeroes),
        _ => Err(Status::Unsupported),
    }
}

/// Makes the data of [`Request::Discard`] or [`Request::WriteZeroes`] into ranges.
///
/// # Errors
/// With what to answer: [`Status::IoError`] for data that is no 1 to [`MAX_RANGES`] ranges or
/// for a range outside of the disk or too long, [`Status::Unsupported`] for flags not known.
pub fn ranges(data: &[u8], request: &Request, limits: Limits) -> Result<Vec<Extent>, Status> {
    let (ranges, rest) = data.as_chunks::<RANGE_BYTES>();
    if ranges.is_empty() || ranges.len() > MAX_RANGES || !rest.is_empty() {
        return Err(Status::IoError);
    }
    ranges
        .iter()
        .map(|range| {
            let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = range;
            let sector = u64::from_le_bytes(*sector);
            let count = u32::from_le_bytes([*c0, *c1, *c2, *c3]);
            let flags = u32::from_le_bytes([*f0, *f1, *f2, *f3]);
            let allowed = match request {
                Request::WriteZeroes => FLAG_UNMAP,
                _ => 0,
            };
            if flags & !allowed != 0 {
                return Err(Status::Unsupported);
            }
            if count > MAX_RANGE_SECTORS {
                return Err(Status::IoError);
            }
            let len = u64::from(count) * SECTOR_BYTES;
            let start = offset(sector, len, limits)?;
            Ok(Extent {
                bytes: start..start + len,
                unmap: *request == Request::Discard || flags & FLAG_UNMAP != 0,
            })
        })
        .collect()
}

fn may_write(limits: Limits) -> Result<(), Status> {
    if limits.read_only {
        return Err(Status::IoError);
    }
    Ok(())
}

/// The offset of a sector, if `len` bytes from it on are whole sectors of the disk.
fn offset(sector: u64, len: u64, limits: Limits) -> Result<u64, Status> {
    let end = sector
        .checked_add(len / SECTOR_BYTES)
        .ok_or(Status::IoError)?;
    if !len.is_multiple_of(SECTOR_BYTES) || end > limits.sectors {
        return Err(Status::IoError);
    }
    sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        sectors: 2048,
        read_only: false,
    };

    fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    }

    #[test]
    fn a_discard_of_no_whole_range_is_an_io_error() {
        for len in [0, 1, 15, 17, 31] {
            assert_eq!(
                ranges(&vec![0; len], &Request::Discard, LIMITS),
                Err(Status::IoError)
            );
        }
        let many = range(0, 1, 0).repeat(MAX_RANGES + 1);
        assert_eq!(
            ranges(&many, &Request::Discard, LIMITS),
            Err(Status::IoError)
        );
    }

    #[test]
    fn unmap_is_a_flag_of_write_zeroes_only() {
        let data = range(8, 8, 1);
        assert_eq!(
            ranges(&data, &Request::Discard, LIMITS),
            Err(Status::Unsupported)
        );
        assert_eq!(
            ranges(&data, &Request::WriteZeroes, LIMITS),
            Ok(vec![Extent {
                bytes: 4096..8192,
                unmap: true
            }])
        );
        assert_eq!(
            ranges(&range(8, 8, 2), &Request::WriteZeroes, LIMITS),
            Err(Status::Unsupported)
        );
    }

    proptest! {
        #[test]
        fn every_request_that_passes_lies_within_the_disk(
            header in any::<[u8; HEADER_BYTES]>(),
            kind in 0u32..16,
            sector in prop_oneof![0u64..4096, any::<u64>()],
            readable in 0u64..(1 << 22),
            writable in 0u64..(1 << 22),
            sectors in prop_oneof![0u64..4096, any::<u64>()],
            read_only: bool,
        ) {
            let mut header = header;
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            let limits = Limits { sectors, read_only };
            let size = u128::from(sectors) * u128::from(SECTOR_BYTES);
            match parse(&header, Data { readable, writable }, limits) {
                Ok(Request::Read { offset }) => {
                    prop_assert!(u128::from(offset) + u128::from(writable) <= size);
                }
                Ok(Request::Write { offset }) => {
                    prop_assert!(!read_only);
                    prop_assert!(u128::from(offset) + u128::from(readable) <= size);
                }
                Ok(Request::Discard | Request::WriteZeroes) => prop_assert!(!read_only),
                Ok(Request::Flush | Request::GetId) => {}
                Err(status) => prop_assert_ne!(status, Status::Ok),
            }
        }

        #[test]
        fn every_range_that_passes_lies_within_the_disk(
            data in proptest::collection::vec(prop_oneof![4 => Just(0u8), 1 => any::<u8>()], 0..300),
            sectors in 0u64..100_000,
        ) {
            let limits = Limits { sectors, read_only: false };
            for request in [Request::Discard, Request::WriteZeroes] {
                for extent in ranges(&data, &request, limits).unwrap_or_default() {
                    prop_assert!(extent.bytes.start <= extent.bytes.end);
                    prop_assert!(extent.bytes.end <= sectors * SECTOR_BYTES);
                }
            }
        }
    }
}
