//! From the monitor's start to the agent's first words, beside QEMU's microvm with the same
//! kernel, image and agent; and the exits on the way.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use protocol::READY_PORT;
use system_tests::guest::share;
use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::RUNS;
use crate::exits::{Counts, Exits};
use crate::machine::{MEMORY_MIB, Machine, hello};
use crate::report::Report;

/// Where the peer's guest lives.
const PEER_CID: u32 = 42;

/// Takes [`RUNS`] of each, in turns.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let qemu = Qemu::new()?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    let (mut exits, mut peer_exits) = (Vec::new(), Vec::new());
    let mut kinds = None;
    // the first of each warms the host's caches and is not counted
    for run in 0..=RUNS {
        let (time, counts) = boot_ours()?;
        let (peer_time, peer_counts) = qemu.boot()?;
        eprintln!("boot {run}: {time:?}, of QEMU {peer_time:?}");
        if run == 0 {
            continue;
        }
        ours.push(time.as_secs_f64() * 1e3);
        peer.push(peer_time.as_secs_f64() * 1e3);
        exits.push(counts.total() as f64);
        peer_exits.push(peer_counts.total() as f64);
        kinds = Some(counts);
    }
    report.compare(("boot.vmm_to_agent", "ms"), &ours, ("qemu microvm", &peer));
    report.compare(
        ("boot.exits", "exits"),
        &exits,
        ("qemu microvm", &peer_exits),
    );
    if let Some(counts) = kinds {
        report.remark("boot.exits by kind:".to_owned());
        counts
            .explain()
            .into_iter()
            .for_each(|line| report.remark(line));
    }
    Ok(())
}

fn boot_ours() -> Result<(Duration, Counts)> {
    let exits = Exits::count()?;
    let mut machine = Machine::start()?;
    let time = machine.agent()?;
    Ok((time, exits.read()?))
}

/// QEMU's leanest machine, and where its agent will call.
struct Qemu {
    ready: VsockListener,
}

impl Qemu {
    fn new() -> Result<Self> {
        let ready = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, READY_PORT)
            .context("cannot listen for the peer's agent")?;
        Ok(Self { ready })
    }

    fn boot(&self) -> Result<(Duration, Counts)> {
        let exits = Exits::count()?;
        let started = Instant::now();
        let _qemu = Running(Self::command()?.spawn().context("cannot start QEMU")?);
        let (agent, _) = self
            .ready
            .accept()
            .context("no call from the peer's agent")?;
        hello(agent).context("no word from the peer's agent")?;
        Ok((started.elapsed(), exits.read()?))
    }

    fn command() -> Result<Command> {
        let mut qemu = Command::new("qemu-system-x86_64");
        // measured to be the fastest of its settings; the rest is what the guest needs
        qemu.args([
            "-M",
            "microvm,acpi=off,rtc=on,pit=off,isa-serial=off",
            "-accel",
            "kvm",
        ]);
        qemu.args([
            "-cpu",
            "host",
            "-m",
            &MEMORY_MIB.to_string(),
            "-nodefaults",
            "-no-reboot",
        ]);
        qemu.args(["-no-user-config", "-display", "none"]);
        qemu.args(["-global", "virtio-mmio.force-legacy=false", "-kernel"])
            .arg(share("vmlinux")?);
        qemu.args([
            "-append",
            "quiet console=ttynull 8250.nr_uarts=0 panic=-1 reboot=t \
                    root=/dev/vda rootfstype=erofs ro init=/init",
        ]);
        qemu.arg("-drive").arg(format!(
            "id=root,if=none,format=raw,readonly=on,file={}",
            share("guest.img")?.display()
        ));
        qemu.args(["-device", "virtio-blk-device,drive=root", "-device"]);
        qemu.arg(format!("vhost-vsock-device,guest-cid={PEER_CID}"));
        qemu.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(qemu)
    }
}

/// A process that is killed and reaped when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
