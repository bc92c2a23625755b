//! Where a container's root file system comes from, and how it gets to its
//! place in the shared tree.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
};

use protocol::{
    Disk as Slot,
    agent::{BlockRoot, Layer, LayeredRoot, RootFilesystem},
};

use super::Error;
use crate::{
    bundle::{self, Bundle, Disk},
    sandbox::{self, GUARDS, Place},
    sys::{self, Attributes},
};

/// The longest data of a mount that the kernel takes, less the null byte.
const DATA_MAX: usize = 4095;

/// Where a root file system comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Root {
    /// The directory that the bundle names.
    #[default]
    Bundle,
    /// File systems of the host to be mounted, one after the other.
    Mounts(Vec<Mount>),
    /// The machine's first image, under a layer that takes the writes.
    Image(Upper),
}

/// Where the writes to an image go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upper {
    /// Into the guest's memory.
    Memory,
    /// Onto the machine's first disk, which has a file system of this type.
    Disk(String),
}

/// A file system to be mounted, as containerd describes one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mount {
    /// The file system's type, or `bind`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Where below the root; empty is the root.
    pub target: String,
    /// Options, as `mount -o` takes them.
    pub options: Vec<String>,
}

impl Root {
    /// The disk that it is on, if it is one file system on a block device or in an image file
    /// that the guest can mount.
    pub(super) fn disk(&self) -> Result<Option<Disk>, Error> {
        match self {
            Self::Mounts(mounts) => match &mounts[..] {
                [mount] => mount.disk(),
                _ => Ok(None),
            },
            Self::Bundle | Self::Image(_) => Ok(None),
        }
    }

    /// Whether nobody can write to the disk that it is on.
    pub(super) fn is_read_only(&self) -> bool {
        matches!(self, Self::Mounts(mounts) if mounts.iter().all(Mount::is_read_only))
    }

    /// Puts it to its place and returns the guest's path of it.
    pub(super) async fn put(&self, place: &mut Place, bundle: &Bundle) -> Result<String, Error> {
        match self {
            Self::Bundle => {
                let guest = place.root(bundle.root(), bundle.given());
                Ok(guest.map_err(sandbox::Error::from)?)
            }
            Self::Mounts(mounts) => {
                let (host, guest) = place.root_to_mount_on().map_err(sandbox::Error::from)?;
                for mount in mounts {
                    mount.put(&host).map_err(|source| Error::Root {
                        what: format!("{} {:?}", mount.kind, mount.source),
                        source,
                    })?;
                }
                Ok(guest)
            }
            // Nothing of it is in the shared tree.
            Self::Image(_) => Ok("/".to_owned()),
        }
    }

    /// How the guest is told of it, whose path for it is `path`, or which has it as a `disk`.
    pub(super) fn for_guest(&self, path: String, disk: Option<Slot>) -> RootFilesystem {
        let mut root = RootFilesystem::new();
        match self {
            Self::Mounts(mounts) if let (Some(disk), [mount]) = (disk, &mounts[..]) => {
                root.set_block(mount.for_guest(disk));
            }
            Self::Bundle | Self::Mounts(_) => root.set_path(path),
            Self::Image(upper) => {
                let mut layers = LayeredRoot {
                    layers: vec![Layer {
                        source: "/dev/pmem1".to_owned(),
                        filesystem: "erofs".to_owned(),
                        ..Default::default()
                    }],
                    ..Default::default()
                };
                if let Upper::Disk(filesystem) = upper {
                    layers.upper_device = "/dev/vda".to_owned();
                    layers.upper_filesystem.clone_from(filesystem);
                }
                root.set_layers(layers);
            }
        }
        root
    }
}

impl Mount {
    /// The disk that it is of, if the guest can mount it.
    fn disk(&self) -> Result<Option<Disk>, Error> {
        let failed = |source| Error::Root {
            what: format!("{} {:?}", self.kind, self.source),
            source,
        };
        let whole = self.target.trim_start_matches('/').is_empty();
        if !whole || !bundle::is_of_disk(&self.kind) {
            return Ok(None);
        }
        if let Some(option) = self
            .options
            .iter()
            .find(|option| option.starts_with("device="))
        {
            let message = format!("the option {option:?} is not supported; an image is one file");
            return Err(failed(io::Error::new(io::ErrorKind::Unsupported, message)));
        }
        let disk = Disk::find(Path::new(&self.source), self.is_read_only());
        disk.map(Some).map_err(failed)
    }

    fn is_read_only(&self) -> bool {
        // No kernel writes to an EROFS.
        self.kind == "erofs" || self.options.iter().any(|option| option == "ro")
    }

    /// How the guest mounts it as a root. What is missing to be mounted on in a file system that
    /// cannot be written is made in a layer over it, which goes with the container.
    fn for_guest(&self, disk: Slot) -> BlockRoot {
        let options = self.options.iter().filter(|option| *option != "loop");
        BlockRoot {
            device: disk.to_string(),
            filesystem: self.kind.clone(),
            overlay: self.is_read_only(),
            options: options.cloned().collect(),
            ..Default::default()
        }
    }

    /// Mounts it at its place below `root`, whatever symbolic links are on the way there: they are
    /// the container's.
    fn put(&self, root: &Path) -> io::Result<()> {
        let root = open(root, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let target = match self.target.trim_start_matches('/') {
            "" => root,
            below => {
                let how = OpenHow::new()
                    .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
                    .resolve(ResolveFlag::RESOLVE_IN_ROOT);
                openat2(&root, below, how)?
            }
        };
        let (flags, data) = parse(&self.options)?;
        if self.kind == "bind" || flags.contains(MsFlags::MS_BIND) {
            return self.bind(&target, flags);
        }
        match data.len() > DATA_MAX {
            true => self.put_from_below(target, flags, &data),
            false => self.mount(&target, flags, &data),
        }
    }

    /// Mounts a new file system.
    fn mount(&self, target: &OwnedFd, flags: MsFlags, data: &str) -> io::Result<()> {
        let guards = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        let (source, kind) = (Some(self.source.as_str()), Some(self.kind.as_str()));
        let target = format!("/proc/self/fd/{}", target.as_raw_fd());
        mount(source, &*target, kind, flags | guards, Some(data))?;
        Ok(())
    }

    /// Mounts a directory of the host.
    fn bind(&self, target: &OwnedFd, flags: MsFlags) -> io::Result<()> {
        let recursive = flags.contains(MsFlags::MS_REC);
        let source = open(
            &*self.source,
            OFlag::O_PATH | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        let tree = sys::open_tree(source.as_fd(), recursive)?;
        let guards = Attributes {
            set: GUARDS,
            ..Attributes::default()
        };
        sys::set_attributes(tree.as_fd(), true, guards)?;
        let mut own = Attributes::default();
        if flags.contains(MsFlags::MS_RDONLY) {
            own.set |= libc::MOUNT_ATTR_RDONLY;
        }
        if flags.contains(MsFlags::MS_NOATIME) {
            own.set |= libc::MOUNT_ATTR_NOATIME;
            own.clear |= libc::MOUNT_ATTR__ATIME;
        }
        sys::set_attributes(tree.as_fd(), false, own)?;
        sys::move_mount(tree.as_fd(), target.as_fd())
    }

    /// An overlay of very many layers, whose names are too long together: mounted from the
    /// directory that they have in common.
    fn put_from_below(&self, target: OwnedFd, flags: MsFlags, data: &str) -> io::Result<()> {
        let too_long = || io::Error::new(io::ErrorKind::ArgumentListTooLong, "too many layers");
        let (common, shorter) = shortened(data).ok_or_else(too_long)?;
        if shorter.len() > DATA_MAX {
            return Err(too_long());
        }
        // A thread of its own may have a working directory of its own.
        let mount = self.clone();
        let thread = std::thread::Builder::new()
            .name("mount".to_owned())
            .spawn(move || {
                unshare(CloneFlags::CLONE_FS)?;
                nix::unistd::chdir(&common)?;
                mount.mount(&target, flags, &shorter)
            })?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the mounting thread failed")))
    }
}

/// Flags and the file system's own data.
fn parse(options: &[String]) -> io::Result<(MsFlags, String)> {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" | "defaults" | "suid" | "dev" | "exec" | "atime" => {}
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "loop" => {
                let message = "an image file is mounted by the guest, which has ext4 and erofs, and \
                               not below other mounts; use such a file system, or a snapshotter \
                               whose root file systems are directories, such as overlayfs";
                return Err(io::Error::new(io::ErrorKind::Unsupported, message));
            }
            other => data.push(other),
        }
    }
    Ok((flags, data.join(",")))
}

/// An overlay's data with its lower layers relative to the directory above all of them.
fn shortened(data: &str) -> Option<(PathBuf, String)> {
    let lower = data
        .split(',')
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let common = layers[0]
        .ancestors()
        .skip(1)
        .find(|above| layers.iter().all(|layer| layer.starts_with(above)))?;
    let relative: Option<Vec<&str>> = layers
        .iter()
        .map(|layer| layer.strip_prefix(common).ok()?.to_str())
        .collect();
    let options = data
        .split(',')
        .map(|option| match option.starts_with("lowerdir=") {
            true => format!(
                "lowerdir={}",
                relative
                    .as_ref()
                    .map_or(String::new(), |names| names.join(":"))
            ),
            false => option.to_owned(),
        });
    let options: Vec<String> = options.collect();
    relative.as_ref()?;
    Some((common.to_owned(), options.join(",")))
}

#[cfg(test)]
mod tests {
    use nix::sys::statvfs::{FsFlags, statvfs};

    use super::*;

    #[test]
    fn flags_are_told_from_the_file_systems_own_options() {
        let options = ["ro", "nodev", "lowerdir=/a:/b", "index=off"].map(str::to_owned);
        let (flags, data) = parse(&options).expect("parsed");
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
        assert_eq!(data, "lowerdir=/a:/b,index=off");
    }

    #[test]
    fn many_layers_are_named_from_the_directory_above_them() {
        let data = "index=off,lowerdir=/var/s/12/fs:/var/s/3/fs,upperdir=/var/s/13/fs";
        let (common, shorter) = shortened(data).expect("an overlay");
        assert_eq!(common, Path::new("/var/s"));
        assert_eq!(
            shorter,
            "index=off,lowerdir=12/fs:3/fs,upperdir=/var/s/13/fs"
        );
    }

    #[test]
    fn a_loop_mount_is_refused_with_a_way_out() {
        let error = parse(&["loop".to_owned()]).expect_err("refused");
        assert!(error.to_string().contains("overlayfs"), "{error}");
    }

    fn only(kind: &str, source: &Path, options: &[&str]) -> Root {
        Root::Mounts(vec![Mount {
            kind: kind.to_owned(),
            source: source.display().to_string(),
            target: String::new(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        }])
    }

    #[test]
    fn a_mount_is_guarded_and_stays_below_the_root_whatever_links_are_there() {
        sys::apart(|| {
            let directory = tempfile::tempdir().expect("a directory");
            let [root, files, outside] = ["root", "files", "outside"].map(|name| {
                let path = directory.path().join(name);
                std::fs::create_dir(&path).expect("made");
                path
            });
            std::fs::create_dir(files.join("outside")).expect("made");
            std::os::unix::fs::symlink(&outside, files.join("link")).expect("a link");
            let put = |kind: &str, source: &Path, target: &str, options: &[&str]| {
                let mount = Mount {
                    kind: kind.to_owned(),
                    source: source.display().to_string(),
                    target: target.to_owned(),
                    options: options.iter().map(|&option| option.to_owned()).collect(),
                };
                mount.put(&root)
            };
            put("bind", &files, "", &["rbind", "ro"]).expect("the root");
            let flags = |path: &Path| statvfs(path).expect("there").flags();
            let guards = FsFlags::ST_NODEV | FsFlags::ST_NOSUID | FsFlags::ST_NOEXEC;
            assert!(flags(&root).contains(guards | FsFlags::ST_RDONLY));
            // The link leads to a place outside, of which there is one inside, too, by another name.
            put("tmpfs", Path::new("none"), "/link", &[]).expect_err("nothing there");
            put("tmpfs", Path::new("none"), "../outside", &["size=4k"]).expect("mounted");
            assert!(flags(&root.join("outside")).contains(guards));
            assert!(!flags(&root.join("outside")).contains(FsFlags::ST_RDONLY));
            std::fs::write(outside.join("new"), "").expect("the host's own is not covered");
            assert!(!root.join("outside/new").exists());
        });
    }

    #[test]
    fn an_image_file_becomes_a_disk() {
        let image = tempfile::NamedTempFile::new().expect("a file");
        let root = only("ext4", image.path(), &["loop", "noatime"]);
        let disk = root.disk().expect("there").expect("a disk");
        assert!(!disk.read_only());
        let slot = Slot::in_slot(9).expect("a slot");
        let told = root.for_guest(String::new(), Some(slot));
        let block = told.block();
        assert_eq!(block.device, "/run/bulkhead/disks/9");
        assert_eq!(
            (block.overlay, &block.options[..]),
            (false, &["noatime".to_owned()][..])
        );
    }

    #[test]
    fn what_cannot_be_written_is_read_only_and_has_a_layer_for_mount_points() {
        let image = tempfile::NamedTempFile::new().expect("a file");
        let slot = Slot::in_slot(9).expect("a slot");
        for root in [
            only("ext4", image.path(), &["ro"]),
            only("erofs", image.path(), &[]),
        ] {
            assert!(root.disk().expect("there").expect("a disk").read_only());
            assert!(root.for_guest(String::new(), Some(slot)).block().overlay);
        }
    }

    #[test]
    fn what_the_guest_cannot_mount_is_no_disk() {
        let image = tempfile::NamedTempFile::new().expect("a file");
        assert!(
            only("xfs", image.path(), &[])
                .disk()
                .expect("read")
                .is_none()
        );
        let error = only("ext4", Path::new("/nonexistent/i"), &[])
            .disk()
            .expect_err("missing");
        assert!(error.to_string().contains("/nonexistent/i"), "{error}");
        let error = only("erofs", image.path(), &["device=/b"])
            .disk()
            .expect_err("two files");
        assert!(crate::text::chain(&error).contains("device=/b"), "{error}");
    }
}
