//! What `bulkhead-vmm` says and returns when it is given nonsense: one line,
//! and a status by which to tell whose fault it was.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    fs,
    process::{Command, Output},
};

/// The status for a configuration that is not valid.
const BAD_CONFIG: i32 = 2;
const FAILED: i32 = 1;

fn vmm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bulkhead-vmm"))
        .args(arguments)
        .output()
        .unwrap()
}

/// Runs it with a configuration file; its one line and its status.
fn run(config: &str) -> (String, Option<i32>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, config).unwrap();
    let output = vmm(&["--config", file.path().to_str().unwrap()]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("bulkhead-vmm: "), "{said}");
    (said, output.status.code())
}

/// A configuration that opens, with a kernel that is none and a KVM that is none.
fn with(more: &str) -> String {
    format!(
        r#"{{"boot":{{"kernel":{{"path":"/etc/passwd"}}}},"memory_mib":64,
            "kvm":{{"path":"/dev/null"}}{more}}}"#
    )
}

#[test]
fn the_help_text_is_the_golden_one() {
    let text = String::from_utf8(vmm(&["--help"]).stdout).unwrap();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/help.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(golden, &text).unwrap();
    }
    assert_eq!(
        text,
        fs::read_to_string(golden).unwrap_or_default(),
        "if that is meant, run the tests with UPDATE_GOLDEN=1"
    );
}

#[test]
fn what_is_no_configuration_is_told_so() {
    for bad in [
        "",
        "{",
        "[]",
        "null",
        "{\"boot\":1}",
        "\u{0}",
        &with(",\"what\":1"),
    ] {
        let (said, status) = run(bad);
        assert!(said.contains("the configuration is not valid"), "{said}");
        assert_eq!(status, Some(BAD_CONFIG), "{bad:?}");
    }
}

#[test]
fn what_cannot_be_opened_is_named() {
    let missing = r#","devices":[{"kind":"blk","disk":{"path":"/nonexistent"}}]"#;
    let (said, status) = run(&with(missing));
    assert!(
        said.contains("devices[0].disk /nonexistent: check that it exists"),
        "{said}"
    );
    assert_eq!(status, Some(FAILED));
}

#[test]
fn a_configuration_that_is_not_there_is_told_so() {
    let output = vmm(&["--config", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(BAD_CONFIG));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("cannot read the configuration from /nonexistent"),
        "{said}"
    );
}

#[test]
fn a_descriptor_that_was_not_passed_is_refused() {
    for number in ["0", "2", "99", "2147483647"] {
        let output = vmm(&["--config-fd", number]);
        assert_eq!(output.status.code(), Some(BAD_CONFIG), "{number}");
    }
}

#[test]
fn it_does_not_run_outside_of_a_jail() {
    // As someone might who thinks that the launcher is a detour.
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, with("")).unwrap();
    let output = Command::new("/bin/sh")
        .args(["-c", "exec \"$0\" --config-fd 3 3<\"$1\""])
        .arg(env!("CARGO_BIN_EXE_bulkhead-vmm"))
        .arg(file.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(FAILED));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("start it with --config or by vmm::launch"),
        "{said}"
    );
}

#[test]
fn what_fails_in_the_jail_is_told_outside() {
    let (said, status) = run(&with(""));
    assert!(said.contains("kvm refuses to create a vm"), "{said}");
    assert_eq!(status, Some(FAILED));
}
