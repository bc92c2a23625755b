//! The static agent and the guest image around it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rootfs_builder::guest;

use crate::process::{cargo, run};
use crate::project::Project;

/// The agent's target: named even on the same architecture, so that build scripts and
/// procedural macros are not linked statically too.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the agent and installs the guest image, in both forms: `guest.img` and `guest.cpio`.
pub(crate) fn install(project: &Project) -> Result<()> {
    let agent = build_agent(project)?;
    let share = project.share();
    fs::create_dir_all(&share).with_context(|| format!("cannot create {}", share.display()))?;
    guest::write_erofs(&agent, &share.join("guest.img"))?;
    guest::write_cpio(&agent, &share.join("guest.cpio"))?;
    Ok(())
}

/// Builds the agent as one static program and returns where it is.
fn build_agent(project: &Project) -> Result<PathBuf> {
    run(cargo()
        .current_dir(&project.root)
        .args([
            "build",
            "--package",
            "agent",
            "--profile",
            "guest",
            "--target",
            TARGET,
        ])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("LIBSECCOMP_LINK_TYPE", "static")
        .env("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu"))?;
    Ok(project.target.join(TARGET).join("guest/bulkhead-agent"))
}
