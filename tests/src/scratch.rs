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
