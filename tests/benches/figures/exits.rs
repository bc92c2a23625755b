//! VM exits by kind, as the kernel counts them: a histogram on the tracepoint `kvm_exit`.
//!
//! It sees every exit, those that KVM answers by itself too, and of any monitor, so it serves us
//! and our peers alike. It counts all virtual machines of the host: nothing else may run.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

const EVENT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit";
const HISTOGRAM: &str = "hist:keys=exit_reason";

/// Names of the exits of AMD's processors, which is what the lab machine has.
const NAMES: [(u32, &str, &str); 12] = [
    (0x60, "interrupt", "the host's timer and its other work"),
    (
        0x64,
        "vintr",
        "KVM waits for the guest to allow an interrupt",
    ),
    (0x72, "cpuid", "the kernel asks what its processor can do"),
    (0x78, "hlt", "the guest waits"),
    (0x7b, "io", "ports"),
    (
        0x7c,
        "msr",
        "clock, APIC and processor set-up; each timer that is set",
    ),
    (0x7f, "shutdown", "triple fault"),
    (0x81, "hypercall", "the guest asks KVM for something"),
    (
        0x400,
        "npf",
        "a page of memory is touched first, or a device register is",
    ),
    (0x4d, "excp", "exceptions"),
    (0x77, "pause", "spinning"),
    (0x8d, "xsetbv", "the kernel enables vector registers"),
];

/// A count that runs from [`Exits::count`] to [`Exits::read`].
pub(crate) struct Exits(());

impl Exits {
    /// Starts to count at zero.
    pub(crate) fn count() -> Result<Self> {
        trigger(&format!("!{HISTOGRAM}")).ok();
        trigger(HISTOGRAM).context("cannot count exits: is tracefs mounted, are we root?")?;
        Ok(Self(()))
    }

    /// The exits so far by kind, most frequent first.
    pub(crate) fn read(&self) -> Result<Counts> {
        let path = format!("{EVENT}/hist");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Ok(Counts(parse(&text)))
    }
}

impl Drop for Exits {
    fn drop(&mut self) {
        // with a trigger left behind, the next count would start above zero and says so
        let _ = trigger(&format!("!{HISTOGRAM}"));
    }
}

/// Exits by reason.
pub(crate) struct Counts(BTreeMap<u32, u64>);

impl Counts {
    /// All of them.
    pub(crate) fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Those for a port or for memory: device registers, and pages that are touched first.
    pub(crate) fn device_accesses(&self) -> u64 {
        [0x7b, 0x400]
            .iter()
            .filter_map(|reason| self.0.get(reason))
            .sum()
    }

    /// One line a kind with what causes it, most frequent first.
    pub(crate) fn explain(&self) -> Vec<String> {
        let mut kinds: Vec<(&u32, &u64)> = self.0.iter().collect();
        kinds.sort_by(|a, b| b.1.cmp(a.1));
        let line = |(reason, count): (&u32, &u64)| {
            let known = NAMES.iter().find(|(number, ..)| number == reason);
            match known {
                Some((_, name, cause)) => format!("  {count:>6}  {name:<10} {cause}"),
                None => format!(
                    "  {count:>6}  {:<10} {}",
                    format!("{reason:#x}"),
                    other(*reason)
                ),
            }
        };
        kinds.into_iter().map(line).collect()
    }
}

fn other(reason: u32) -> &'static str {
    match reason {
        0x00..0x20 => "control registers, while the kernel sets its processor up",
        0x20..0x40 => "debug registers",
        _ => "rare",
    }
}

fn trigger(text: &str) -> Result<()> {
    let path = format!("{EVENT}/trigger");
    fs::write(&path, text).with_context(|| format!("cannot write {path}"))
}

/// Reads lines such as `{ exit_reason:        124 } hitcount:        165`.
fn parse(text: &str) -> BTreeMap<u32, u64> {
    let number = |text: &str| text.trim().parse().ok();
    text.lines()
        .filter_map(|line| {
            let (reason, count) = line
                .strip_prefix("{ exit_reason:")?
                .split_once("} hitcount:")?;
            Some((number(reason)? as u32, number(count)?))
        })
        .collect()
}
