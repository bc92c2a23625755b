//! A FUSE message and the names in it, as a guest may write them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::fs::{
    operation::decode,
    request::{HEADER_BYTES, Lengths, MAX_BYTES, REPLY_BYTES, check_name, parse},
};

fuzz_target!(|input: (&[u8], usize, usize)| {
    let (bytes, readable, writable) = input;
    if let Ok(message) = parse(bytes, Lengths { readable, writable }) {
        assert!(readable <= MAX_BYTES && writable <= MAX_BYTES);
        assert!(message.body + HEADER_BYTES <= readable);
        assert!(message.unique.is_none() || writable >= REPLY_BYTES);
        let _ = decode(message.opcode, &bytes[HEADER_BYTES..]);
    }
    if check_name(bytes).is_ok() {
        assert!(!bytes.contains(&b'/') && bytes != b"." && bytes != b"..");
    }
});
