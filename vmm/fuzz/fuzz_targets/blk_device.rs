//! A disk with a hostile guest, whose rings may be among the buffers that are written.
#![no_main]

use std::fs::File;

use libfuzzer_sys::fuzz_target;
use vmm::virtio::blk::{Blk, Settings};
use vmm_fuzz::{Step, drive};

fuzz_target!(|steps: Vec<Step>| {
    drive(
        Blk::new(disk(), &Settings::default()).expect("a device"),
        &steps,
    );
});

/// Memory of 1 MiB that is a file.
fn disk() -> File {
    let name = c"disk";
    let memory = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let file = File::from(memory.expect("memory"));
    file.set_len(1 << 20).expect("room");
    file
}
