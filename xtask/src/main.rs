//! The verbs a developer needs, as `cargo xtask VERB`; `make` calls the same.
//!
//! Each verb is one module; what they share is [`project::Project`] (where things are) and
//! [`process`] (running other programs).

mod bench;
mod build;
mod check;
mod debian;
mod demo;
mod image;
mod kernel;
mod lab;
mod process;
mod project;
mod test;

#[cfg(test)]
mod compatibility;
#[cfg(test)]
mod dependencies;

use std::process::ExitCode;

use clap::Parser;
use project::Project;

/// Builds, tests and shows Bulkhead.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Verb {
    /// Programs, agent, guest kernel and guest image, into target/bulkhead
    Build,
    /// The guest kernel alone, into the cache; prints where it is
    Kernel,
    /// The guest image alone (and the agent in it), into target/bulkhead
    Image,
    /// Unit and doc tests on this host, system tests on KVM (this host's or the lab's)
    Test(test::Options),
    /// Figures beside those of the peers: a table and target/bench/results.json
    Bench,
    /// A Debian container in its own virtual machine, and where its start spent the time
    Demo,
    /// Formatting, lints, fuzz targets, and licences if cargo-deny is installed
    Check,
}

fn main() -> ExitCode {
    match run(Verb::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> anyhow::Result<()> {
    let project = Project::find()?;
    match verb {
        Verb::Build => build::all(&project),
        Verb::Kernel => {
            let kernel = kernel::build(&project)?;
            println!("{}", kernel.vmlinux().display());
            Ok(())
        }
        Verb::Image => image::install(&project),
        Verb::Test(options) => test::all(&project, &options),
        Verb::Bench => bench::all(&project),
        Verb::Demo => demo::show(&project),
        Verb::Check => check::all(&project),
    }
}
