//! Any bytes are statistics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::balloon::statistics::Statistics;

fuzz_target!(|bytes: &[u8]| {
    Statistics::parse(bytes);
});
