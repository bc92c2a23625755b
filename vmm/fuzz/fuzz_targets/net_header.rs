//! A packet's header and a command of the driver, as a guest may write them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::net::{control::Command, header::Header};

fuzz_target!(|input: ([u8; 12], u64, usize, &[u8])| {
    let (bytes, features, frame_len, command) = input;
    if let Ok(header) = Header::parse(&bytes, features, frame_len) {
        assert_eq!(Header::parse(&header.encode(), features, frame_len), Ok(header));
        if let Some(checksum) = header.checksum {
            assert!(usize::from(checksum.start) + usize::from(checksum.offset) + 2 <= frame_len);
        }
    }
    if let Some(Command::SetPairs(pairs)) = Command::parse(command, 8) {
        assert!((1..=8).contains(&pairs));
    }
});
