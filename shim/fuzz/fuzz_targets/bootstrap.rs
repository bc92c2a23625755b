//! What containerd writes to the standard input of `start` and `-info`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shim::{
    id::{ContainerId, Namespace},
    task::{
        arguments::Invocation,
        bootstrap::{Bootstrap, Environment},
        info::info,
    },
};

fuzz_target!(|input: &[u8]| {
    let invocation = Invocation {
        namespace: Namespace::parse("k8s.io").expect("a name"),
        id: ContainerId::parse("pod").expect("a name"),
        address: "/run/containerd/containerd.sock".to_owned(),
        bundle: None,
        debug: false,
    };
    for max_shim_version in [None, Some("2".to_owned())] {
        let environment = Environment {
            max_shim_version,
            ttrpc_address: None,
        };
        if let Ok(bootstrap) = Bootstrap::read(input, &invocation, &environment) {
            assert!(bootstrap.sockets.is_absolute());
            assert!(!bootstrap.answer("unix:///s").is_empty());
        }
    }
    let _ = info(input);
});
