//! Container images made for a test, a store for them, and `bulkhead` with both.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use rootfs_builder::digest::Digest;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{container::Run, guest::bin, scratch};

/// Seconds that a guest may take to boot in the lab.
const START_TIMEOUT: &str = "100";

/// How a layer is packed.
#[derive(Debug, Clone, Copy)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// By gzip.
    Gzip,
    /// By zstd.
    Zstd,
}

/// An image under construction, as a directory of the OCI's layout.
pub struct Layout {
    directory: TempDir,
    layers: Vec<(Value, Digest)>,
}

impl Layout {
    /// One without layers.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn new() -> Result<Self> {
        let directory = scratch::directory()?;
        fs::create_dir_all(directory.path().join("blobs/sha256"))?;
        Ok(Self {
            directory,
            layers: Vec::new(),
        })
    }

    /// One whose layer has a shell.
    ///
    /// # Errors
    /// When busybox is missing.
    pub fn with_shell() -> Result<Self> {
        let mut layout = Self::new()?;
        layout.layer(Packing::Gzip, |root| {
            for name in ["bin", "etc", "tmp"] {
                fs::create_dir(root.join(name))?;
            }
            fs::copy("/bin/busybox", root.join("bin/busybox"))
                .context("cannot copy busybox; is busybox-static installed?")?;
            let list = Command::new("/bin/busybox").arg("--list").output()?;
            for applet in String::from_utf8(list.stdout)?.lines() {
                if applet != "busybox" {
                    symlink("busybox", root.join("bin").join(applet))?;
                }
            }
            Ok(())
        })?;
        Ok(layout)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The name for `bulkhead`.
    pub fn location(&self) -> String {
        format!("oci:{}", self.path().display())
    }

    /// The file of a digest.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path().join("blobs/sha256").join(digest.hex())
    }

    /// The file of the layer that was added last.
    ///
    /// # Errors
    /// When there is none.
    pub fn last_layer(&self) -> Result<PathBuf> {
        let (layer, _) = self.layers.last().context("no layer")?;
        let digest = layer["digest"].as_str().context("no digest")?.parse()?;
        Ok(self.blob_path(&digest))
    }

    /// Adds a layer of the files that `make` makes.
    ///
    /// # Errors
    /// When `make` fails or tar does.
    pub fn layer(
        &mut self,
        packing: Packing,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let root = scratch::directory()?;
        make(root.path())?;
        let names: Vec<_> = fs::read_dir(root.path())?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<_>>()?;
        let mut tar = Command::new("tar");
        tar.args([
            "--format=pax",
            "--xattrs",
            "--xattrs-include=*",
            "--sort=name",
        ])
        .args(["--numeric-owner", "--mtime=@1600000000", "-C"])
        .arg(root.path())
        .arg("-c")
        .args(names);
        self.packed(packing, &stdout(&mut tar)?)
    }

    /// Adds a layer, an archive.
    ///
    /// # Errors
    /// When it cannot be packed.
    pub fn packed(&mut self, packing: Packing, archive: &[u8]) -> Result<()> {
        let plain = self.path().join("layer.tar");
        fs::write(&plain, archive)?;
        let (bytes, kind) = match packing {
            Packing::Plain => (archive.to_owned(), ""),
            Packing::Gzip => (
                stdout(Command::new("gzip").args(["-n1c"]).arg(&plain))?,
                "+gzip",
            ),
            Packing::Zstd => (
                stdout(Command::new("zstd").arg("-qc").arg(&plain))?,
                "+zstd",
            ),
        };
        fs::remove_file(plain)?;
        let kind = format!("application/vnd.oci.image.layer.v1.tar{kind}");
        let layer = self.blob(&kind, &bytes)?;
        self.layers.push((layer, Digest::of(archive)));
        Ok(())
    }

    /// Writes the image with what is run; returns the digest of its manifest.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, execution: &Value) -> Result<Digest> {
        self.save_for("amd64", execution)
    }

    /// As [`Layout::save`], for machines of an architecture.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save_for(&self, architecture: &str, execution: &Value) -> Result<Digest> {
        let layers: Vec<_> = self.layers.iter().map(|(layer, _)| layer).collect();
        let diff_ids: Vec<_> = self.layers.iter().map(|(_, diff_id)| diff_id).collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "created": "2020-09-13T12:26:40Z",
            "config": execution,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string();
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            config.as_bytes(),
        )?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers,
        });
        let mut entry = self.blob(kind, manifest.to_string().as_bytes())?;
        let digest = entry["digest"].as_str().context("no digest")?.parse()?;
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        fs::write(self.path().join("index.json"), index.to_string())?;
        fs::write(
            self.path().join("oci-layout"),
            r#"{"imageLayoutVersion": "1.0.0"}"#,
        )?;
        Ok(digest)
    }

    fn blob(&self, kind: &str, bytes: &[u8]) -> Result<Value> {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path(&digest), bytes)?;
        Ok(json!({"mediaType": kind, "digest": digest, "size": bytes.len()}))
    }
}

/// A store, and a directory for the state of containers.
pub struct Host {
    directory: TempDir,
    store: PathBuf,
}

impl Host {
    /// An empty one.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn new() -> Result<Self> {
        let directory = scratch::directory()?;
        let store = directory.path().join("images");
        Ok(Self { directory, store })
    }

    /// One whose store is elsewhere.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn with_store(store: PathBuf) -> Result<Self> {
        let directory = scratch::directory()?;
        Ok(Self { directory, store })
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.store.clone()
    }

    /// The disk of the only image.
    ///
    /// # Errors
    /// When there is none.
    pub fn disk(&self) -> Result<PathBuf> {
        let kept = self.kept()?;
        let disk = kept.iter().find(|path| path.ends_with("disk.erofs"));
        disk.cloned().context("no disk")
    }

    /// What is in the store, but for its lock.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn kept(&self) -> Result<Vec<PathBuf>> {
        let mut kept = Vec::new();
        let mut directories = vec![self.store()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                match path.is_dir() {
                    true => directories.push(path),
                    false if path.ends_with("lock") => {}
                    false => kept.push(path),
                }
            }
        }
        kept.sort();
        Ok(kept)
    }

    /// `bulkhead` with a command around images.
    ///
    /// # Errors
    /// When the tests were not started by `cargo xtask test`.
    pub fn command(&self, command: &str, args: &[&str]) -> Result<Command> {
        let mut bulkhead = Command::new(bin("bulkhead")?);
        bulkhead
            .arg("--root")
            .arg(self.directory.path().join("state"))
            .args([command, "--image-root"])
            .arg(self.store())
            .args(args)
            // Nobody's credentials but those of the test.
            .env("HOME", self.directory.path());
        Ok(bulkhead)
    }

    /// Runs a command around images and returns what it printed.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn bulkhead(&self, command: &str, args: &[&str]) -> Result<String> {
        let bytes = stdout(&mut self.command(command, args)?)?;
        Ok(String::from_utf8(bytes)?)
    }

    /// The one line with which a command fails.
    ///
    /// # Errors
    /// When it does not fail, or says more.
    pub fn refusal(&self, command: &str, args: &[&str]) -> Result<String> {
        let output = self.command(command, args)?.output()?;
        let line = String::from_utf8(output.stderr)?;
        ensure!(
            output.status.code() == Some(125),
            "{}: {line}",
            output.status
        );
        ensure!(line.lines().count() == 1, "{line}");
        Ok(line)
    }

    /// Runs a container and returns how it ended.
    ///
    /// # Errors
    /// As [`Host::command`].
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        let output = self.container(args)?.output()?;
        self.nothing_is_left()?;
        Ok(output)
    }

    /// `bulkhead run`, not started yet, of a container that has no network unless `args` say so.
    ///
    /// # Errors
    /// As [`Host::command`].
    pub fn run_command(&self, args: &[&str]) -> Result<Command> {
        let mut bulkhead = self.command("run", &["--start-timeout", START_TIMEOUT])?;
        bulkhead.arg("--volume-root").arg(self.volumes());
        if !args.contains(&"--network") {
            bulkhead.args(["--network", "none"]);
        }
        bulkhead.args(args);
        Ok(bulkhead)
    }

    /// Where named volumes are.
    pub fn volumes(&self) -> PathBuf {
        self.directory.path().join("volumes")
    }

    /// `bulkhead` with a command that is not around images.
    ///
    /// # Errors
    /// When the tests were not started by `cargo xtask test`.
    pub fn plain(&self, args: &[&str]) -> Result<Command> {
        let mut bulkhead = Command::new(bin("bulkhead")?);
        bulkhead.arg("--root").arg(self.state()).args(args);
        Ok(bulkhead)
    }

    /// Where the state of its containers is.
    pub fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// Fails unless everything that was made for containers is gone.
    ///
    /// # Errors
    /// When something is left.
    pub fn nothing_is_left(&self) -> Result<()> {
        for place in ["default", "bundles"] {
            let entries = fs::read_dir(self.state().join(place)).into_iter();
            let left: Vec<_> = entries.flatten().flatten().collect();
            ensure!(left.is_empty(), "state is left in {place}: {left:?}");
        }
        Ok(())
    }

    /// Starts a container with pipes.
    ///
    /// # Errors
    /// As [`Host::command`].
    pub fn container(&self, args: &[&str]) -> Result<Run> {
        self.container_of(args, |_| {})
    }

    /// As [`Host::container`], its command changed.
    ///
    /// # Errors
    /// As [`Host::command`].
    pub fn container_of(&self, args: &[&str], change: impl FnOnce(&mut Command)) -> Result<Run> {
        let mut command = self.run_command(args)?;
        change(&mut command);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Run { child })
    }
}

/// What a program printed.
fn stdout(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{:?} fails: {}",
        command.get_program(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}
