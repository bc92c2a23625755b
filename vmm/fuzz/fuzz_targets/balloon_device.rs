//! The balloon with a hostile guest, whose rings may be among the pages that it gives.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::balloon::Balloon;
use vmm_fuzz::{Step, drive};

fuzz_target!(|steps: Vec<Step>| {
    drive(Balloon::new(1).expect("a device"), &steps);
});
