//! The entropy device with a hostile guest.
#![no_main]

use std::fs::File;

use libfuzzer_sys::fuzz_target;
use vmm::virtio::rng::Rng;
use vmm_fuzz::{Step, drive};

fuzz_target!(|steps: Vec<Step>| {
    let source = File::open("/dev/zero").expect("/dev/zero");
    drive(Rng::new(source), &steps);
});
