//! From `bulkhead run` to the container's first instruction, and what an idle one costs the host.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;
use system_tests::container::Bundle;

use crate::RUNS;
use crate::report::Report;

/// Takes [`RUNS`] starts beside runc's, in turns, and looks at the last one while it idles.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "echo up; exec cat"])?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for run in 0..=RUNS {
        let trace = bundle.path().join("trace.json");
        let command = bundle.command(&[&format!("--trace={}", trace.display())])?;
        let (time, container) = first_word(command)?;
        let (peer_time, peer_container) = first_word(runc(&bundle, run))?;
        if run > 0 {
            ours.push(time);
            peer.push(peer_time);
        }
        if run == RUNS {
            memory(report, &container.0)?;
            waterfall(report, &fs::read_to_string(&trace)?)?;
        }
        drop((container, peer_container));
    }
    report.compare(("run.first_instruction", "ms"), &ours, ("runc", &peer));
    Ok(())
}

fn runc(bundle: &Bundle, run: usize) -> Command {
    let mut runc = Command::new("runc");
    runc.args(["run", "--bundle"])
        .arg(bundle.path())
        .arg(format!("peer-{run}"));
    runc
}

/// A container that idles in `cat`; dropping it closes its input and waits for its end.
struct Container(Child);

impl Drop for Container {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // a container that does not end would only be left to the machine's end
        let _ = self.0.wait();
    }
}

/// Milliseconds from the command's start to its container's first word.
fn first_word(mut command: Command) -> Result<(f64, Container)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let started = Instant::now();
    let mut container = Container(command.spawn().context("cannot start a container")?);
    let mut word = [0; 3];
    let stdout = container.0.stdout.as_mut().context("no standard output")?;
    stdout
        .read_exact(&mut word)
        .context("the container said nothing")?;
    Ok((started.elapsed().as_secs_f64() * 1e3, container))
}

/// Adds the private memory of an idle container's two processes, without the guest's.
fn memory(report: &mut Report, shim: &Child) -> Result<()> {
    let children = format!("/proc/{0}/task/{0}/children", shim.id());
    let mut processes = BTreeMap::from([("mem.shim_pss_kib", shim.id())]);
    for task in fs::read_dir(format!("/proc/{}/task", shim.id()))? {
        let children = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        if let Some(vmm) = children.split_whitespace().next() {
            processes.insert("mem.vmm_pss_kib", vmm.parse()?);
        }
    }
    let vmm = processes.contains_key("mem.vmm_pss_kib");
    anyhow::ensure!(vmm, "no monitor among the children in {children}");
    for (name, pid) in processes {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let (own, guest) = pss_kib(&smaps);
        report.add(name, "KiB", &[own as f64]);
        if name == "mem.vmm_pss_kib" {
            report.add("mem.guest_used_kib", "KiB", &[guest as f64]);
        }
    }
    Ok(())
}

/// Sums `Pss:` over mappings: those of the process itself, and those of guest memory.
fn pss_kib(smaps: &str) -> (u64, u64) {
    let (mut own, mut guest, mut is_guest) = (0, 0, false);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if first.contains('-') {
            is_guest = is_guest_ram(line);
        } else if first == "Pss:" {
            let kib = line
                .split_whitespace()
                .nth(1)
                .and_then(|kib| kib.parse().ok());
            *if is_guest { &mut guest } else { &mut own } += kib.unwrap_or(0);
        }
    }
    (own, guest)
}

/// Whether a mapping is guest memory: anonymous, writable, and as large as the smallest guest.
fn is_guest_ram(mapping: &str) -> bool {
    let fields: Vec<&str> = mapping.split_whitespace().collect();
    let [range, access, _, _, _] = fields[..] else {
        return false;
    };
    let address = |text| u64::from_str_radix(text, 16).unwrap_or(0);
    let (from, to) = range.split_once('-').unwrap_or_default();
    access.starts_with("rw") && address(to).saturating_sub(address(from)) >= 64 << 20
}

/// Adds the spans of a start as remarks.
fn waterfall(report: &mut Report, trace: &str) -> Result<()> {
    let trace: Value = serde_json::from_str(trace).context("the trace is no JSON")?;
    report.remark("run.first_instruction, from begin to end in ms:".to_owned());
    for span in trace["spans"]
        .as_array()
        .context("the trace has no spans")?
    {
        let ms = |key: &str| span[key].as_f64().unwrap_or(f64::NAN) / 1e6;
        let name = span["name"].as_str().unwrap_or_default();
        report.remark(format!(
            "  {:>8.2} {:>8.2}  {name}",
            ms("begin_ns"),
            ms("end_ns")
        ));
    }
    Ok(())
}
