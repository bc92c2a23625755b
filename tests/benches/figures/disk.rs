//! Exits for each 4 KiB block that a guest reads from a disk, one at a time.
//!
//! The guest is busybox alone: it reads a number of blocks past its page cache and ends. The
//! difference of two such guests is the reading's alone.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rootfs_builder::erofs;
use rootfs_builder::tree::{Node, Tree};
use serde_json::json;
use system_tests::guest::{bin, share};

use crate::RUNS;
use crate::exits::Exits;
use crate::report::Report;

/// Blocks that the two guests read.
const BLOCKS: [u64; 2] = [100, 1100];

/// The guest's first process, given the number of blocks.
const SCRIPT: &str = "#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b dd if=/dev/vda of=/dev/null bs=4096 count=COUNT iflag=direct 2>/dev/null
$b poweroff -f
";

/// Takes [`RUNS`] differences.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0xa5; 16 << 20])?;
    let images = BLOCKS.map(|count| image(dir.path(), count));
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let mut exits = [0; 2];
        for (exits, image) in exits.iter_mut().zip(&images) {
            let image = image
                .as_ref()
                .map_err(|error| anyhow::anyhow!("{error:#}"))?;
            *exits = read(image, &disk)?;
        }
        runs.push((exits[1] as f64 - exits[0] as f64) / (BLOCKS[1] - BLOCKS[0]) as f64);
    }
    report.add("blk.exits_per_4k_read", "exits", &runs);
    Ok(())
}

/// A guest image of busybox that reads `count` blocks.
fn image(dir: &Path, count: u64) -> Result<std::path::PathBuf> {
    let script = dir.join(format!("init-{count}"));
    fs::write(&script, SCRIPT.replace("COUNT", &count.to_string()))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let mut tree = Tree::new();
    for path in ["bin", "dev"] {
        tree.add(path, Node::Directory { mode: 0o755 })?;
    }
    tree.add(
        "bin/busybox",
        Node::File {
            mode: 0o755,
            source: "/bin/busybox".into(),
        },
    )?;
    tree.add(
        "init",
        Node::File {
            mode: 0o755,
            source: script,
        },
    )?;
    let image = dir.join(format!("guest-{count}.img"));
    erofs::build(&tree, [0; 16], &image)?;
    Ok(image)
}

/// Runs one guest to its end and returns the exits it took that reached the monitor.
fn read(image: &Path, disk: &Path) -> Result<u64> {
    let config = json!({
        "boot": {
            "kernel": {"path": share("vmlinux")?},
            "image": {"path": image},
            "cmdline": shim::sandbox::cmdline(),
        },
        "memory_mib": 128,
        "devices": [{"kind": "blk", "disk": {"path": disk}, "read_only": true}],
    });
    let file = image.with_extension("json");
    serde_json::to_writer(File::create(&file)?, &config)?;
    let exits = Exits::count()?;
    let status = Command::new(bin("bulkhead-vmm")?)
        .arg("--config")
        .arg(&file)
        .stdin(Stdio::null())
        .status()
        .context("cannot start bulkhead-vmm")?;
    // a guest that powers off has done what it should; one that panics resets
    ensure!(status.success(), "the guest ended badly: {status}");
    Ok(exits.read()?.device_accesses())
}
