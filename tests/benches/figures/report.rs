//! What was measured, as a table for people and as JSON for programs.

use std::{env, fs, io};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// One figure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// Its name, which never changes.
    name: String,
    /// The median of its runs.
    value: f64,
    /// What it counts.
    unit: String,
    /// Who else was measured, in turns with us.
    peer: Option<String>,
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
            name: name.to_owned(),
            value: median(runs),
            unit: unit.to_owned(),
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
            figure.peer = Some(peer.to_owned());
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
        print(&self.figures);
        for remark in &self.remarks {
            println!("{remark}");
        }
    }

    /// Puts the figures into the file that `BULKHEAD_RESULTS` names, in place of earlier ones of
    /// the same names.
    pub(crate) fn store(&self) -> Result<()> {
        let is_new = |name: &str| self.figures.iter().any(|figure| figure.name == name);
        let mut figures = stored()?;
        figures.retain(|figure| !is_new(&figure.name));
        figures.extend_from_slice(&self.figures);
        let text = serde_json::to_string_pretty(&figures)? + "\n";
        let path = results()?;
        fs::write(&path, text).with_context(|| format!("cannot write {path}"))
    }
}

/// Prints the figures that are stored.
pub(crate) fn print_stored() -> Result<()> {
    print(&stored()?);
    Ok(())
}

fn results() -> Result<String> {
    env::var("BULKHEAD_RESULTS")
        .context("BULKHEAD_RESULTS is not set: run the benches by `cargo xtask bench`")
}

fn stored() -> Result<Vec<Figure>> {
    let path = results()?;
    match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("{path} is not ours")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {path}")),
    }
}

fn print(figures: &[Figure]) {
    println!(
        "\n{:<28} {:>10} {:<6} {:>15} {:>10} {:>6}",
        "figure", "value", "unit", "peer", "value", "ratio"
    );
    for figure in figures {
        let optional = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
        println!(
            "{:<28} {:>10} {:<6} {:>15} {:>10} {:>6}",
            figure.name,
            figure.value,
            figure.unit,
            figure.peer.as_deref().unwrap_or_default(),
            optional(figure.peer_value),
            optional(figure.ratio)
        );
    }
    println!();
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
