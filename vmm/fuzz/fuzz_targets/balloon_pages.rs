//! Page numbers become ranges that do not overlap.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::balloon::pages::ranges;

fuzz_target!(|bytes: &[u8]| {
    let ranges = ranges(bytes);
    assert!(ranges.len() <= bytes.len() / 4);
    for pair in ranges.windows(2) {
        assert!(pair[0].end() < pair[1].start);
    }
});
