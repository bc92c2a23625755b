//! Images without a registry: one layer of busybox, in an archive as `docker save` writes it, which
//! podman, docker and containerd all load.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Its shell is the command.
pub const BUSYBOX: &str = "localhost/busybox:1";

/// Waits for its end, for a pod's first container.
pub const PAUSE: &str = "localhost/pause:1";

/// The command of [`PAUSE`].
const PAUSE_COMMAND: &str = "/pause";

const PAUSE_SCRIPT: &str = "#!/bin/sh\ntrap 'exit 0' INT TERM\nsleep 1000000 &\nwait\n";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                      user:x:1000:1000:user:/home/user:/bin/sh\n\
                      nobody:x:65534:65534:nobody:/:/bin/sh\n";

const GROUP: &str = "root:x:0:\nuser:x:1000:\nwheel:x:10:user\nnogroup:x:65534:\n";

/// Writes the archive into `directory`, with these images.
///
/// # Errors
/// When busybox or tar is missing.
pub fn archive(directory: &Path, images: &[&str]) -> Result<PathBuf> {
    let parts = tempfile::tempdir_in(directory)?;
    let root = parts.path().join("root");
    tree(&root)?;
    let layer = parts.path().join("layer.tar");
    tar(&root, &layer, &["."])?;
    let digest = Sha256::digest(fs::read(&layer)?);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();

    let mut names = vec!["manifest.json", "layer.tar"];
    let mut manifest = Vec::new();
    for image in images {
        let (file, config) = config(image);
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "created": "2020-01-01T00:00:00Z",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
            "history": [{"created": "2020-01-01T00:00:00Z", "created_by": "system tests"}],
        });
        fs::write(parts.path().join(file), config.to_string())?;
        manifest.push(json!({"Config": file, "RepoTags": [image], "Layers": ["layer.tar"]}));
        names.push(file);
    }
    let manifest = Value::from(manifest).to_string();
    fs::write(parts.path().join("manifest.json"), manifest)?;
    let archive = directory.join("images.tar");
    tar(parts.path(), &archive, &names)?;
    Ok(archive)
}

fn config(image: &str) -> (&'static str, Value) {
    let env = json!(["PATH=/bin:/usr/bin:/sbin"]);
    match image {
        PAUSE => (
            "pause.json",
            json!({"Entrypoint": [PAUSE_COMMAND], "Env": env}),
        ),
        _ => ("busybox.json", json!({"Cmd": ["/bin/sh"], "Env": env})),
    }
}

fn tree(root: &Path) -> Result<()> {
    for name in [
        "bin",
        "dev",
        "etc",
        "home/user",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
        "usr/bin",
        "var",
    ] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .context("cannot copy busybox; is busybox-static installed?")?;
    let list = Command::new("/bin/busybox").arg("--list").output()?;
    for applet in String::from_utf8(list.stdout)?.lines() {
        let link = root.join("bin").join(applet);
        if applet != "busybox" {
            symlink("busybox", link)?;
        }
    }
    fs::write(root.join("etc/passwd"), PASSWD)?;
    fs::write(root.join("etc/group"), GROUP)?;
    let pause = root.join(PAUSE_COMMAND.trim_start_matches('/'));
    fs::write(&pause, PAUSE_SCRIPT)?;
    fs::set_permissions(&pause, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The same bytes each time.
fn tar(directory: &Path, archive: &Path, names: &[&str]) -> Result<()> {
    let status = Command::new("tar")
        .arg("--directory")
        .arg(directory)
        .args([
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--sort=name",
            "--mtime=@1577836800",
        ])
        .arg("--create")
        .arg("--file")
        .arg(archive)
        .args(names)
        .status()
        .context("cannot run tar")?;
    ensure!(status.success(), "tar failed");
    Ok(())
}
