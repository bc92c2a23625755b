//! A shared directory with a hostile guest. What it makes, it makes in a directory of its own.
#![no_main]

use std::{fs::File, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use vmm::virtio::fs::{Fs, OwnFiles, Settings};
use vmm_fuzz::{Step, drive};

static SHARED: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a directory"));

fuzz_target!(|steps: Vec<Step>| {
    let directory = File::open(SHARED.path()).expect("a directory").into();
    let settings = Settings {
        tag: "fuzz".to_owned(),
        read_only: false,
    };
    let device = Fs::prepare(directory, settings, OwnFiles::IN_PROC);
    drive(device.expect("a device"), &steps);
});
