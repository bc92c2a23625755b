//! Where a client wants a stream to go.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shim::task::stdio::Target;

fuzz_target!(|uri: &str| {
    if let Ok(Target::Fifo(path) | Target::File(path) | Target::Logger { program: path, .. }) =
        Target::parse(uri)
    {
        assert!(path.is_absolute());
    }
});
