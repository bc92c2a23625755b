//! The console with a hostile guest.
#![no_main]

use std::{fs::File, io::Write};

use libfuzzer_sys::fuzz_target;
use vmm::virtio::console::Console;
use vmm_fuzz::{Step, drive};

fuzz_target!(|steps: Vec<Step>| {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    writer.write_all(b"input").expect("room");
    let output = File::options().write(true).open("/dev/null");
    let output = output.expect("/dev/null");
    let device = Console::new(output, Some(reader.into())).expect("a device");
    drive(device, &steps);
});
