//! The benches, which measure Bulkhead beside its peers: a table, and `target/bench/results.json`.
//!
//! In the lab they run with an instruction-counting clock, which repeats within a percent or so
//! however busy the host is. Figures compare only with others of the same run.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::lab::Place;
use crate::process::{output, run};
use crate::project::Project;
use crate::test::{SYSTEM_TESTS, executables};

/// Seconds for each part in the lab.
const LAB_TIMEOUT_S: &str = "1500";

/// Builds everything and takes the figures, each part in a lab machine of its own: what goes wrong
/// with one costs the others nothing.
pub(crate) fn all(project: &Project) -> Result<()> {
    build::all(project)?;
    let benches = executables(project, SYSTEM_TESTS, "bench")?;
    let [figures] = &benches[..] else {
        bail!("package {SYSTEM_TESTS} has not one bench, but {benches:?}");
    };
    let results = Results::new(project)?;
    let place = Place::find(project)?;
    place.announce("the benches");
    let mut failed = Vec::new();
    for part in output(Command::new(figures).arg("parts"))?.lines() {
        let out = results.directory.to_str();
        let out = out.context("the target directory's name is not UTF-8")?;
        let options = ["--icount", "--timeout", LAB_TIMEOUT_S, "--out", out];
        println!("bench {part}");
        let taken = run(place
            .command(&options, figures)
            .arg(part)
            .current_dir(&project.root)
            .env("BULKHEAD_PREFIX", project.prefix())
            .env("BULKHEAD_RESULTS", results.file()));
        if let Err(error) = taken {
            eprintln!("{part}: {error:#}");
            failed.push(part.to_owned());
        }
    }
    run(Command::new(figures)
        .arg("table")
        .env("BULKHEAD_RESULTS", results.file()))?;
    println!("results: {}", results.file().display());
    match failed[..] {
        [] => Ok(()),
        _ => bail!("parts that failed: {}", failed.join(", ")),
    }
}

/// Where the figures go.
struct Results {
    directory: PathBuf,
}

impl Results {
    /// An empty place for them.
    fn new(project: &Project) -> Result<Self> {
        let directory = project.target.join("bench");
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot empty {}", directory.display()));
            }
            _ => fs::create_dir_all(&directory)
                .with_context(|| format!("cannot create {}", directory.display()))?,
        }
        Ok(Self { directory })
    }

    fn file(&self) -> PathBuf {
        self.directory.join("results.json")
    }
}
