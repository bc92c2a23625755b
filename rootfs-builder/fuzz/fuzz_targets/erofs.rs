//! A disk that somebody else wrote: whatever its bytes, looking something up in it ends.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use rootfs_builder::erofs::{Found, Image};

fuzz_target!(|input: &[u8]| {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(input).expect("written");
    let Ok(image) = Image::open(&file) else {
        return;
    };
    let _ = image.read_file("/etc/passwd", 1 << 20);
    if let Ok(root) = image.root() {
        look(&image, &root, 0);
    }
});

fn look(image: &Image<'_>, found: &Found, depth: usize) {
    let _ = image.xattrs(found);
    let _ = image.read(found, 1 << 20);
    if depth < 4
        && found.is_directory()
        && let Ok(names) = image.names(found)
    {
        for nid in names.into_values().take(16) {
            if let Ok(found) = image.inode(nid) {
                look(image, &found, depth + 1);
            }
        }
    }
}
