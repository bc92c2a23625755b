//! A container in its own virtual machine, on input that is not ours: a Debian root file system
//! made by mmdebstrap and a `config.json` made by `runc spec`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::build;
use crate::debian;
use crate::lab::Place;
use crate::process::{output, run};
use crate::project::Project;

/// What runs in the container.
const WORKLOAD: &str = include_str!("workload.py");

/// What is changed in the output of `runc spec`, as a program of jq.
const EDITS: &str = r#".process.terminal = false
| .process.args = ["python3", "-c", $workload]
| .root.path = $rootfs
| .mounts += [{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}]"#;

/// Seconds for the whole demonstration in the lab.
const LAB_TIMEOUT_S: &str = "600";

/// Builds everything, then runs the container where KVM works.
pub(crate) fn show(project: &Project) -> Result<()> {
    build::all(project)?;
    let rootfs = debian::root(&project.cache, "debian-12-python3", "python3")?;
    let bundle = project.target.join("demo");
    write_bundle(&bundle, &rootfs)?;

    let place = Place::find(project)?;
    place.announce("the container and its VM");
    println!(
        "host's kernel:      {}",
        output(Command::new("uname").arg("-r"))?.trim()
    );
    let status = place
        .command(
            &["--timeout", LAB_TIMEOUT_S],
            project.bin().join("bulkhead"),
        )
        .args(["run", "--trace", "--bundle"])
        .arg(&bundle)
        .arg("demo")
        .status()
        .context("cannot start the container")?;
    println!(
        "exit status:        {}",
        status.code().context("bulkhead was killed")?
    );
    anyhow::ensure!(status.success(), "the container failed");
    Ok(())
}

/// Makes a bundle: what `runc spec` writes, with [`EDITS`].
fn write_bundle(bundle: &Path, rootfs: &Path) -> Result<()> {
    if bundle.exists() {
        fs::remove_dir_all(bundle).with_context(|| format!("cannot empty {}", bundle.display()))?;
    }
    fs::create_dir_all(bundle).with_context(|| format!("cannot create {}", bundle.display()))?;
    run(Command::new("runc").args(["spec", "--bundle"]).arg(bundle))?;
    let config = bundle.join("config.json");
    println!("config.json is that of `runc spec`, edited by jq:\n\n{EDITS}\n");
    let edited = output(
        Command::new("jq")
            .args(["--arg", "workload", WORKLOAD, "--arg", "rootfs"])
            .arg(rootfs)
            .arg(EDITS)
            .arg(&config),
    )?;
    fs::write(&config, edited).with_context(|| format!("cannot write {}", config.display()))
}
