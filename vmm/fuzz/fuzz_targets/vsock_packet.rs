//! Any header and any payload is a packet or a reason why not.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::vsock::packet::{HEADER_BYTES, Header, Message, parse};

fuzz_target!(|input: ([u8; 32], [u8; HEADER_BYTES - 32], u16, u32)| {
    let (start, end, payload, cid) = input;
    let mut bytes = [0; HEADER_BYTES];
    bytes[..32].copy_from_slice(&start);
    bytes[32..].copy_from_slice(&end);
    let header = Header::decode(&bytes);
    assert_eq!(header.encode(), bytes);
    if let Ok(packet) = parse(&header, usize::from(payload), cid)
        && let Message::Data(len) = packet.message
    {
        assert!(len <= u32::from(payload));
    }
});
