//! A program's first line, in any pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::vsock::greeting::Line;

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let mut line = Line::default();
    for piece in pieces {
        match line.take(&piece) {
            Ok((taken, None)) => assert!(taken <= piece.len() && line.room() > 0),
            _ => return,
        }
    }
});
