//! `bulkhead check`: whether this host can run virtual machines, by doing it.

use std::{fmt::Write as _, path::Path, sync::mpsc, thread, time::Duration};

use anyhow::Context as _;
use serde::Serialize;
use shim::{
    container::Signals,
    host::Host,
    id::{ContainerId, Namespace},
    sandbox::{Media, Pace, Plan, Purpose, Sandbox, Size, Surroundings, Trace, open_kvm},
    text,
};
use vmm::probe::{API_VERSION, Offer, Speed};

use super::{
    cli::{CheckArgs, Global},
    run::unless_ended,
    say::say,
};

/// How long KVM may take for a few loops. They are over in two seconds unless it hangs.
const MEASURING: Duration = Duration::from_secs(10);

/// The memory of the guest that is booted for the check.
const MEMORY_MIB: u64 = 128;

/// What was found out, in order.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether virtual machines run here.
    ok: bool,
    /// What the host is.
    host: Host,
    findings: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    ok: bool,
    /// What was seen.
    detail: String,
    /// What to do, where something is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

/// Checks the host and returns 0 where virtual machines run, else 1.
pub(crate) fn check(global: &Global, args: &CheckArgs) -> anyhow::Result<u8> {
    let report = examine(global, args)?;
    if args.json {
        let json = serde_json::to_string_pretty(&report).context("cannot write the report")?;
        say(json)?;
    } else if !args.quiet {
        say(report.text())?;
    }
    Ok(u8::from(!report.ok))
}

/// Looks at one thing after the other, until one is missing.
fn examine(global: &Global, args: &CheckArgs) -> anyhow::Result<Report> {
    let host = Host::examine();
    let mut findings = vec![device()];
    if findings.iter().all(|finding| finding.ok) {
        findings.push(speed(&host));
    }
    if findings.iter().all(|finding| finding.ok) {
        findings.push(guest(global, args)?);
    }
    Ok(Report {
        ok: findings.iter().all(|finding| finding.ok),
        host,
        findings,
    })
}

fn device() -> Finding {
    let what = "/dev/kvm";
    if let Err(error) = open_kvm(Path::new(what)) {
        return missing(what, text::chain(&error), None);
    }
    let offer = match Offer::ask() {
        Ok(offer) => offer,
        Err(error) => return missing(what, text::chain(&error), Some(HARDWARE)),
    };
    let count = offer.present.len() + offer.missing.len();
    if offer.suffices() {
        let names = offer.present.join(" ");
        let detail = format!(
            "opens, version {}, all {count} capabilities: {names}",
            offer.api_version
        );
        return found(what, detail);
    }
    let detail = format!(
        "version {} where {API_VERSION} is needed; missing capabilities: {}",
        offer.api_version,
        offer.missing.join(" ")
    );
    missing(
        what,
        detail,
        Some("use a kernel of 5.10 or later with kvm_amd or kvm_intel"),
    )
}

fn speed(host: &Host) -> Finding {
    let what = "guest code";
    // Where KVM hangs in a loop the thread cannot be joined; it ends with the command.
    let (sender, receiver) = mpsc::sync_channel(1);
    let measured = thread::Builder::new()
        .name("measure".to_owned())
        .spawn(move || sender.send(Speed::measure()));
    let measured = match measured {
        Ok(_) => receiver.recv_timeout(MEASURING),
        Err(error) => return missing(what, format!("cannot be tried: {error}"), None),
    };
    match measured {
        Ok(Ok(speed)) if speed.suffices() => found(what, figures(&speed)),
        Ok(Ok(speed)) => missing(
            what,
            format!(
                "far too slow to boot a kernel, by {}: {}",
                host.kvm,
                figures(&speed)
            ),
            Some(HARDWARE),
        ),
        Ok(Err(error)) => missing(
            what,
            format!("fails inside {}: {}", host.kvm, text::chain(&error)),
            Some(HARDWARE),
        ),
        Err(_) => missing(
            what,
            format!(
                "hangs inside {}: a short loop did not end within {} s",
                host.kvm,
                MEASURING.as_secs()
            ),
            Some(HARDWARE),
        ),
    }
}

fn figures(speed: &Speed) -> String {
    format!(
        "{:.1} ns an instruction, {:.1} µs an exit to the kernel, {:.1} µs an exit to the VMM",
        speed.instruction_ps as f64 / 1000.0,
        speed.kernel_exit_ns as f64 / 1000.0,
        speed.exit_ns as f64 / 1000.0,
    )
}

/// Boots a guest without a container.
fn guest(global: &Global, args: &CheckArgs) -> anyhow::Result<Finding> {
    let what = "a guest";
    let plan = Plan {
        state_root: global.root.clone(),
        namespace: Namespace::parse("default")?,
        id: ContainerId::parse(&format!("bulkhead-check-{}", std::process::id()))?,
        files: args.files.files(),
        size: Size {
            cpus: 1,
            memory_mib: MEMORY_MIB,
        },
        purpose: Purpose::Probe,
        media: Media::default(),
        surroundings: Surroundings::default(),
        hostname: "check".to_owned(),
        deadline: Duration::from_secs(args.files.start_timeout),
        pace: Pace::default(),
    };
    let trace = Trace::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let booted = runtime.block_on(async {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let boot = async {
            let sandbox = Sandbox::start(plan, &trace).await?;
            sandbox.configure(None).await
        };
        Ok::<_, anyhow::Error>(unless_ended(&mut signals, boot).await?)
    })?;
    Ok(match booted {
        Ok(guest) => found(
            what,
            format!(
                "boots Linux {} and its agent answers, in {} ms",
                text::printable(&guest.kernel_release, 80),
                trace.now_ns() / 1_000_000
            ),
        ),
        Err(error) => missing(
            what,
            text::chain(&error),
            Some("with everything above in order this is worth a report, with `--debug`'s output"),
        ),
    })
}

const HARDWARE: &str = "use a machine with hardware virtualization, or have nested virtualization \
     enabled in this one; from a clone, tests/lab/lab emulates such a machine";

fn found(what: &'static str, detail: String) -> Finding {
    Finding {
        what,
        ok: true,
        detail,
        advice: None,
    }
}

fn missing(what: &'static str, detail: String, advice: Option<&str>) -> Finding {
    Finding {
        what,
        ok: false,
        detail,
        advice: advice.map(str::to_owned),
    }
}

impl Report {
    /// The report for people.
    fn text(&self) -> String {
        let Host { kernel, cpu, .. } = &self.host;
        let place = match self.host.virtual_machine {
            true => ", in a virtual machine",
            false => "",
        };
        let mut text = format!(
            "host     Linux {kernel} on {cpu}{place}, {} MiB\nKVM      {}\n",
            self.host.memory_mib, self.host.kvm
        );
        for finding in &self.findings {
            let mark = if finding.ok { "ok" } else { "MISSING" };
            let _ = writeln!(text, "{mark:8} {} {}", finding.what, finding.detail);
            if let Some(advice) = &finding.advice {
                let _ = writeln!(text, "         what to do: {advice}");
            }
        }
        text + match self.ok {
            true => "This host runs virtual machines.\n",
            false => "This host does not run virtual machines.\n",
        }
    }
}

#[cfg(test)]
mod tests {
    use shim::host::Kvm;

    use super::*;

    #[test]
    fn the_report_says_what_is_missing_and_what_to_do() {
        let report = Report {
            ok: false,
            host: Host {
                kernel: "6.1.0".to_owned(),
                cpu: "Some CPU".to_owned(),
                virtual_machine: true,
                kvm: Kvm::Software("kvm_pvm".to_owned()),
                memory_mib: 4096,
            },
            findings: vec![
                found("/dev/kvm", "opens".to_owned()),
                missing(
                    "guest code",
                    "far too slow".to_owned(),
                    Some("go elsewhere"),
                ),
            ],
        };
        assert_eq!(
            report.text(),
            "host     Linux 6.1.0 on Some CPU, in a virtual machine, 4096 MiB\n\
             KVM      a software KVM (kvm_pvm)\n\
             ok       /dev/kvm opens\n\
             MISSING  guest code far too slow\n         what to do: go elsewhere\n\
             This host does not run virtual machines.\n"
        );
    }
}
