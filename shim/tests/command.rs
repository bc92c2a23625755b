//! The `bulkhead` command from outside, as far as it goes without a virtual
//! machine: its help texts, and what it refuses.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn bulkhead(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(args)
        .output()
        .expect("the command starts")
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// Compares with the golden file, or writes it where UPDATE_GOLDEN is set.
fn assert_golden(name: &str, text: &[u8]) {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(golden(name), text).expect("written");
    }
    let expected = fs::read_to_string(golden(name)).unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    assert!(
        text == expected,
        "{name} differs; if that is meant, run the tests with UPDATE_GOLDEN=1\n{text}"
    );
}

#[test]
fn the_help_texts_are_the_golden_ones() {
    assert_golden("help.txt", &bulkhead(&["--help"]).stdout);
    assert_golden("help-run.txt", &bulkhead(&["run", "--help"]).stdout);
    assert_golden("help-check.txt", &bulkhead(&["check", "--help"]).stdout);
    for command in ["pull", "images", "rmi", "prune"] {
        let help = bulkhead(&[command, "--help"]).stdout;
        assert_golden(&format!("help-{command}.txt"), &help);
    }
}

/// The one line with which `args` are refused.
fn refusal(args: &[&str]) -> String {
    let root = tempfile::tempdir().expect("a directory");
    let state = root.path().to_string_lossy().into_owned();
    let output = bulkhead(&[&["--root", &state][..], args].concat());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(output.stdout.is_empty());
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("bulkhead: "), "{text}");
    let left: Vec<_> = fs::read_dir(root.path().join("default"))
        .into_iter()
        .flatten()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    text
}

fn bundle(config: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    fs::create_dir(directory.path().join("rootfs")).expect("made");
    fs::write(directory.path().join("config.json"), config).expect("written");
    directory
}

const CONFIG: &str = r#"{"ociVersion": "1.0.2", "root": {"path": "rootfs"},
    "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
    "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}]}}"#;

#[test]
fn a_bad_name_is_refused_in_one_line() {
    assert!(refusal(&["run", "-b", ".", "a/b"]).contains("invalid container ID \"a/b\""));
    assert!(refusal(&["run", "--namespace", "a b", "x"]).contains("invalid"));
}

#[test]
fn a_wrong_command_line_is_a_failure_of_ours_and_help_is_none() {
    assert_eq!(bulkhead(&["run"]).status.code(), Some(125));
    assert_eq!(bulkhead(&["fly", "away"]).status.code(), Some(125));
    assert_eq!(bulkhead(&["run", "--help"]).status.code(), Some(0));
}

#[test]
fn a_flag_that_is_given_twice_has_its_last_value() {
    let line = refusal(&["run", "-b", "/nonexistent/1", "-b", "/nonexistent/2", "x"]);
    assert!(line.contains("/nonexistent/2"), "{line}");
}

#[test]
fn a_bad_bundle_is_refused_in_one_line() {
    assert!(refusal(&["run", "-b", "/nonexistent", "x"]).contains("/nonexistent"));
    let broken = bundle("{");
    let path = broken.path().to_string_lossy();
    assert!(refusal(&["run", "-b", &path, "x"]).contains("not a valid configuration"));
    let other = bundle(r#"{"ociVersion": "7"}"#);
    let path = other.path().to_string_lossy();
    assert!(refusal(&["run", "-b", &path, "x"]).contains("ociVersion \"7\""));
}

#[test]
fn a_size_that_no_machine_can_have_is_refused_in_one_line() {
    let bundle = bundle(CONFIG);
    let path = bundle.path().to_string_lossy();
    let with = |flag, value| refusal(&["run", "-b", &path, flag, value, "x"]);
    assert!(with("--memory", "0").contains("0 MiB of memory are too few"));
    assert!(with("--memory", "99999999999").contains("more than this host's"));
    assert!(with("--cpus", "0").contains("0 CPUs are not possible"));
}

#[test]
fn a_terminal_that_is_not_there_is_refused_in_one_line() {
    let bundle = bundle(&CONFIG.replace("\"cwd\"", "\"terminal\": true, \"cwd\""));
    let path = bundle.path().to_string_lossy().into_owned();
    // A session of its own has no terminal, whoever runs the tests.
    let program = env!("CARGO_BIN_EXE_bulkhead");
    let output = Command::new("setsid")
        .args(["--wait", program, "run", "-b", &path, "x"])
        .output()
        .expect("starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("there is no terminal here"), "{text}");
}

#[test]
fn an_error_is_in_the_log_as_callers_read_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = directory.path().join("log.json");
    let path = log.to_string_lossy();
    let output = bulkhead(&[
        "--log",
        &path,
        "--log-format",
        "json",
        "run",
        "-b",
        ".",
        "a/b",
    ]);
    assert_eq!(output.status.code(), Some(125));
    let line = fs::read_to_string(&log).expect("written");
    let record: serde_json::Value = serde_json::from_str(&line).expect("one record");
    assert_eq!(record["level"], "error");
    let message = record["msg"].as_str().expect("a message");
    assert!(message.contains("invalid container ID"), "{message}");
}
