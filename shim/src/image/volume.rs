//! Named volumes: directories that outlive the containers that have them.
//!
//! ```text
//!   <root>/<name>/_data      what containers mount
//! ```
//!
//! A container holds a lock on each volume that it has; one that is locked is not removed.

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, PermissionsExt, lchown, symlink},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use rootfs_builder::erofs::{Found, Image, ReadError};

/// Where the files of a volume are, in its directory.
const DATA: &str = "_data";

/// As many directories within one another are copied.
const DEPTH_MAX: usize = 256;

/// Why a volume cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No name.
    #[error(
        "{0:?} is no name of a volume: letters, digits, `_`, `.` and `-`, the first a letter or digit"
    )]
    Name(String),
    /// There is none.
    #[error("there is no volume {0:?}")]
    Unknown(String),
    /// A container has it.
    #[error("the volume {0:?} is in use; remove the containers that have it first")]
    InUse(String),
    /// The file system.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What the image has there.
    #[error("cannot copy {path:?} of the image into the volume")]
    Image {
        /// Where the image has it.
        path: String,
        /// Why.
        #[source]
        source: ReadError,
    },
}

/// The volumes below a directory.
#[derive(Debug, Clone)]
pub struct Volumes(PathBuf);

/// A volume in use. It is not removed as long as this lives.
#[derive(Debug)]
pub struct Used {
    /// The directory to mount.
    pub path: PathBuf,
    _lock: Flock<File>,
}

impl Volumes {
    /// Those below `root`.
    pub fn new(root: &Path) -> Self {
        Self(root.to_owned())
    }

    /// Makes one, if there is none of that name.
    ///
    /// # Errors
    /// When it cannot be made, or the name is none.
    pub fn create(&self, name: &str) -> Result<(), Error> {
        self.make(name).map(drop)
    }

    /// Makes it if there is none, and holds it. An empty one that no other container has gets what
    /// the image has at `place`, if there is an image.
    ///
    /// # Errors
    /// When it cannot be made, or the name is none.
    pub fn take(&self, name: &str, image: Option<(&Image<'_>, &str)>) -> Result<Used, Error> {
        // Nobody else fills it meanwhile, or removes it.
        let _turn = self.make(name)?;
        let path = self.data(name);
        let open = || {
            let place = self.0.join(name);
            File::open(&place).map_err(failed("open", &place))
        };
        // A container that had the volume could put a link where a directory was just made, and
        // lead the copy out of it.
        let alone = match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
            Ok(alone) => Some(alone),
            Err((_, Errno::EWOULDBLOCK)) => None,
            Err((_, errno)) => return Err(failed("lock", &path)(errno.into())),
        };
        let empty = || Ok(fs::read_dir(&path)?.next().is_none());
        if let (Some((image, place)), Some(_)) = (image, &alone)
            && empty().map_err(failed("read", &path))?
        {
            let from = |source| Error::Image {
                path: place.to_owned(),
                source,
            };
            if let Some(found) = image.find(place).map_err(from)?
                && found.is_directory()
            {
                copy(image, &found, &path, place, 0)?;
            }
        }
        // Whoever else makes, takes or removes one waits for its turn.
        drop(alone);
        let lock = Flock::lock(open()?, FlockArg::LockShared)
            .map_err(|(_, errno)| failed("lock", &path)(errno.into()))?;
        Ok(Used { path, _lock: lock })
    }

    /// The names of all, in order.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("read", &self.0)(error)),
        };
        let names = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            self.data(&name).is_dir().then_some(name)
        });
        let mut names: Vec<String> = names.collect();
        names.sort();
        Ok(names)
    }

    /// Removes one with all that is in it.
    ///
    /// # Errors
    /// When there is none, a container has it, or the file system refuses.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let place = self.checked(name)?;
        let unknown = || Error::Unknown(name.to_owned());
        let _turn = self.turn()?;
        let file = File::open(&place).map_err(|_| unknown())?;
        let _alone = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(alone) => alone,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(Error::InUse(name.to_owned()));
            }
            Err((_, errno)) => return Err(failed("lock", &place)(errno.into())),
        };
        fs::remove_dir_all(&place).map_err(failed("remove", &place))
    }

    /// The directory that containers mount.
    pub fn data(&self, name: &str) -> PathBuf {
        self.0.join(name).join(DATA)
    }

    fn make(&self, name: &str) -> Result<Flock<File>, Error> {
        let place = self.checked(name)?;
        directory(0o711, &self.0)?;
        let turn = self.turn()?;
        directory(0o755, &place)?;
        directory(0o755, &place.join(DATA))?;
        Ok(turn)
    }

    /// The right to make and remove.
    fn turn(&self) -> Result<Flock<File>, Error> {
        let file = File::open(&self.0).map_err(failed("open", &self.0))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed("lock", &self.0)(errno.into()))
    }

    fn checked(&self, name: &str) -> Result<PathBuf, Error> {
        let fit = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let first = name.bytes().next();
        match first.is_some_and(|byte| byte.is_ascii_alphanumeric()) && name.bytes().all(fit) {
            true => Ok(self.0.join(name)),
            false => Err(Error::Name(name.to_owned())),
        }
    }
}

/// Copies a directory's attributes and what is in it into `to`, a directory that is ours alone.
fn copy(
    image: &Image<'_>,
    directory: &Found,
    to: &Path,
    place: &str,
    depth: usize,
) -> Result<(), Error> {
    let from = |source| Error::Image {
        path: place.to_owned(),
        source,
    };
    let strange = |what| from(ReadError::Format(what));
    if depth == DEPTH_MAX {
        return Err(strange("its directories lie too deep within one another"));
    }
    for (name, nid) in image.names(directory).map_err(from)? {
        if name.is_empty() || name.contains(&b'/') || name == b"." || name == b".." {
            return Err(strange("a name has a slash"));
        }
        let found = image.inode(nid).map_err(from)?;
        let name = OsStr::from_bytes(&name);
        let path = to.join(name);
        match found.mode & 0o170_000 {
            0o040_000 => {
                fs::create_dir(&path).map_err(failed("make", &path))?;
                copy(image, &found, &path, place, depth + 1)?;
            }
            0o100_000 => {
                let mut file = File::create_new(&path).map_err(failed("make", &path))?;
                image.copy(&found, &mut file).map_err(from)?;
                attributes(&found, &path)?;
            }
            0o120_000 => {
                let target = image.read(&found, 4096).map_err(from)?;
                let target = OsStr::from_bytes(&target);
                symlink(target, &path).map_err(failed("make", &path))?;
                let (user, group) = (Some(found.uid), Some(found.gid));
                lchown(&path, user, group).map_err(failed("change the owner of", &path))?;
            }
            _ => {
                tracing::warn!(path = %path.display(), "a volume gets no devices, pipes and sockets of the image")
            }
        }
    }
    attributes(directory, to)
}

fn attributes(found: &Found, path: &Path) -> Result<(), Error> {
    let (user, group) = (Some(found.uid), Some(found.gid));
    lchown(path, user, group).map_err(failed("change the owner of", path))?;
    let mode = Permissions::from_mode(u32::from(found.mode) & 0o7777);
    fs::set_permissions(path, mode).map_err(failed("change the mode of", path))
}

fn directory(mode: u32, path: &Path) -> Result<(), Error> {
    match DirBuilder::new().recursive(true).mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(failed("make", path)),
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        doing,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::soon;

    #[test]
    fn a_volume_is_made_kept_listed_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(&root.path().join("volumes"));
        assert!(volumes.names().unwrap().is_empty());
        volumes.create("data").unwrap();
        let used = volumes.take("data", None).unwrap();
        let second = volumes.take("data", None).unwrap();
        fs::write(used.path.join("file"), "x").unwrap();
        assert_eq!(volumes.names().unwrap(), ["data"]);
        let error = volumes.remove("data").unwrap_err();
        assert!(matches!(error, Error::InUse(_)), "{error}");
        drop((used, second));
        let used = volumes.take("data", None).unwrap();
        assert_eq!(fs::read(used.path.join("file")).unwrap(), b"x");
        drop(used);
        soon(|| volumes.remove("data").ok());
        assert!(volumes.names().unwrap().is_empty());
        let error = volumes.remove("data").unwrap_err();
        assert_eq!(error.to_string(), "there is no volume \"data\"");
    }

    #[test]
    fn only_a_volume_that_no_other_container_has_is_filled() {
        use rootfs_builder::{
            erofs,
            tree::{Node, Tree},
        };
        let root = tempfile::tempdir().unwrap();
        let source = root.path().join("source");
        fs::write(&source, "of the image").unwrap();
        let mut tree = Tree::new();
        tree.add("data", Node::Directory { mode: 0o755 }).unwrap();
        tree.add(
            "data/file",
            Node::File {
                mode: 0o644,
                source,
            },
        )
        .unwrap();
        let disk = root.path().join("disk");
        erofs::build(&tree, [0; 16], &disk).unwrap();
        let disk = File::open(disk).unwrap();
        let image = Image::open(&disk).unwrap();

        let volumes = Volumes::new(&root.path().join("volumes"));
        let other = volumes.take("v", None).unwrap();
        let used = volumes.take("v", Some((&image, "/data"))).unwrap();
        assert!(fs::read_dir(&used.path).unwrap().next().is_none());
        drop((other, used));
        let file = soon(|| {
            let used = volumes.take("v", Some((&image, "/data"))).unwrap();
            fs::read(used.path.join("file")).ok()
        });
        assert_eq!(file, b"of the image");
    }

    #[test]
    fn names_cannot_lead_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(root.path());
        for name in ["", ".", "..", "../x", "a/b", "-a", "a b", "ä"] {
            assert!(
                matches!(volumes.create(name), Err(Error::Name(_))),
                "{name}"
            );
            assert!(
                matches!(volumes.remove(name), Err(Error::Name(_))),
                "{name}"
            );
        }
    }
}
