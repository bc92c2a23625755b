//! What is read, what is refused.

use proptest::prelude::*;

use super::*;

const SMALL: &str = r#"{"ociVersion":"1.0.2","process":{"cwd":"/","args":["sh"]}"#;

fn with(rest: &str) -> Result<Spec, Error> {
    Spec::parse(format!("{SMALL}{rest}}}").as_bytes())
}

#[test]
fn a_small_configuration_is_read() {
    let spec = with(r#","hostname":"web","linux":{"maskedPaths":["/proc/kcore"]}"#).unwrap();
    assert_eq!(spec.hostname.as_deref(), Some("web"));
    assert_eq!(spec.linux.masked_paths.0, ["/proc/kcore"]);
}

#[test]
fn a_null_list_is_an_empty_one() {
    assert!(with(r#","mounts":null"#).unwrap().mounts.is_empty());
}

#[test]
fn unknown_properties_are_ignored() {
    assert!(with(r#","windows":{"layerFolders":[]},"x":1"#).is_ok());
}

#[test]
fn another_version_is_refused() {
    let error = Spec::parse(br#"{"ociVersion":"2.0.0"}"#).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"ociVersion "2.0.0" is not supported; 1.x is"#
    );
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    for (rest, field) in [
        (r#","linux":{"intelRdt":{}}"#, "linux.intelRdt"),
        (r#","linux":{"netDevices":{"eth1":{}}}"#, "linux.netDevices"),
        (r#","vm":{"kernel":{"path":"/x"}}"#, "vm"),
        (
            r#","linux":{"seccomp":{"listenerPath":"/run/x"}}"#,
            "linux.seccomp.listenerPath",
        ),
        (
            r#","linux":{"resources":{"network":{"classID":1}}}"#,
            "linux.resources.network",
        ),
        (
            r#","linux":{"resources":{"memory":{"disableOOMKiller":true}}}"#,
            "linux.resources.memory.disableOOMKiller",
        ),
        (
            r#","linux":{"resources":{"cpu":{"realtimeRuntime":1}}}"#,
            "linux.resources.cpu.realtimeRuntime",
        ),
        (
            r#","linux":{"resources":{"blockIO":{"leafWeight":10}}}"#,
            "linux.resources.blockIO.leafWeight",
        ),
        (
            r#","linux":{"resources":{"memory":{"swappiness":1}}}"#,
            "linux.resources.memory.swappiness",
        ),
    ] {
        let text = with(rest).unwrap_err().to_string();
        assert!(
            text.starts_with(&format!("{field} is not supported")),
            "{text}"
        );
    }
}

#[test]
fn a_process_without_arguments_is_refused() {
    let error = Process::parse(br#"{"cwd":"/"}"#).unwrap_err();
    assert_eq!(
        error.to_string(),
        "process.args is missing in the container's configuration"
    );
}

#[test]
fn a_relative_working_directory_is_refused() {
    assert!(Process::parse(br#"{"cwd":"tmp","args":["sh"]}"#).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(json in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Spec::parse(&json);
        let _ = Process::parse(&json);
    }
}
