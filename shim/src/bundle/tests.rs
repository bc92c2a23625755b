//! Bundles as they come.

use serde_json::json;

use super::*;

/// A bundle whose configuration `runc spec` could have written, changed by `change`.
fn bundle(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let mut config = json!({
        "ociVersion": "1.0.2-dev",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts"}
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "mount"}]}
    });
    change(&mut config);
    let directory = tempfile::tempdir().expect("a directory");
    for place in ["rootfs/proc", "rootfs/dev"] {
        fs::create_dir_all(directory.path().join(place)).expect("made");
    }
    fs::write(directory.path().join("config.json"), config.to_string()).expect("written");
    directory
}

fn refused(change: impl FnOnce(&mut Value)) -> String {
    let directory = bundle(change);
    crate::text::chain(&Bundle::load(directory.path()).expect_err("refused"))
}

#[test]
fn a_bundle_of_other_tools_is_taken() {
    let directory = bundle(|_| {});
    let bundle = Bundle::load(directory.path()).expect("loaded");
    assert!(!bundle.terminal());
    assert_eq!(bundle.given().read_only, ReadOnly::All);
}

#[test]
fn a_read_only_root_that_lacks_a_mount_point_is_given_writable() {
    let directory = bundle(|config| config["mounts"][0]["destination"] = json!("/absent"));
    let bundle = Bundle::load(directory.path()).expect("loaded");
    assert_eq!(bundle.given().read_only, ReadOnly::No);
}

#[test]
fn a_bundle_that_is_not_there_is_named() {
    let error = Bundle::load(Path::new("/nonexistent/b")).expect_err("refused");
    assert!(error.to_string().contains("/nonexistent/b"), "{error}");
}

#[test]
fn a_bundle_without_a_configuration_says_how_to_make_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let error = Bundle::load(directory.path()).expect_err("refused");
    assert!(
        error.to_string().contains("config.json not found"),
        "{error}"
    );
}

#[test]
fn an_unparsable_configuration_is_refused_with_its_line() {
    let directory = bundle(|_| {});
    fs::write(directory.path().join("config.json"), "{\n\"root\": \n").expect("written");
    let error = Bundle::load(directory.path()).expect_err("refused");
    assert!(error.to_string().contains("line 3"), "{error}");
}

#[test]
fn another_version_is_refused_by_its_number() {
    let error = refused(|config| config["ociVersion"] = json!("2.0.0"));
    assert!(error.contains("ociVersion \"2.0.0\""), "{error}");
    let error = refused(|config| config["ociVersion"] = Value::Null);
    assert!(error.contains("no ociVersion"), "{error}");
}

#[test]
fn a_missing_root_file_system_is_named() {
    let error = refused(|config| config["root"]["path"] = json!("elsewhere"));
    assert!(
        error.contains("invalid rootfs") && error.contains("/elsewhere"),
        "{error}"
    );
    let error = refused(|config| config["root"]["path"] = json!("config.json"));
    assert!(error.contains("invalid rootfs"), "{error}");
}

#[test]
fn a_configuration_without_a_program_is_refused() {
    let error = refused(|config| config["process"]["args"] = json!([]));
    assert!(error.contains("no process.args"), "{error}");
    let error = refused(|config| config["process"] = Value::Null);
    assert!(error.contains("no process"), "{error}");
}

#[test]
fn what_needs_more_of_the_host_is_refused_by_name() {
    let error = refused(|config| {
        config["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid");
    });
    assert!(error.contains("path of the pid namespace"), "{error}");
    let error = refused(|config| config["linux"]["namespaces"] = json!([{"type": "pid"}]));
    assert!(error.contains("the host's network"), "{error}");
}
