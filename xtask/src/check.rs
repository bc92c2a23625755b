//! What must hold before each commit, without running anything.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::process::{cargo, run};
use crate::project::Project;
use crate::test::fuzz;

/// Formatting, lints as errors, fuzz targets that compile, and licences and sources of dependencies.
pub(crate) fn all(project: &Project) -> Result<()> {
    run(cargo()
        .current_dir(&project.root)
        .args(["fmt", "--all", "--check"]))?;
    run(cargo().current_dir(&project.root).args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ]))?;
    fuzz::compile_all(project)?;
    if !has_cargo_deny() {
        println!(
            "xtask: cargo-deny is not installed (cargo install cargo-deny); licences unchecked"
        );
        return Ok(());
    }
    run(cargo().current_dir(&project.root).args(["deny", "check"]))
}

fn has_cargo_deny() -> bool {
    Command::new("cargo-deny")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
