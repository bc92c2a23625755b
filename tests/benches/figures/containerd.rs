//! Containers by containerd and ctr, beside those of runc's shim.

use std::fs;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use system_tests::client::{containerd::Containerd, images::BUSYBOX};
use system_tests::container::pss_kib;

use crate::RUNS;
use crate::clock::milliseconds;
use crate::report::Report;

const OURS: &str = "io.containerd.bulkhead.v2";
const PEERS: &str = "io.containerd.runc.v2";

/// The annotations by which a container is a pod's first, and one that belongs to it.
const SANDBOX: [&str; 2] = ["--annotation", "io.kubernetes.cri.container-type=sandbox"];
const MEMBER: [&str; 2] = ["--annotation", "io.kubernetes.cri.container-type=container"];

/// Takes whole runs, execs, and second containers of a pod, in turns with runc's.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let containerd = Containerd::start()?;
    containerd.import("default", &[BUSYBOX])?;
    let figures = measure_with(&containerd, report);
    figures.with_context(|| containerd.logs())
}

fn measure_with(containerd: &Containerd, report: &mut Report) -> Result<()> {
    in_turns(report, "ctr.run", |runtime, run| {
        let id = format!("run-{run}");
        let arguments = ["run", "--rm", "--runtime", runtime, BUSYBOX, &id, "true"];
        milliseconds(containerd.command(&arguments))
    })?;
    for runtime in [OURS, PEERS] {
        let container = ["run", "-d", "--runtime", runtime, BUSYBOX, runtime];
        let container = [&container[..], &["sleep", "100000"]].concat();
        containerd.ctr(&container)?.ends_with(0)?;
        let pod = pod(runtime);
        let sandbox = [&["run", "-d", "--runtime", runtime], &SANDBOX[..]].concat();
        let sandbox = [&sandbox[..], &[BUSYBOX, &pod, "sleep", "100000"]].concat();
        containerd.ctr(&sandbox)?.ends_with(0)?;
    }
    in_turns(report, "ctr.exec", |runtime, run| {
        let id = format!("exec-{run}");
        let arguments = ["tasks", "exec", "--exec-id", &id, runtime, "true"];
        milliseconds(containerd.command(&arguments))
    })?;
    in_turns(report, "pod.second_container", |runtime, run| {
        let id = format!("second-{run}");
        let of = format!("io.kubernetes.cri.sandbox-id={}", pod(runtime));
        let network = format!("network:/proc/{}/ns/net", pid(containerd, &pod(runtime))?);
        let member = [&["run", "--rm", "--runtime", runtime], &MEMBER[..]].concat();
        let place = ["--annotation", &of, "--with-ns", &network];
        let member = [&member[..], &place, &[BUSYBOX, &id, "true"]].concat();
        milliseconds(containerd.command(&member))
    })?;
    let kib = pss_kib(shim(containerd, OURS)?)?;
    report.add("mem.containerd_shim_pss_kib", "KiB", &[kib as f64]);
    for runtime in [OURS, PEERS] {
        for task in [runtime, &pod(runtime)] {
            containerd.ctr(&["tasks", "rm", "-f", task])?;
        }
    }
    Ok(())
}

/// The name of a runtime's pod; its container alone is called as itself.
fn pod(runtime: &str) -> String {
    format!("{runtime}.pod")
}

/// Takes a figure [`RUNS`] times of each, after once for nothing.
fn in_turns(
    report: &mut Report,
    name: &'static str,
    mut take: impl FnMut(&str, String) -> Result<f64>,
) -> Result<()> {
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for run in 0..=RUNS {
        let our_time = take(OURS, format!("ours-{run}"))?;
        let peer_time = take(PEERS, format!("peers-{run}"))?;
        if run > 0 {
            ours.push(our_time);
            peers.push(peer_time);
        }
    }
    report.compare((name, "ms"), &ours, ("runc", &peers));
    Ok(())
}

/// The process that serves a container: the parent of its machine.
fn shim(containerd: &Containerd, id: &str) -> Result<Pid> {
    let machine = pid(containerd, id)?;
    let status = fs::read_to_string(format!("/proc/{machine}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let parent = parent.context("the machine has no parent")?;
    Ok(Pid::from_raw(parent.trim().parse()?))
}

/// The process that stands for a container: its machine, or runc's own.
fn pid(containerd: &Containerd, id: &str) -> Result<Pid> {
    let list = containerd.ctr(&["tasks", "ls"])?;
    let mut lines = list.text()?.lines();
    let line = lines.find(|line| line.starts_with(&format!("{id} ")));
    let pid = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(Pid::from_raw(pid.context("no such task")?.parse()?))
}
