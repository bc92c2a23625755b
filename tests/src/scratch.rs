//! Places and things that tests of files and disks need.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use tempfile::{NamedTempFile, TempDir};

/// Where the lab machine has room on a file system that can do everything; its root is an
/// overlay, which cannot.
const SCRATCH: &str = "/scratch";

/// A directory of one's own.
///
/// # Errors
/// When it cannot be made.
pub fn directory() -> Result<TempDir> {
    Ok(tempfile::tempdir_in(place())?)
}

fn place() -> PathBuf {
    match Path::new(SCRATCH) {
        scratch if scratch.is_dir() => scratch.to_owned(),
        _ => std::env::temp_dir(),
    }
}

/// A sparse file of `bytes` with an ext4 file system.
///
/// # Errors
/// When `mkfs.ext4` is missing or fails.
pub fn ext4(bytes: u64) -> Result<NamedTempFile> {
    let file = NamedTempFile::new_in(place())?;
    file.as_file().set_len(bytes)?;
    // The guest's writes go to the disk at once, so no journal is missed.
    let status = Command::new("/sbin/mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-O", "^has_journal"])
        .arg(file.path())
        .status()
        .context("cannot run mkfs.ext4; is e2fsprogs installed?")?;
    ensure!(status.success(), "mkfs.ext4: {status}");
    Ok(file)
}

/// A file as a block device.
pub struct Loop {
    path: PathBuf,
}

impl Loop {
    /// Makes one.
    ///
    /// # Errors
    /// When `losetup` is missing or fails.
    pub fn new(file: &Path) -> Result<Self> {
        let output = Command::new("/sbin/losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .context("cannot run losetup")?;
        ensure!(
            output.status.success(),
            "losetup: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let path = String::from_utf8(output.stdout)?.trim_end().into();
        Ok(Self { path })
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the device away from its file and waits for a moment until nobody uses it.
    ///
    /// # Errors
    /// When it is in use for longer.
    pub fn detach(&self) -> Result<()> {
        let name = self.path.file_name().context("no name")?;
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        for _ in 0..50 {
            let status = Command::new("/sbin/losetup")
                .arg("--detach")
                .arg(&self.path)
                .status()?;
            ensure!(status.success(), "losetup --detach: {status}");
            // A device in use is only marked and goes with its last user.
            if !backing.exists() {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        anyhow::bail!("{} is still in use", self.path.display())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("/sbin/losetup")
            .arg("--detach")
            .arg(&self.path)
            .output();
    }
}

/// A pool of the device mapper that makes thin devices.
pub struct ThinPool {
    name: String,
    _devices: [Loop; 2],
    _files: [NamedTempFile; 2],
}

impl ThinPool {
    /// Makes one with room for `bytes`, named after this process.
    ///
    /// # Errors
    /// When the kernel has none, or `dmsetup` or `losetup` is missing or fails.
    pub fn new(bytes: u64) -> Result<Self> {
        // Sectors, and the sectors of a block.
        let (sectors, block) = (bytes / 512, 128);
        let file = |bytes| -> Result<NamedTempFile> {
            let file = NamedTempFile::new_in(place())?;
            file.as_file().set_len(bytes)?;
            Ok(file)
        };
        let files = [file(16 << 20)?, file(bytes)?];
        let devices = [Loop::new(files[0].path())?, Loop::new(files[1].path())?];
        let name = format!("bulkhead-tests-{}", std::process::id());
        let [about, data] = [&devices[0], &devices[1]].map(|device| device.path().display());
        let table = format!("0 {sectors} thin-pool {about} {data} {block} 0 1 skip_block_zeroing");
        dmsetup(&["create", &name, "--table", &table])?;
        Ok(Self {
            name,
            _devices: devices,
            _files: files,
        })
    }

    /// What `dmsetup` calls it.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for ThinPool {
    fn drop(&mut self) {
        // Those of the pool first: a pool in use cannot be removed.
        let devices = fs::read_dir("/dev/mapper").into_iter().flatten().flatten();
        for device in devices {
            let device = device.file_name().to_string_lossy().into_owned();
            if device.starts_with(&format!("{}-", self.name)) {
                let _ = dmsetup(&["remove", &device]);
            }
        }
        let _ = dmsetup(&["remove", &self.name]);
    }
}

fn dmsetup(args: &[&str]) -> Result<()> {
    let output = Command::new("/sbin/dmsetup")
        .args(args)
        .env("DM_DISABLE_UDEV", "1")
        .output()
        .context("cannot run dmsetup; does xtask/setup install it?")?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "dmsetup {args:?}: {told}");
    Ok(())
}

/// Loads a module of the host's kernel, unless it has it.
///
/// # Errors
/// When there is none.
pub fn module(name: &str) -> Result<()> {
    let status = Command::new("/sbin/modprobe").arg(name).status();
    let status = status.context("cannot run modprobe")?;
    ensure!(status.success(), "modprobe {name}: {status}");
    Ok(())
}

/// A program of this host that guests can run.
pub struct Program {
    name: String,
}

/// Puts a program and its libraries into `directory`.
///
/// # Errors
/// When it or one of them cannot be copied.
pub fn program(program: &str, directory: &Path) -> Result<Program> {
    let program = Path::new(program);
    let name = program
        .file_name()
        .context("no name")?
        .to_string_lossy()
        .into_owned();
    let libraries = directory.join("lib");
    fs::create_dir_all(&libraries)?;
    fs::copy(program, directory.join(&name))?;
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot run ldd")?;
    for word in String::from_utf8(output.stdout)?.split_whitespace() {
        if let (true, Some(name)) = (word.starts_with('/'), Path::new(word).file_name()) {
            fs::copy(word, libraries.join(name))?;
        }
    }
    Ok(Program { name })
}

impl Program {
    /// How to run it where its directory is `at`.
    pub fn command(&self, at: &str) -> String {
        format!(
            "{at}/lib/ld-linux-x86-64.so.2 --library-path {at}/lib {at}/{}",
            self.name
        )
    }
}

/// A file of `bytes` that are nowhere alike, which is removed when dropped.
///
/// # Errors
/// When there is no room.
pub fn noise(bytes: usize) -> Result<NamedTempFile> {
    let mut file = NamedTempFile::new_in(place())?;
    let words = (0..bytes as u32 / 4).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes());
    file.write_all(&words.collect::<Vec<u8>>())?;
    file.flush()?;
    Ok(file)
}

/// Opens a file for reading and writing.
///
/// # Errors
/// When it cannot be opened.
pub fn open(path: &Path) -> Result<File> {
    let file = File::options().read(true).write(true).open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}
