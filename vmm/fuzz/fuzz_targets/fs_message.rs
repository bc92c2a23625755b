//! The head of a FUSE message and the names in it, as a guest may write them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::fs::request::{Lengths, MAX_BYTES, Message, REPLY_BYTES, check_name, parse};

fuzz_target!(|input: (&[u8], usize, usize)| {
    let (bytes, readable, writable) = input;
    let message = parse(bytes, Lengths { readable, writable });
    if message.is_ok() {
        assert!(readable <= MAX_BYTES && writable <= MAX_BYTES);
    }
    if let Ok(Message::Answered { .. }) = message {
        assert!(writable >= REPLY_BYTES);
    }
    if check_name(bytes).is_ok() {
        assert!(!bytes.contains(&b'/') && bytes != b"." && bytes != b"..");
    }
});
