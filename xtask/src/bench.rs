//! The benches, which measure Bulkhead beside its peers: a table, and `target/bench/results.json`.
//!
//! In the lab they run with an instruction-counting clock, which repeats within a percent or so
//! however busy the host is. Figures compare only with others of the same run.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::lab::Place;
use crate::process::run;
use crate::project::Project;
use crate::test::{RUN_EACH, SYSTEM_TESTS, executables};

/// Seconds for all benches together in the lab.
const LAB_TIMEOUT_S: &str = "3000";

/// Builds everything and runs each bench.
pub(crate) fn all(project: &Project) -> Result<()> {
    build::all(project)?;
    let benches = executables(project, SYSTEM_TESTS, "bench")?;
    if benches.is_empty() {
        bail!("package system-tests has no benches");
    }
    let results = project.target.join("bench");
    fs::create_dir_all(&results).with_context(|| format!("cannot create {}", results.display()))?;
    let place = Place::find(project)?;
    place.announce("the benches");
    let out = results
        .to_str()
        .context("the target directory's name is not UTF-8")?;
    run(place
        .command(
            &["--icount", "--timeout", LAB_TIMEOUT_S, "--out", out],
            "sh",
        )
        .args(["-c", RUN_EACH, "sh"])
        .args(benches)
        .current_dir(&project.root)
        .env("BULKHEAD_PREFIX", project.prefix())
        .env("BULKHEAD_RESULTS", results.join("results.json")))?;
    println!("results: {}", results.join("results.json").display());
    Ok(())
}
