//! Holds the directions of dependencies between the crates (see `ARCHITECTURE.md`).

use std::collections::BTreeSet;

use serde_json::Value;

use crate::process::{cargo, output};
use crate::project::Project;

/// Each crate and the crates of ours that it may use. A new edge is a design decision.
const ALLOWED: [(&str, &[&str]); 8] = [
    ("protocol", &[]),
    ("netlink", &[]),
    ("vmm", &[]),
    ("rootfs-builder", &[]),
    ("agent", &["netlink", "protocol"]),
    ("shim", &["netlink", "protocol", "rootfs-builder", "vmm"]),
    (
        "system-tests",
        &[
            "agent",
            "netlink",
            "protocol",
            "rootfs-builder",
            "shim",
            "vmm",
        ],
    ),
    ("xtask", &["rootfs-builder"]),
];

fn metadata() -> Value {
    let project = Project::find().unwrap();
    let arguments = ["metadata", "--no-deps", "--format-version=1", "--offline"];
    let text = output(cargo().current_dir(project.root).args(arguments)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn names(list: &Value) -> BTreeSet<&str> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["name"].as_str().unwrap())
        .collect()
}

#[test]
fn every_crate_of_the_workspace_is_in_the_table() {
    let metadata = metadata();
    let known = ALLOWED.iter().map(|(name, _)| *name).collect();
    assert_eq!(names(&metadata["packages"]), known);
}

#[test]
fn no_crate_uses_one_that_it_may_not() {
    let metadata = metadata();
    let ours = names(&metadata["packages"]);
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let (_, allowed) = ALLOWED.iter().find(|(known, _)| *known == name).unwrap();
        for used in names(&package["dependencies"]).intersection(&ours) {
            assert!(allowed.contains(used), "{name} may not depend on {used}");
        }
    }
}
