//! The figures of Bulkhead beside those of its peers: `make bench`.
//!
//! Times are the clock's of the machine they run on. In the lab, which is where they are meant to
//! be taken, that clock counts instructions, so that a busy host changes nothing; they compare
//! with each other and with no figure of another machine. Counts of exits compare anywhere.
//!
//! Given names of its parts (`boot`, `containerd`, `disk`, `net`, `run`, `storage`), it takes those alone.

mod boot;
mod containerd;
mod disk;
mod exits;
mod machine;
mod net;
mod report;
mod run;
mod storage;

use anyhow::{Context, Result};
use report::Report;

/// How often each figure is taken; the median is reported.
const RUNS: usize = 3;

/// Takes the figures of one part.
type Measure = fn(&mut Report) -> Result<()>;

fn main() -> Result<()> {
    let parts: [(&str, Measure); 6] = [
        ("boot", boot::measure),
        ("containerd", containerd::measure),
        ("disk", disk::measure),
        ("net", net::measure),
        ("run", run::measure),
        ("storage", storage::measure),
    ];
    // cargo passes `--bench`
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let mut report = Report::default();
    for (name, measure) in parts {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            measure(&mut report).context(name)?;
        }
    }
    report.print();
    report.store()
}
