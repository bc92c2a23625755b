//! The documents of an image: indexes, manifests and configurations.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rootfs_builder::image::{
    Source,
    json::{Config, Document},
};

fuzz_target!(|input: &[u8]| {
    let _ = Document::parse(input);
    let _ = Config::parse(input);
    // An archive of documents.
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), input).expect("written");
    if let Ok(source) = Source::archive(file.path()) {
        let _ = source.oci_image(None);
        let _ = source.docker_image(None);
    }
});
