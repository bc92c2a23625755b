//! A disk request's header and ranges, as a guest may write them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::blk::request::{Data, HEADER_BYTES, Limits, Request, SECTOR_BYTES, parse, ranges};

fuzz_target!(|input: (&[u8], u64, u64, u64, bool)| {
    let (bytes, sectors, readable, writable, read_only) = input;
    let limits = Limits { sectors, read_only };
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let end = u128::from(sectors) * u128::from(SECTOR_BYTES);
    match parse(header, Data { readable, writable }, limits) {
        Ok(Request::Read { offset }) => assert!(u128::from(offset) + u128::from(writable) <= end),
        Ok(Request::Write { offset }) => {
            assert!(!read_only && u128::from(offset) + u128::from(readable) <= end);
        }
        Ok(request @ (Request::Discard | Request::WriteZeroes)) => {
            for extent in ranges(rest, &request, limits).unwrap_or_default() {
                assert!(!read_only && u128::from(extent.bytes.end) <= end);
            }
        }
        Ok(Request::Flush | Request::GetId) | Err(_) => {}
    }
});
