//! Two layers of an image, packed or not: whatever they are, they are applied or refused within the
//! limits, and what is applied can be written and read back.
#![no_main]

use std::{env, io::Read};

use libfuzzer_sys::fuzz_target;
use rootfs_builder::{
    erofs,
    filesystem::{FileSystem, Spool},
    layer::{Bounded, Budget, Limits, apply, unpacked},
};

const LIMITS: Limits = Limits {
    unpacked_bytes: 4 << 20,
    entries: 2000,
    metadata_bytes: 1 << 20,
    steps: 100_000,
};

fuzz_target!(|input: &[u8]| {
    // The first byte says where the second layer begins.
    let Some((first, rest)) = input.split_first() else {
        return;
    };
    let (lower, upper) = rest.split_at(rest.len() * usize::from(*first) / 256);
    let mut filesystem = FileSystem::new();
    let mut spool = Spool::new(&env::temp_dir()).expect("a spool");
    let mut budget = Budget::new(LIMITS);
    for (number, layer) in [lower, upper].into_iter().enumerate() {
        let Ok(content) = unpacked(layer) else {
            return;
        };
        let mut content = Bounded::new(content, LIMITS.unpacked_bytes);
        let content = content.by_ref();
        if apply(&mut filesystem, &mut spool, &mut budget, content, number as u32).is_err() {
            return;
        }
    }
    let mut disk = tempfile::tempfile().expect("a file");
    erofs::write(&filesystem, &spool, [0; 16], &mut disk).expect("what was applied is written");
    let image = erofs::Image::open(&disk).expect("what was written is read");
    let root = image.root().expect("a root");
    assert!(root.is_directory());
    assert!(image.names(&root).is_ok());
});
