//! VM exits by kind, as the kernel counts them: a histogram on the tracepoint `kvm_exit`.
//!
//! It sees every exit, those that KVM answers by itself too, and of any monitor, so it serves us
//! and our peers alike. It counts all virtual machines of the host: nothing else may run.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

const EVENT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit";
const HISTOGRAM: &str = "hist:keys=exit_reason";

/// Names and causes of the exits of AMD's processors, which is what the lab machine has (AMD64
/// Architecture Programmer's Manual, volume 2, appendix C).
const NAMES: [(u32, &str, &str); 19] = [
    (0x00, "cr0 read", "processor set-up"),
    (0x04, "cr4 read", "processor set-up"),
    (0x10, "cr0 write", "processor set-up"),
    (
        0x14,
        "cr4 write",
        "the kernel forgets global translations, after it has changed how its own pages are mapped",
    ),
    (0x37, "dr7 write", "the kernel clears its breakpoints"),
    (0x4d, "gp", "a general protection fault"),
    (0x60, "interrupt", "the host's timer and its other work"),
    (0x61, "nmi", "the host's watchdog"),
    (
        0x64,
        "vintr",
        "KVM waits for the guest to allow an interrupt",
    ),
    (0x65, "cr0 mask", "the kernel write-protects its own pages"),
    (0x72, "cpuid", "the kernel asks what its processor can do"),
    (0x77, "pause", "spinning"),
    (0x78, "hlt", "the guest waits"),
    (0x7b, "io", "ports"),
    (
        0x7c,
        "msr",
        "clock, APIC and processor set-up; each timer that is set",
    ),
    (0x7f, "shutdown", "triple fault"),
    (0x81, "hypercall", "the guest asks KVM for something"),
    (0x8d, "xsetbv", "the kernel enables vector registers"),
    (
        0x400,
        "npf",
        "a device register is written, or a page of memory is touched first",
    ),
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
                None => format!("  {count:>6}  {reason:<#10x} not known to this bench"),
            }
        };
        kinds.into_iter().map(line).collect()
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
