//! What an agent that is owned by its guest answers, and what the shim makes of it for others.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protobuf::Message;
use protocol::{
    Hello, Lookup,
    agent::{ContainerStatsResponse, ListProcessesResponse},
};
use shim::{oci::told, task::metrics::metrics};

fuzz_target!(|input: &[u8]| {
    if let Ok(counters) = ContainerStatsResponse::parse_from_bytes(input) {
        assert!(!metrics(&counters).type_url.is_empty());
        assert!(told::stats(&counters).is_object());
    }
    if let Ok(list) = ListProcessesResponse::parse_from_bytes(input) {
        for process in told::processes(&list).as_array().expect("a list") {
            let command = process["command"].as_str().expect("text");
            assert!(!command.chars().any(char::is_control));
        }
    }
    if let Some(bytes) = input.first_chunk() {
        let _ = Hello::from_bytes(bytes);
    }
    if let Some(bytes) = input.first_chunk()
        && let Some(header) = Lookup::from_bytes(*bytes)
    {
        assert_eq!(&header.to_bytes(), bytes);
    }
});
