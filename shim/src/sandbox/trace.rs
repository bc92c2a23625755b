//! Where a start's time goes: spans on the host's monotonic clock, recorded
//! always.

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// The columns of the waterfall's bars.
const BAR_COLUMNS: u64 = 40;

/// The spans of one start. Clones write to the same trace.
#[derive(Debug, Clone)]
pub struct Trace(Arc<Mutex<Record>>);

/// What is kept.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// The clock of `started_ns`; spans are relative to it.
    pub clock: &'static str,
    /// When the command started.
    pub started_ns: u64,
    /// In the order in which they ended.
    pub spans: Vec<Span>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Span {
    /// Which.
    pub name: &'static str,
    /// Nanoseconds from the start to its begin.
    pub begin_ns: u64,
    /// Nanoseconds from the start to its end.
    pub end_ns: u64,
}

/// A span that ends when this is dropped.
#[derive(Debug)]
pub struct Running {
    trace: Trace,
    name: &'static str,
    begin_ns: u64,
}

impl Trace {
    /// A trace that starts now.
    pub fn start() -> Self {
        Self(Arc::new(Mutex::new(Record {
            clock: "CLOCK_MONOTONIC",
            started_ns: monotonic_ns(),
            spans: Vec::with_capacity(16),
        })))
    }

    /// Begins a span.
    #[must_use = "the span ends when it is dropped"]
    pub fn span(&self, name: &'static str) -> Running {
        Running {
            trace: self.clone(),
            name,
            begin_ns: self.now_ns(),
        }
    }

    /// Adds a span whose begin and end are known from elsewhere.
    pub fn add(&self, name: &'static str, begin_ns: u64, end_ns: u64) {
        self.lock().spans.push(Span {
            name,
            begin_ns,
            end_ns: end_ns.max(begin_ns),
        });
    }

    /// Nanoseconds since the start.
    pub fn now_ns(&self) -> u64 {
        monotonic_ns().saturating_sub(self.lock().started_ns)
    }

    /// What was recorded so far, in the order of the begins.
    pub fn record(&self) -> Record {
        let mut record = self.lock().clone();
        record
            .spans
            .sort_by_key(|span| (span.begin_ns, span.end_ns));
        record
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.trace
            .add(self.name, self.begin_ns, self.trace.now_ns());
    }
}

impl Record {
    /// The record as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// The record as a table with bars, for people.
    pub fn waterfall(&self) -> String {
        let total_ns = self.spans.iter().map(|span| span.end_ns).max().unwrap_or(0);
        let name_columns = self.spans.iter().map(|span| span.name.len()).max();
        let name_columns = name_columns.unwrap_or(0).max("step".len());
        let mut table = format!(
            "{:name_columns$}  {:>9}  {:>9}\n",
            "step", "at ms", "took ms"
        );
        for span in &self.spans {
            let column = |ns: u64| (ns * BAR_COLUMNS / total_ns.max(1)) as usize;
            let (left, right) = (column(span.begin_ns), column(span.end_ns));
            let _ = writeln!(
                table,
                "{:name_columns$}  {:>9}  {:>9}  {}{}",
                span.name,
                milliseconds(span.begin_ns),
                milliseconds(span.end_ns - span.begin_ns),
                " ".repeat(left),
                "█".repeat((right - left).max(1)),
            );
        }
        let _ = writeln!(
            table,
            "{:name_columns$}  {:>9}  {:>9}",
            "all",
            "",
            milliseconds(total_ns)
        );
        table
    }
}

fn milliseconds(ns: u64) -> String {
    format!("{}.{:02}", ns / 1_000_000, ns % 1_000_000 / 10_000)
}

fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_ends_when_it_is_dropped() {
        let trace = Trace::start();
        drop(trace.span("config read"));
        let record = trace.record();
        assert_eq!(record.spans.len(), 1);
        assert!(record.spans[0].end_ns >= record.spans[0].begin_ns);
    }

    #[test]
    fn the_waterfall_shows_each_step_under_the_other() {
        let record = Record {
            clock: "CLOCK_MONOTONIC",
            started_ns: 5,
            spans: vec![
                Span {
                    name: "vmm spawned",
                    begin_ns: 0,
                    end_ns: 1_000_000,
                },
                Span {
                    name: "kernel",
                    begin_ns: 1_000_000,
                    end_ns: 40_000_000,
                },
            ],
        };
        let bar = "█".repeat(39);
        assert_eq!(
            record.waterfall(),
            format!(
                "step             at ms    took ms\n\
                 vmm spawned       0.00       1.00  █\n\
                 kernel            1.00      39.00   {bar}\n\
                 all                         40.00\n"
            )
        );
    }

    #[test]
    fn an_empty_trace_can_be_drawn() {
        assert!(Trace::start().record().waterfall().contains("all"));
    }
}
