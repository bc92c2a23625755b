//! What was measured, as a table for people and as JSON for programs.

use std::{env, fs};

use anyhow::{Context, Result};
use serde::Serialize;

/// One figure.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    /// Its name, which never changes.
    name: &'static str,
    /// The median of its runs.
    value: f64,
    /// What it counts.
    unit: &'static str,
    /// Who else was measured, in turns with us.
    peer: Option<&'static str>,
    /// The median of the peer's runs.
    peer_value: Option<f64>,
    /// Ours divided by the peer's.
    ratio: Option<f64>,
    /// How many runs there were of each.
    runs: usize,
}

/// All figures, and the remarks that explain them.
#[derive(Debug, Default)]
pub(crate) struct Report {
    figures: Vec<Figure>,
    remarks: Vec<String>,
}

impl Report {
    /// Adds a figure that has no peer.
    pub(crate) fn add(&mut self, name: &'static str, unit: &'static str, runs: &[f64]) {
        eprintln!("{name}: {runs:?} {unit}");
        self.figures.push(Figure {
            name,
            value: median(runs),
            unit,
            peer: None,
            peer_value: None,
            ratio: None,
            runs: runs.len(),
        });
    }

    /// Adds a figure beside a peer's.
    pub(crate) fn compare(
        &mut self,
        (name, unit): (&'static str, &'static str),
        runs: &[f64],
        (peer, peer_runs): (&'static str, &[f64]),
    ) {
        self.add(name, unit, runs);
        eprintln!("{name}: {peer_runs:?} {unit} of {peer}");
        if let Some(figure) = self.figures.last_mut() {
            let peer_value = median(peer_runs);
            figure.peer = Some(peer);
            figure.peer_value = Some(peer_value);
            figure.ratio = Some(round(figure.value / peer_value));
        }
    }

    /// Adds a line below the table.
    pub(crate) fn remark(&mut self, remark: String) {
        self.remarks.push(remark);
    }

    /// Prints the table and the remarks.
    pub(crate) fn print(&self) {
        println!(
            "\n{:<28} {:>10} {:<6} {:>14} {:>10} {:>6}",
            "figure", "value", "unit", "peer", "value", "ratio"
        );
        for figure in &self.figures {
            let optional = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
            println!(
                "{:<28} {:>10} {:<6} {:>14} {:>10} {:>6}",
                figure.name,
                figure.value,
                figure.unit,
                figure.peer.unwrap_or_default(),
                optional(figure.peer_value),
                optional(figure.ratio)
            );
        }
        println!();
        for remark in &self.remarks {
            println!("{remark}");
        }
    }

    /// Writes the figures to the file that `BULKHEAD_RESULTS` names.
    pub(crate) fn store(&self) -> Result<()> {
        let path = env::var("BULKHEAD_RESULTS")
            .context("BULKHEAD_RESULTS is not set: run the benches by `cargo xtask bench`")?;
        let text = serde_json::to_string_pretty(&self.figures)? + "\n";
        fs::write(&path, text).with_context(|| format!("cannot write {path}"))
    }
}

fn median(runs: &[f64]) -> f64 {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    round(sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN))
}

/// Three significant places behind the point are more than any figure has.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
