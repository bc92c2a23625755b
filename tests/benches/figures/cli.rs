//! The command line beside runc's: `run` and `exec` of /bin/true, what a start takes of the host,
//! and what an idle container's processes weigh.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use serde_json::Value;
use system_tests::container::{Bundle, pss_kib};

use crate::RUNS;
use crate::clock::milliseconds;
use crate::report::Report;

/// What an idle container runs.
const IDLE: [&str; 2] = ["sleep", "100000"];

/// Takes [`RUNS`] of each beside runc's, in turns.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for run in 0..=RUNS {
        let time = milliseconds(bundle.command(&[])?)?;
        let peer_time = milliseconds(runc(
            &["run", "--bundle"],
            &bundle,
            &[&format!("peer-{run}")],
        ))?;
        // the first ones fill the caches
        if run > 0 {
            ours.push(time);
            peer.push(peer_time);
        }
    }
    report.compare(("cli.run", "ms"), &ours, ("runc", &peer));
    idle(report)?;
    count(report, &bundle)
}

/// Takes what is to be had of a container that idles: [`RUNS`] programs executed in it beside
/// runc's, and the memory of its processes.
fn idle(report: &mut Report) -> Result<()> {
    let (bundle, peer_bundle) = (Bundle::new(&IDLE)?, Bundle::new(&IDLE)?);
    milliseconds(bundle.command(&["--detach"])?)?;
    milliseconds(runc(
        &["run", "--detach", "--bundle"],
        &peer_bundle,
        &["peer"],
    ))?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for run in 0..=RUNS {
        let time = milliseconds(bundle.bulkhead(&["exec", "web", "true"])?)?;
        let peer_time = milliseconds(runc_of("peer", &["exec"], &["true"]))?;
        if run > 0 {
            ours.push(time);
            peer.push(peer_time);
        }
    }
    report.compare(("cli.exec", "ms"), &ours, ("runc", &peer));
    let state = bundle.bulkhead(&["state", "web"])?.output()?;
    let state: Value = serde_json::from_slice(&state.stdout).context("the state is no JSON")?;
    let relay = state["pid"].as_i64().context("the state has no pid")?;
    let relay = Pid::from_raw(i32::try_from(relay)?);
    // they give memory back when they rest
    thread::sleep(Duration::from_secs(2));
    report.add("mem.relay_pss_kib", "KiB", &[pss_kib(relay)? as f64]);
    report.add("mem.pod_pss_kib", "KiB", &[pss_kib(pod()?)? as f64]);
    milliseconds(bundle.bulkhead(&["delete", "--force", "web"])?)?;
    milliseconds(runc_of("peer", &["delete", "--force"], &[]))
        .map(|_| ())
        .context("the peer's container stays")
}

/// The process of the one pod there is: its monitor's parent.
fn pod() -> Result<Pid> {
    for entry in fs::read_dir("/proc")? {
        let status = fs::read_to_string(entry?.path().join("status")).unwrap_or_default();
        if status.starts_with("Name:\tbulkhead-vmm\n") {
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:\t"));
            return Ok(Pid::from_raw(parent.context("no parent")?.parse()?));
        }
    }
    anyhow::bail!("no monitor runs")
}

/// Counts what the host does for a whole run, by program: system calls, processes and threads
/// made, programs executed. Counting takes time, so this run's is not taken.
fn count(report: &mut Report, bundle: &Bundle) -> Result<()> {
    const COUNTS: [(&str, &str); 3] = [
        ("raw_syscalls/sys_enter", "cli.run_syscalls"),
        ("sched/sched_process_fork", "cli.run_tasks"),
        ("sched/sched_process_exec", "cli.run_execs"),
    ];
    for (event, name) in COUNTS {
        let ours = counted(event, bundle.command(&[])?)?;
        let peer = counted(event, runc(&["run", "--bundle"], bundle, &["peer"]))?;
        for (who, counts) in [("bulkhead", &ours), ("runc", &peer)] {
            report.remark(format!("{name} of {who}: {}", explain(counts)));
        }
        let total = |counts: &BTreeMap<String, u64>| [counts.values().sum::<u64>() as f64];
        report.compare((name, "calls"), &total(&ours), ("runc", &total(&peer)));
    }
    Ok(())
}

fn explain(counts: &BTreeMap<String, u64>) -> String {
    let counts: Vec<_> = counts
        .iter()
        .map(|(program, count)| format!("{program} {count}"))
        .collect();
    counts.join(", ")
}

/// How often the kernel saw `event` until `command` ended, by program, without this one's.
fn counted(event: &str, command: Command) -> Result<BTreeMap<String, u64>> {
    let event = format!("/sys/kernel/tracing/events/{event}");
    let set = |text: &str| {
        let path = format!("{event}/trigger");
        fs::write(&path, text).with_context(|| format!("cannot write {path}; is tracefs mounted?"))
    };
    const HISTOGRAM: &str = "hist:keys=common_pid.execname";
    set(HISTOGRAM)?;
    let ran = milliseconds(command);
    let text = fs::read_to_string(format!("{event}/hist"));
    set(&format!("!{HISTOGRAM}"))?;
    ran?;
    let mut counts = by_program(&text?);
    counts.retain(|program, _| !program.starts_with("figures"));
    Ok(counts)
}

/// Reads lines such as `{ common_pid: bulkhead        [       4711] } hitcount:        165`.
fn by_program(text: &str) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let Some((key, count)) = line.split_once("} hitcount:") else {
            continue;
        };
        let key = key.trim_start_matches("{ common_pid:");
        let program = key.split('[').next().unwrap_or_default().trim();
        let count: u64 = count.trim().parse().unwrap_or_default();
        *counts.entry(program.to_owned()).or_default() += count;
    }
    counts
}

fn runc(verb: &[&str], bundle: &Bundle, rest: &[&str]) -> Command {
    let mut runc = Command::new("runc");
    runc.args(verb).arg(bundle.path()).args(rest);
    runc
}

fn runc_of(id: &str, verb: &[&str], rest: &[&str]) -> Command {
    let mut runc = Command::new("runc");
    runc.args(verb).arg(id).args(rest);
    runc
}
