use proptest::prelude::*;
use protobuf::MessageField;

use super::*;
use crate::{
    id::{ContainerId, Namespace},
    task::proto::bootstrap::{Extension, RuncOptions},
};

fn invocation() -> Invocation {
    Invocation {
        namespace: Namespace::parse("k8s.io").expect("a name"),
        id: ContainerId::parse("pod1").expect("a name"),
        address: "/run/c.sock".to_owned(),
        bundle: None,
        debug: false,
    }
}

fn environment(max_shim_version: Option<&str>) -> Environment {
    Environment {
        max_shim_version: max_shim_version.map(str::to_owned),
        ttrpc_address: Some("/run/c.sock.ttrpc".to_owned()),
    }
}

fn read(input: &[u8], max_shim_version: Option<&str>) -> Result<Bootstrap, Error> {
    Bootstrap::read(input, &invocation(), &environment(max_shim_version))
}

fn systemd_options() -> Any {
    let options = RuncOptions {
        systemd_cgroup: true,
        ..Default::default()
    };
    Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value: options.write_to_bytes().expect("written"),
        ..Default::default()
    }
}

/// What containerd 2.4 was seen to write.
fn recorded() -> BootstrapParams {
    BootstrapParams {
        instance_id: "pod1".to_owned(),
        namespace: "k8s.io".to_owned(),
        log_level: -4,
        containerd_version: "2.4.0-beta+unknown".to_owned(),
        containerd_ttrpc_address: "/run/other.sock.ttrpc".to_owned(),
        containerd_grpc_address: "/run/other.sock".to_owned(),
        containerd_binary: "/usr/bin/containerd".to_owned(),
        socket_dir: "/run/elsewhere/s".to_owned(),
        ..Default::default()
    }
}

#[test]
fn containerd_1_6_gets_the_address_and_nothing_else() {
    let bootstrap = read(b"", None).expect("understood");
    assert_eq!(bootstrap.dialect, Dialect::Address);
    assert_eq!(bootstrap.answer("unix:///run/s/1"), b"unix:///run/s/1");
    assert_eq!(bootstrap.events_address, "/run/c.sock.ttrpc");
    assert_eq!(bootstrap.sockets, PathBuf::from("/run/containerd/s"));
}

#[test]
fn containerd_1_7_and_2_get_json_with_a_version_that_they_know() {
    for (max, version) in [("2", 2), ("3", 3), ("9", 3)] {
        let answer = read(b"", Some(max))
            .expect("understood")
            .answer("unix:///s");
        let answer: serde_json::Value = serde_json::from_slice(&answer).expect("json");
        assert_eq!(
            answer,
            json!({"version": version, "address": "unix:///s", "protocol": "ttrpc"})
        );
    }
}

#[test]
fn containerd_2_3_speaks_protobuf() {
    let input = recorded().write_to_bytes().expect("written");
    let bootstrap = read(&input, Some("2")).expect("understood");
    assert_eq!(bootstrap.dialect, Dialect::Protobuf);
    assert!(bootstrap.debug);
    assert_eq!(bootstrap.events_address, "/run/other.sock.ttrpc");
    assert_eq!(bootstrap.sockets, PathBuf::from("/run/elsewhere/s"));
    // Field 1 is the number 3, then come two texts.
    let answer = bootstrap.answer("unix:///s");
    assert_eq!(answer, b"\x08\x03\x12\x09unix:///s\x1a\x05ttrpc");
}

#[test]
fn options_come_as_an_any_or_as_an_extension() {
    let any = systemd_options();
    let input = any.write_to_bytes().expect("written");
    let bootstrap = read(&input, None).expect("understood");
    assert!(bootstrap.options.systemd_cgroup);
    assert_eq!(bootstrap.dialect, Dialect::Address);

    let mut params = recorded();
    params.extensions.push(Extension {
        value: MessageField::some(any),
        ..Default::default()
    });
    let input = params.write_to_bytes().expect("written");
    let bootstrap = read(&input, None).expect("understood");
    assert!(bootstrap.options.systemd_cgroup);
}

#[test]
fn another_containers_parameters_are_none() {
    let mut params = recorded();
    params.instance_id = "pod2".to_owned();
    let input = params.write_to_bytes().expect("written");
    assert!(matches!(read(&input, None), Err(Error::Options(_))));
}

#[test]
fn other_input_is_refused_by_its_length() {
    let error = read(b"\xff\xff\xff", None).expect_err("refused");
    assert!(error.to_string().contains("3 bytes"), "{error}");
}

proptest! {
    #[test]
    fn no_input_panics(input in prop::collection::vec(any::<u8>(), 0..200), max in ".{0,4}") {
        let _ = read(&input, Some(&max));
    }

    #[test]
    fn parameters_cut_short_are_never_taken_for_others(cut in 0usize..100) {
        let input = recorded().write_to_bytes().expect("written");
        let cut = cut.min(input.len());
        if let Ok(bootstrap) = read(&input[..cut], None) {
            prop_assert!(cut == 0 || bootstrap.dialect == Dialect::Protobuf);
        }
    }
}
