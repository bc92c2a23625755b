//! What of the host a virtual machine is made from, found and opened.

use std::{
    env,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

/// The files that come with Bulkhead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// KVM's device file.
    pub kvm: PathBuf,
    /// The program that runs the machine.
    pub vmm: PathBuf,
    /// The guest's kernel, a vmlinux.
    pub kernel: PathBuf,
    /// The guest's root file system with the agent, an EROFS image.
    pub image: PathBuf,
}

/// They, opened, with KVM.
#[derive(Debug)]
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// [`Files::vmm`], as a place only.
    pub vmm: OwnedFd,
    /// [`Files::kernel`].
    pub kernel: OwnedFd,
    /// [`Files::image`].
    pub image: OwnedFd,
}

/// Why something is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No hardware virtualization, or none for us.
    #[error("cannot open {}: {advice}", path.display())]
    Kvm {
        /// Where.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be opened.
    #[error("cannot open the {what} {}; {advice}", path.display())]
    Open {
        /// Which.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another kind of file.
    #[error("the guest image {} is not an EROFS file system; build it with `make`, or name another with --image", path.display())]
    NotAnImage {
        /// Where.
        path: PathBuf,
    },
    /// A part of the image is missing.
    #[error("the guest image {} is truncated: it has {length} bytes of {wanted}; build it again with `make`", path.display())]
    Truncated {
        /// Where.
        path: PathBuf,
        /// Its length.
        length: u64,
        /// What its superblock says.
        wanted: u64,
    },
}

impl Files {
    /// Where they lie beside the running program: installed as `bin/` and `share/bulkhead/`, or
    /// in the build's own directory.
    pub fn beside_program() -> Self {
        let program = env::current_exe().unwrap_or_default();
        let bin = program.parent().unwrap_or(Path::new("/usr/bin"));
        let prefix = bin.parent().unwrap_or(Path::new("/usr"));
        // Installed, or in cargo's directory, into which `make` installs.
        let places = ["share/bulkhead", "bulkhead/share/bulkhead"].map(|place| prefix.join(place));
        let [installed, built] = places;
        let share = match installed.is_dir() || !built.is_dir() {
            true => installed,
            false => built,
        };
        Self {
            kvm: PathBuf::from("/dev/kvm"),
            vmm: bin.join("bulkhead-vmm"),
            kernel: share.join("vmlinux"),
            image: share.join("guest.img"),
        }
    }
}

impl Resources {
    /// Opens all of them.
    ///
    /// # Errors
    /// When one is missing, not ours to open, or not what it should be.
    pub fn open(files: &Files) -> Result<Self, Error> {
        let opened = Self {
            kvm: open_kvm(&files.kvm)?,
            vmm: open(
                &files.vmm,
                "VMM",
                libc::O_PATH,
                "build it with `make`, or name another with --vmm",
            )?
            .into(),
            kernel: open(
                &files.kernel,
                "guest kernel",
                0,
                "build it with `make`, or name another with --kernel",
            )?
            .into(),
            image: open_image(&files.image)?.into(),
        };
        Ok(opened)
    }
}

/// Opens a directory that is to be shared with the guest.
///
/// # Errors
/// When it is no directory.
pub fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path)
        .map(OwnedFd::from)
}

/// Opens KVM's device file.
///
/// # Errors
/// When it is missing or not ours to open; the error says what to do.
pub fn open_kvm(path: &Path) -> Result<OwnedFd, Error> {
    let kvm = OpenOptions::new().read(true).write(true).open(path);
    kvm.map(OwnedFd::from).map_err(|source| {
        let advice = match source.kind() {
            io::ErrorKind::NotFound => {
                "this kernel has no KVM; load kvm_amd or kvm_intel, and enable virtualization in \
                 the firmware or, in a virtual machine, nested virtualization"
            }
            io::ErrorKind::PermissionDenied => {
                "no permission; run as root or join the group that owns it, mostly `kvm`"
            }
            _ => "see `bulkhead check`",
        };
        Error::Kvm {
            path: path.to_owned(),
            advice,
            source,
        }
    })
}

fn open(path: &Path, what: &'static str, flags: i32, advice: &'static str) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|source| Error::Open {
            what,
            path: path.to_owned(),
            advice,
            source,
        })
}

fn open_image(path: &Path) -> Result<File, Error> {
    let image = open(
        path,
        "guest image",
        0,
        "build it with `make`, or name another with --image",
    )?;
    let mut superblock = [0; 128];
    // A shorter file is no image, as the zeroes then say.
    let _ = image.read_exact_at(&mut superblock, 1024);
    let length = image.metadata().map_or(0, |metadata| metadata.len());
    match image_length(&superblock) {
        None => Err(Error::NotAnImage {
            path: path.to_owned(),
        }),
        Some(wanted) if wanted > length => Err(Error::Truncated {
            path: path.to_owned(),
            length,
            wanted,
        }),
        Some(_) => Ok(image),
    }
}

/// How long an EROFS image is by its superblock, which begins at byte 1024.
fn image_length(superblock: &[u8; 128]) -> Option<u64> {
    const MAGIC: u32 = 0xe0f5_e1e2;
    let field = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| superblock[at + i]));
    let block_bits = superblock[12];
    (field(0) == MAGIC && (9..=16).contains(&block_bits))
        .then(|| u64::from(field(36)) << block_bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(blocks: u32, length: usize) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut bytes = vec![0; length];
        bytes[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        bytes[1036] = 12;
        bytes[1060..1064].copy_from_slice(&blocks.to_le_bytes());
        std::fs::write(file.path(), bytes).expect("written");
        file
    }

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let error = open_kvm(Path::new("/nonexistent/kvm")).expect_err("refused");
        let text = error.to_string();
        assert!(
            text.contains("/nonexistent/kvm") && text.contains("kvm_amd"),
            "{text}"
        );
    }

    #[test]
    fn a_whole_image_is_opened() {
        assert!(open_image(image(2, 8192).path()).is_ok());
    }

    #[test]
    fn a_truncated_image_is_refused_with_both_lengths() {
        let error = open_image(image(3, 8192).path()).expect_err("refused");
        assert!(error.to_string().contains("8192 bytes of 12288"), "{error}");
    }

    #[test]
    fn a_file_of_another_kind_is_no_image() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        assert!(matches!(
            open_image(file.path()),
            Err(Error::NotAnImage { .. })
        ));
    }

    #[test]
    fn a_missing_file_is_named_with_the_way_out() {
        let error = open_image(Path::new("/nonexistent/guest.img")).expect_err("refused");
        let text = error.to_string();
        assert!(
            text.contains("/nonexistent/guest.img") && text.contains("--image"),
            "{text}"
        );
    }
}
