//! Images kept on this host, each made once.
//!
//! ```text
//!   lock                 held by whoever changes something
//!   names.json           what a name leads to
//!   <id>-v1/             one image, by the digest of its configuration and the form of its disk
//!     disk.erofs         its files
//!     config.json        its configuration
//!     manifest.json      its manifest, where it had one
//!     record.json        digest of the disk, and how it is recognized
//!   making/              images under way; what is in it while nobody holds the lock is a leftover
//!   downloads/           layers that were fetched, `.part` where not wholly
//! ```
//!
//! An image appears by a rename, whole and on disk, or not at all. Readers take no lock: a removed
//! image lives on for those who have its disk open.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::json::Config;
use super::{Image, Source, build};
use crate::digest::{Digest, Hashing};
use crate::layer::Limits;
use crate::sys;

/// The form of disks: another one is made anew.
const FORMAT: u32 = 1;

/// What a download under way ends with.
pub const PART_SUFFIX: &str = ".part";

const NAMES: &str = "names.json";
const DISK: &str = "disk.erofs";

/// The fewest digits of an id that may stand for it.
const PREFIX_MIN: usize = 4;

/// Why the store does not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step on the file system failed.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file of the store that cannot be understood.
    #[error("{} is damaged; remove it and pull its images again", path.display())]
    Damaged {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A disk that is not what was made.
    #[error(
        "the image {} changed since it was made; remove it with `bulkhead rmi` and pull it again",
        path.display()
    )]
    Changed {
        /// Where.
        path: PathBuf,
    },
    /// An image that is of no use.
    #[error(transparent)]
    Image(#[from] super::Error),
    /// No such image.
    #[error("no image {0:?} is kept here; `bulkhead images` lists those that are")]
    Unknown(String),
    /// An id's begin that several have.
    #[error("{0:?} is the begin of several ids; give more of its digits")]
    Ambiguous(String),
    /// An id that more than one name leads to.
    #[error("the image has several names: {}; remove them one by one, or all with --force", names.join(", "))]
    Named {
        /// The names.
        names: Vec<String>,
    },
}

/// The store.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// An image that is kept.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its id.
    pub id: Digest,
    directory: PathBuf,
}

/// What is known of an image's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The digest of the disk.
    pub disk: Digest,
    /// Its length.
    pub length: u64,
    /// By what the kernel checks each page of it, where its file system can do that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verity: Option<Digest>,
    /// When it was added, in seconds since the epoch.
    pub added: u64,
    /// The file as it was last known to be right.
    seen: Seen,
}

/// What of a file changes when it is written to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    device: u64,
    inode: u64,
    length: u64,
    /// Seconds and nanoseconds.
    mtime: (i64, i64),
    ctime: (i64, i64),
}

/// What a name leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    /// The image.
    pub id: Digest,
    /// The digest of the manifest or index that the name had where it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// An image in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its id.
    pub id: Digest,
    /// Its names and what they had as digests.
    pub names: Vec<(String, Option<Digest>)>,
    /// What is known of its disk.
    pub record: Record,
    /// When it was made, as its maker says.
    pub created: Option<String>,
    /// What it takes on this host.
    pub used_bytes: u64,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that lead to nothing now.
    pub names: Vec<String>,
    /// Images that are gone.
    pub images: Vec<Digest>,
}

/// What a cleaning gave back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Freed {
    /// Images that are gone.
    pub images: Vec<Digest>,
    /// Bytes of them and of unfinished things.
    pub bytes: u64,
}

impl Store {
    /// The store in a directory, which is made where it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn open(root: &Path) -> Result<Self, Error> {
        private().create(root).map_err(failed("make", root))?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Where layers are kept that were fetched.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn downloads(&self) -> Result<PathBuf, Error> {
        let path = self.root.join("downloads");
        private().create(&path).map_err(failed("make", &path))?;
        Ok(path)
    }

    /// The image of an id, where it is kept.
    #[must_use]
    pub fn get(&self, id: Digest) -> Option<Stored> {
        let directory = self.root.join(directory_of(id));
        let stored = Stored { id, directory };
        stored.directory.is_dir().then_some(stored)
    }

    /// The image of a name, or of the begin of an id; `None` where there is none.
    ///
    /// # Errors
    ///
    /// When several ids begin so, or the names cannot be read.
    pub fn find(&self, query: &str) -> Result<Option<Stored>, Error> {
        if let Some(name) = self.names()?.get(query) {
            return Ok(self.get(name.id));
        }
        let digits = query.strip_prefix("sha256:").unwrap_or(query);
        let hexadecimal = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        if digits.len() < PREFIX_MIN || !hexadecimal {
            return Ok(None);
        }
        let mut found = self
            .ids()?
            .into_iter()
            .filter(|id| id.hex().starts_with(digits));
        match (found.next(), found.next()) {
            (Some(id), None) => Ok(self.get(id)),
            (Some(_), Some(_)) => Err(Error::Ambiguous(query.to_owned())),
            (None, _) => Ok(None),
        }
    }

    /// What every name leads to.
    ///
    /// # Errors
    ///
    /// When that cannot be read.
    pub fn names(&self) -> Result<BTreeMap<String, Name>, Error> {
        let path = self.root.join(NAMES);
        match fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|source| Error::Damaged { path, source })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(source) => Err(failed("read", &path)(source)),
        }
    }

    /// Adds an image, unless it is kept already. It is made under a lock: a second one that comes
    /// at the same time waits and finds it. `progress` is told how many bytes of its layers were
    /// read.
    ///
    /// # Errors
    ///
    /// When the image is of no use or cannot be kept; nothing is left of it then.
    pub fn add(
        &self,
        image: &Image,
        source: &Source,
        limits: Limits,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Stored, Error> {
        if let Some(stored) = self.get(image.id) {
            return Ok(stored);
        }
        let _turn = self.turn()?;
        if let Some(stored) = self.get(image.id) {
            return Ok(stored);
        }
        let making = self.root.join("making");
        // Whoever left something there is dead.
        remove_tree(&making)?;
        let new = making.join("image");
        private().create(&new).map_err(failed("make", &new))?;
        let made = make(&new, image, source, limits, progress).and_then(|()| {
            let directory = self.root.join(directory_of(image.id));
            fs::rename(&new, &directory).map_err(failed("make", &directory))?;
            Ok(Stored {
                id: image.id,
                directory,
            })
        });
        remove_tree(&making)?;
        sync(&self.root)?;
        made
    }

    /// Lets names lead to an image.
    ///
    /// # Errors
    ///
    /// When that cannot be written.
    pub fn name(&self, names: &[String], name: &Name) -> Result<(), Error> {
        let _turn = self.turn()?;
        let mut all = self.names()?;
        all.extend(names.iter().map(|text| (text.clone(), name.clone())));
        self.write_names(&all)
    }

    /// All images, those that were added last first.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let names = self.names()?;
        let mut list = Vec::new();
        for id in self.ids()? {
            let Some(stored) = self.get(id) else {
                continue;
            };
            let leading = names.iter().filter(|(_, name)| name.id == id);
            list.push(Listed {
                id,
                names: leading
                    .map(|(text, name)| (text.clone(), name.digest))
                    .collect(),
                record: stored.record()?,
                created: stored.config()?.created,
                used_bytes: used(&stored.directory)?,
            });
        }
        list.sort_by_key(|listed| (std::cmp::Reverse(listed.record.added), listed.id));
        Ok(list)
    }

    /// Removes a name and, where it was the last one, its image; or an image by its id.
    ///
    /// # Errors
    ///
    /// When there is no such image, or it has several names and is not to go `with_names`.
    pub fn remove(&self, query: &str, with_names: bool) -> Result<Removed, Error> {
        let _turn = self.turn()?;
        let mut names = self.names()?;
        let id = match names.get(query) {
            Some(name) => name.id,
            None => {
                self.find(query)?
                    .ok_or_else(|| Error::Unknown(query.to_owned()))?
                    .id
            }
        };
        let leading = names.iter().filter(|(_, name)| name.id == id);
        let all: Vec<String> = leading.map(|(text, _)| text.clone()).collect();
        let going = match names.contains_key(query) && !with_names {
            true => vec![query.to_owned()],
            false if all.len() > 1 && !with_names => return Err(Error::Named { names: all }),
            false => all.clone(),
        };
        names.retain(|text, _| !going.contains(text));
        self.write_names(&names)?;
        let mut removed = Removed {
            images: Vec::new(),
            names: going,
        };
        if removed.names.len() == all.len() {
            self.remove_image(id)?;
            removed.images.push(id);
        }
        Ok(removed)
    }

    /// Removes images without names, or `all`, and what was not finished.
    ///
    /// # Errors
    ///
    /// When something cannot be removed.
    pub fn prune(&self, all: bool) -> Result<Freed, Error> {
        let _turn = self.turn()?;
        let mut freed = Freed::default();
        for leftover in ["making", "downloads"] {
            let path = self.root.join(leftover);
            freed.bytes += used(&path)?;
            remove_tree(&path)?;
        }
        let mut names = self.names()?;
        if all {
            names.clear();
            self.write_names(&names)?;
        }
        for id in self.ids()? {
            if names.values().any(|name| name.id == id) {
                continue;
            }
            freed.bytes += used(&self.root.join(directory_of(id)))?;
            self.remove_image(id)?;
            freed.images.push(id);
        }
        Ok(freed)
    }

    fn remove_image(&self, id: Digest) -> Result<(), Error> {
        let directory = self.root.join(directory_of(id));
        let making = self.root.join("making");
        remove_tree(&making)?;
        private().create(&making).map_err(failed("make", &making))?;
        // Gone at once, whatever happens while its files go.
        match fs::rename(&directory, making.join("image")) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("remove", &directory)(error)),
        }
        remove_tree(&making)
    }

    /// The ids of all images of this form.
    fn ids(&self) -> Result<Vec<Digest>, Error> {
        let entries = fs::read_dir(&self.root).map_err(failed("list", &self.root))?;
        let id = |entry: io::Result<fs::DirEntry>| {
            let name = entry.ok()?.file_name();
            let hex = name.to_str()?.strip_suffix(&suffix())?.to_owned();
            format!("sha256:{hex}").parse().ok()
        };
        Ok(entries.filter_map(id).collect())
    }

    fn write_names(&self, names: &BTreeMap<String, Name>) -> Result<(), Error> {
        let path = self.root.join(NAMES);
        let text = serde_json::to_vec_pretty(names).unwrap_or_default();
        write_whole(&path, &text)?;
        sync(&self.root)
    }

    /// Waits for the turn to change something; it ends when the answer is dropped.
    fn turn(&self) -> Result<Flock<File>, Error> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(failed("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed("lock", &path)(errno.into()))
    }
}

impl Stored {
    /// What is known of its disk.
    ///
    /// # Errors
    ///
    /// When that cannot be read.
    pub fn record(&self) -> Result<Record, Error> {
        let path = self.directory.join("record.json");
        let text = fs::read(&path).map_err(failed("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| Error::Damaged { path, source })
    }

    /// Its configuration.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn config(&self) -> Result<Config, Error> {
        let path = self.directory.join("config.json");
        let text = fs::read(&path).map_err(failed("read", &path))?;
        if Digest::of(&text) != self.id {
            return Err(Error::Changed { path });
        }
        Ok(Config::parse(&text).map_err(|source| super::Error::document("config.json", source))?)
    }

    /// The disk's path.
    #[must_use]
    pub fn disk_path(&self) -> PathBuf {
        self.directory.join(DISK)
    }

    /// Its disk, opened, when it is still what was made.
    ///
    /// With fs-verity the kernel checks every page that is read, and here it is asked whether it
    /// does so by the right digest. Without it a file that was written to is known by its times,
    /// and then read through once.
    ///
    /// # Errors
    ///
    /// When it is not there, or changed.
    pub fn open_disk(&self) -> Result<File, Error> {
        let path = self.disk_path();
        let file = File::open(&path).map_err(failed("open", &path))?;
        let record = self.record()?;
        if let Some(verity) = record.verity {
            let measured = sys::measured(&file).map_err(failed("measure", &path))?;
            return match measured == Some(*verity.bytes()) {
                true => Ok(file),
                false => Err(Error::Changed { path }),
            };
        }
        let seen = Seen::of(&file).map_err(failed("read", &path))?;
        if seen == record.seen {
            return Ok(file);
        }
        let mut hashing = Hashing::new(&file);
        io::copy(&mut hashing, &mut io::sink()).map_err(failed("read", &path))?;
        if hashing.finish() != (record.length, record.disk) {
            return Err(Error::Changed { path });
        }
        // Copied or touched, and the same: the next one need not read it again. Where that cannot
        // be kept, it will.
        let _ = write_record(&self.directory, &Record { seen, ..record });
        Ok(file)
    }
}

impl Seen {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// Makes the files of an image in its new directory and brings them to the disk.
fn make(
    directory: &Path,
    image: &Image,
    source: &Source,
    limits: Limits,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let path = directory.join(DISK);
    let mut file = File::create(&path).map_err(failed("make", &path))?;
    let written = build(image, source, limits, directory, &mut file, progress)?;
    file.set_permissions(Permissions::from_mode(0o444))
        .and_then(|()| file.sync_all())
        .map_err(failed("write", &path))?;
    drop(file);

    let file = File::open(&path).map_err(failed("open", &path))?;
    // Many file systems cannot do that; then the record tells a change.
    let verity = match sys::seal(&file) {
        Ok(()) => sys::measured(&file).map_err(failed("measure", &path))?,
        Err(_) => None,
    };
    let record = Record {
        disk: written.digest,
        length: written.length,
        verity: verity.map(Digest::from),
        added: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        seen: Seen::of(&file).map_err(failed("read", &path))?,
    };
    write_whole(&directory.join("config.json"), &image.config_bytes)?;
    if let Some(manifest) = &image.manifest {
        write_whole(&directory.join("manifest.json"), manifest)?;
    }
    write_record(directory, &record)?;
    sync(directory)
}

fn write_record(directory: &Path, record: &Record) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(record).unwrap_or_default();
    write_whole(&directory.join("record.json"), &text)
}

/// Writes a file that is never seen half.
fn write_whole(path: &Path, content: &[u8]) -> Result<(), Error> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(content)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        io::Result::Ok(())
    };
    write().map_err(failed("write", path))
}

fn sync(directory: &Path) -> Result<(), Error> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("write", directory))
}

fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("remove", path)(error)),
    }
}

/// What the files below a directory take; nothing where it is not there.
fn used(directory: &Path) -> Result<u64, Error> {
    let mut bytes = 0;
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(failed("list", directory)(error)),
    };
    for entry in entries.flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes += used(&entry.path())?,
            Ok(metadata) => bytes += metadata.blocks() * 512,
            // Gone in the meantime.
            Err(_) => {}
        }
    }
    Ok(bytes)
}

fn directory_of(id: Digest) -> String {
    id.hex() + &suffix()
}

fn suffix() -> String {
    format!("-v{FORMAT}")
}

fn private() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        doing,
        path,
        source,
    }
}
