//! Everything that a run needs, into `target/bulkhead`, laid out as an installation is.

use anyhow::Result;

use crate::process::{cargo, run};
use crate::project::{Project, install};
use crate::{image, kernel};

/// The programs of the host.
const PROGRAMS: [&str; 4] = [
    "bulkhead",
    "bulkhead-relay",
    "bulkhead-vmm",
    "containerd-shim-bulkhead-v2",
];

/// Builds and installs programs, guest kernel and guest image.
pub(crate) fn all(project: &Project) -> Result<()> {
    programs(project)?;
    image::install(project)?;
    let kernel = kernel::build(project)?;
    install(&kernel.vmlinux(), &project.share().join("vmlinux"))?;
    install(&kernel.bzimage(), &project.share().join("bzImage"))
}

fn programs(project: &Project) -> Result<()> {
    let mut command = cargo();
    command
        .current_dir(&project.root)
        .args(["build", "--release"]);
    for program in PROGRAMS {
        command.args(["--bin", program]);
    }
    run(&mut command)?;
    for program in PROGRAMS {
        install(
            &project.target.join("release").join(program),
            &project.bin().join(program),
        )?;
    }
    Ok(())
}
