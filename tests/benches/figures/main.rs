//! The figures of Bulkhead beside those of its peers: `make bench`.
//!
//! Times are the clock's of the machine they run on. In the lab, which is where they are meant to
//! be taken, that clock counts instructions, so that a busy host changes nothing; they compare
//! with each other and with no figure of another machine. Counts of exits compare anywhere.
//!
//! Given names of its [`PARTS`], it takes those alone; `storage` is all that begin with it. Given `parts` it lists them, and given
//! `table` it prints what all of them have stored.

mod boot;
mod cli;
mod clock;
mod containerd;
mod disk;
mod exits;
mod machine;
mod net;
mod report;
mod run;
mod storage;
mod watch;

use anyhow::{Result, bail};
use report::Report;
use watch::Watch;

/// How often each figure is taken; the median is reported.
const RUNS: usize = 3;

/// Takes the figures of one part.
type Measure = fn(&mut Report) -> Result<()>;

const PARTS: [(&str, Measure); 9] = [
    ("boot", boot::measure),
    ("cli", cli::measure),
    ("containerd", containerd::measure),
    ("disk", disk::measure),
    ("net", net::measure),
    ("run", run::measure),
    ("storage.tree", storage::tree),
    ("storage.file", storage::file),
    ("storage.disk", storage::disk),
];

fn main() -> Result<()> {
    // cargo passes `--bench`
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let names = PARTS.map(|(name, _)| name);
    match &wanted[..] {
        [verb] if verb == "parts" => {
            println!("{}", names.join("\n"));
            Ok(())
        }
        [verb] if verb == "table" => report::print_stored(),
        [] => take(&names),
        wanted => {
            let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
            take(&wanted)
        }
    }
}

fn take(wanted: &[&str]) -> Result<()> {
    let mut failed = Vec::new();
    for (name, measure) in chosen(wanted)? {
        let watch = Watch::over(name);
        let mut report = Report::default();
        let measured = measure(&mut report);
        drop(watch);
        report.print();
        // what was measured before a failure counts
        report.store()?;
        if let Err(error) = measured {
            eprintln!("{name}: {error:?}");
            failed.push(name);
        }
    }
    match failed[..] {
        [] => Ok(()),
        _ => bail!("parts that failed: {failed:?}"),
    }
}

/// The parts of those names, and those that a name is a group of.
fn chosen(wanted: &[&str]) -> Result<Vec<(&'static str, Measure)>> {
    let mut chosen = Vec::new();
    for name in wanted {
        let is_meant = |part: &str| {
            let rest = part.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let before = chosen.len();
        chosen.extend(PARTS.iter().filter(|(part, _)| is_meant(part)));
        if chosen.len() == before {
            bail!("there is no part {name:?}; `parts` lists them");
        }
    }
    Ok(chosen)
}
