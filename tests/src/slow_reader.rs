//! A reader of `bulkhead run` that comes late and takes its time, and what the bytes that wait for
//! it take of anybody's memory.

use std::{fs, io::Read, os::unix::fs::symlink, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use crate::container::Bundle;

/// What the container writes, again and again.
const LINE: &str = "0123456789abcde\n";

/// After so many bytes memory is looked at, and the reader rests.
const SAMPLE: usize = 8 << 20;

/// How much a process may grow, in KiB.
const GROWTH: u64 = 2048;

/// Reads `bytes` from a container, each of which must be right, while nobody's memory grows: not the
/// pod's process, nor the VMM's own, nor the agent's.
///
/// # Errors
/// When a byte is lost or wrong, or memory grows.
pub fn reads(bytes: usize) -> Result<()> {
    // The most that the agent ever had, by the kernel's account, before and after.
    let peak = "grep VmHWM /proc/1/status >&2";
    let script = format!(
        "{peak}; echo ready; yes {} | head -c {bytes}; {peak}",
        LINE.trim()
    );
    let bundle = Bundle::new(&["busybox", "sh", "-c", &script])?;
    for applet in ["yes", "head", "grep"] {
        symlink("busybox", bundle.rootfs().join("bin").join(applet))?;
    }
    // Process 1 of the guest is seen by who shares its namespace.
    bundle.edit(|config| {
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "pid");
        }
    })?;
    let mut run = bundle.start(&[])?;
    run.wait_for_line("ready")?;
    let processes = [
        ("the pod's process", Pid::from_raw(run.child.id() as i32)),
        ("the VMM", run.vmm()?),
    ];
    let sample = |(_, pid): (&str, Pid)| own_kib(pid);
    let before = processes.map(sample);
    thread::sleep(Duration::from_secs(3));
    let mut most = [0; 2];
    let mut look = || {
        for (most, process) in most.iter_mut().zip(processes) {
            // None at the end.
            *most = (*most).max(sample(process).unwrap_or(0));
        }
    };
    look();
    let mut stdout = run.child.stdout.take().context("no stdout")?;
    let mut chunk = [0; 65536];
    let lines = LINE.repeat(chunk.len() / LINE.len() + 1).into_bytes();
    let mut received = 0;
    loop {
        let count = stdout.read(&mut chunk)?;
        if count == 0 {
            break;
        }
        let at = received % LINE.len();
        ensure!(
            chunk[..count] == lines[at..at + count],
            "wrong after byte {received}"
        );
        if received / SAMPLE != (received + count) / SAMPLE {
            look();
            thread::sleep(Duration::from_millis(50));
        }
        received += count;
    }
    ensure!(received == bytes, "{received} bytes came of {bytes}");
    let output = run.output()?;
    ensure!(output.status.code() == Some(0), "{:?}", output.status);
    let agent = peaks(&String::from_utf8_lossy(&output.stderr))?;
    println!(
        "{bytes} bytes, {processes:?}: {before:?} KiB, at most {most:?}; the agent: {agent:?}"
    );
    for ((name, _), (before, most)) in processes.iter().zip(before.into_iter().zip(most)) {
        let before = before?;
        ensure!(
            most > 0 && most < before + GROWTH,
            "{name} grew from {before} KiB to {most}"
        );
        ensure!(most < 10 << 10, "{name} has {most} KiB, more than 10 MiB");
    }
    ensure!(
        agent.1 < agent.0 + GROWTH,
        "the agent grew from {} KiB to {}",
        agent.0,
        agent.1
    );
    bundle.nothing_is_left()
}

/// A process's memory without the guest's: that of the mappings as large as the smallest guest.
fn own_kib(pid: Pid) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut own, mut in_guest) = (0, false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("Pss:"), Some(kib)) if !in_guest => own += kib.parse::<u64>()?,
            (Some(range), Some(access)) if !range.ends_with(':') => {
                in_guest = access.starts_with("rw") && length(range)? >= 64 << 20;
            }
            _ => {}
        }
    }
    Ok(own)
}

fn length(range: &str) -> Result<u64> {
    let (from, to) = range.split_once('-').context("no range")?;
    Ok(u64::from_str_radix(to, 16)? - u64::from_str_radix(from, 16)?)
}

/// The two numbers that the container told.
fn peaks(told: &str) -> Result<(u64, u64)> {
    let numbers: Vec<u64> = told
        .lines()
        .filter_map(|line| {
            line.strip_prefix("VmHWM:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .collect();
    match numbers[..] {
        [before, after] => Ok((before, after)),
        _ => anyhow::bail!("the agent's memory was not told: {told}"),
    }
}
