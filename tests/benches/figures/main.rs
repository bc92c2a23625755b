//! The figures of Bulkhead beside those of its peers: `make bench`.
//!
//! Times are the clock's of the machine they run on. In the lab, which is where they are meant to
//! be taken, that clock counts instructions, so that a busy host changes nothing; they compare
//! with each other and with no figure of another machine. Counts of exits compare anywhere.

mod boot;
mod disk;
mod exits;
mod machine;
mod report;
mod run;

use anyhow::{Context, Result};
use report::Report;

/// How often each figure is taken; the median is reported.
const RUNS: usize = 3;

fn main() -> Result<()> {
    let mut report = Report::default();
    boot::measure(&mut report).context("boot")?;
    disk::measure(&mut report).context("disk")?;
    run::measure(&mut report).context("run")?;
    report.print();
    report.store()
}
