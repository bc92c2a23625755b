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

#[test]
fn a_reader_that_has_enough_ends_the_command_quietly() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    for args in [&["features"][..], &["--version"], &["list"]] {
        let root = tempfile::tempdir().expect("a directory");
        let output = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .arg("--root")
            .arg(root.path())
            .args(args)
            .stdout(writer.try_clone().expect("another"))
            .output()
            .expect("starts");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(141), "{args:?}: {text}");
        assert_eq!(text, "", "{args:?}");
    }
}

#[test]
fn what_a_virtual_machine_cannot_do_is_refused_with_the_reason() {
    let bundle = bundle(CONFIG);
    let path = bundle.path().to_string_lossy();
    for verb in ["checkpoint", "restore"] {
        assert!(refusal(&[verb, "web"]).contains("checkpoint and restore are not supported"));
    }
    for verb in ["create", "run"] {
        let line = refusal(&[verb, "--bundle", &path, "--preserve-fds", "2", "web"]);
        assert!(line.contains("--preserve-fds 2 is not possible"), "{line}");
    }
}

#[test]
fn flags_that_mean_nothing_here_are_taken_before_and_after_the_name() {
    for args in [
        &["--rootless", "true", "--criu", "/usr/sbin/criu", "create"][..],
        &[
            "create",
            "--no-pivot",
            "--no-new-keyring",
            "--preserve-fds",
            "0",
        ],
        &["run", "--no-pivot", "--no-new-keyring", "--no-subreaper"],
    ] {
        let name_last = [args, &["--bundle", "/nonexistent/1", "web"]].concat();
        let name_first = [args, &["web", "--bundle", "/nonexistent/1"]].concat();
        for args in [name_last, name_first] {
            let line = refusal(&args);
            assert!(line.contains("/nonexistent/1"), "{args:?}: {line}");
        }
    }
}

#[test]
fn version_and_features_are_told_as_clients_read_them() {
    let version = bulkhead(&["--version"]).stdout;
    let version = String::from_utf8_lossy(&version);
    let lines: Vec<&str> = version.lines().collect();
    assert!(lines[0].starts_with("bulkhead version "), "{version}");
    assert!(lines[1].starts_with("commit: "), "{version}");
    assert!(lines[2].starts_with("spec: 1."), "{version}");

    let features = bulkhead(&["features"]).stdout;
    let features: serde_json::Value = serde_json::from_slice(&features).expect("JSON");
    let told = |pointer: &str, what: &str| {
        let list = features.pointer(pointer).and_then(|list| list.as_array());
        list.is_some_and(|list| list.iter().any(|one| one == what))
    };
    assert!(told("/hooks", "createContainer"), "{features}");
    assert!(told("/mountOptions", "tmpcopyup"), "{features}");
    assert!(told("/linux/namespaces", "time"), "{features}");
    assert!(told("/linux/seccomp/archs", "SCMP_ARCH_X86"), "{features}");
    assert_eq!(features["ociVersionMax"], "1.3.0", "{features}");
    assert!(!told("/mountOptions", "copy-symlink"), "{features}");
    assert!(
        !told("/linux/seccomp/actions", "SCMP_ACT_NOTIFY"),
        "{features}"
    );
    assert_eq!(features["linux"]["cgroup"]["v1"], false, "{features}");
    assert_eq!(
        features["linux"]["apparmor"]["enabled"], false,
        "{features}"
    );
}
