//! Where images come from on this host: directories and archives of OCI's and Docker's making.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::index::{DOCUMENTS_MAX, for_our_machine, for_our_machines};
use super::json::{self, DOCUMENT_MAX, Descriptor, Document};
use super::{Error, Image, LayerFile, printable};
use crate::digest::Digest;
use crate::filesystem::{Extent, Piece};
use crate::layer::tar;

/// The annotation of an index's entry that is its tag.
const TAG: &str = "org.opencontainers.image.ref.name";

/// As many tags are told of.
const TAGS_SHOWN: usize = 20;

/// As many members of an archive are looked at.
const MEMBERS_MAX: usize = 100_000;

/// Named files that an image is read from.
#[derive(Debug)]
pub enum Source {
    /// A directory.
    Directory(PathBuf),
    /// An archive of a directory.
    Archive {
        /// Where it is.
        path: PathBuf,
        /// The archive.
        file: File,
        /// What is where in it.
        members: HashMap<String, Extent>,
    },
}

impl Source {
    /// The files of a directory.
    #[must_use]
    pub fn directory(path: &Path) -> Self {
        Self::Directory(path.to_owned())
    }

    /// The files in a tar archive, which is read through once.
    ///
    /// # Errors
    ///
    /// When it is no archive, or none that is read as it lies there.
    pub fn archive(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open {
            path: path.display().to_string(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let members = members(&file).map_err(|source| match source {
            tar::Error::Io(source) => failed(source),
            source => Error::Archive {
                path: path.to_owned(),
                source,
            },
        })?;
        Ok(Self::Archive {
            path: path.to_owned(),
            file,
            members,
        })
    }

    /// A file by its name.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn open(&self, name: &str) -> Result<Box<dyn Read + '_>, Error> {
        let failed = |path: String| |source| Error::Open { path, source };
        match self {
            Self::Directory(path) => {
                let path = path.join(name);
                let file = File::open(&path).map_err(failed(path.display().to_string()))?;
                Ok(Box::new(file))
            }
            Self::Archive {
                path,
                file,
                members,
            } => match members.get(name) {
                Some(extent) => Ok(Box::new(Piece::new(file, *extent))),
                None => {
                    let place = format!("{} in {}", printable(name), path.display());
                    Err(failed(place)(io::ErrorKind::NotFound.into()))
                }
            },
        }
    }

    /// The image of an OCI layout: the one of a tag, or the only one there is.
    ///
    /// # Errors
    ///
    /// When there is none, more than one, or none for these machines.
    pub fn oci_image(&self, tag: Option<&str>) -> Result<Image, Error> {
        let index = self.document("index.json", None)?;
        let Document::Index(manifests) = parse("index.json", &index)? else {
            return Err(Error::NoIndex);
        };
        let tagged = |entry: &&Descriptor| match tag {
            None => true,
            Some(tag) => name_of(entry).is_some_and(|name| name == tag),
        };
        let found: Vec<Descriptor> = manifests.iter().filter(tagged).cloned().collect();
        let tags = || listed(manifests.iter().filter_map(name_of));
        let mut entry = match (&found[..], tag) {
            ([entry], _) => entry.clone(),
            ([], Some(tag)) => {
                return Err(Error::NoTag {
                    tag: tag.to_owned(),
                    tags: tags(),
                });
            }
            (several, None) if several.iter().filter_map(name_of).nth(1).is_some() => {
                return Err(Error::NoneChosen { tags: tags() });
            }
            // Images for several machines may lie side by side.
            (several, _) => for_our_machines(several)?,
        };
        for _ in 0..DOCUMENTS_MAX {
            let name = blob(&entry.digest);
            let bytes = self.document(&name, Some(&entry))?;
            match parse(&name, &bytes)? {
                Document::Index(manifests) => entry = for_our_machines(&manifests)?,
                Document::Manifest(manifest) => {
                    let config = blob(&manifest.config.digest);
                    let config = self.document(&config, Some(&manifest.config))?;
                    let mut image = Image::new(bytes, config, blob)?;
                    image.names = name_of(&entry).cloned().into_iter().collect();
                    return Ok(image);
                }
            }
        }
        Err(Error::TooManyIndexes)
    }

    /// The image in an archive that `docker save` or `podman save` made: the one of a name, or
    /// the only one there is.
    ///
    /// # Errors
    ///
    /// When there is none, or more than one.
    pub fn docker_image(&self, name: Option<&str>) -> Result<Image, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Entry {
            config: String,
            repo_tags: Option<Vec<String>>,
            layers: Vec<String>,
        }
        let bytes = self.document("manifest.json", None)?;
        let entries: Vec<Entry> = serde_json::from_slice(&bytes)
            .map_err(|source| Error::document("manifest.json", source.into()))?;
        let named = |entry: &&Entry| match name {
            None => true,
            Some(name) => entry.repo_tags.iter().flatten().any(|tag| tag == name),
        };
        let found: Vec<&Entry> = entries.iter().filter(named).collect();
        let tags = || {
            let tags = entries.iter().flat_map(|entry| entry.repo_tags.iter());
            listed(tags.flatten())
        };
        let entry = match (&found[..], name) {
            ([entry], _) => *entry,
            ([], None) => return Err(Error::NoImage),
            (_, None) => return Err(Error::NoneChosen { tags: tags() }),
            (_, Some(name)) => {
                return Err(Error::NoTag {
                    tag: name.to_owned(),
                    tags: tags(),
                });
            }
        };
        let config_bytes = self.document(&entry.config, None)?;
        let config = json::Config::parse(&config_bytes)
            .map_err(|source| Error::document(&entry.config, source))?;
        for_our_machine(&config.platform)?;
        let layers = entry.layers.iter().map(|name| LayerFile {
            name: name.clone(),
            declared: None,
        });
        Ok(Image {
            id: Digest::of(&config_bytes),
            names: entry.repo_tags.clone().unwrap_or_default(),
            manifest: None,
            config,
            config_bytes,
            layers: layers.collect(),
        })
    }

    /// A JSON document, which must be what `declared` says.
    fn document(&self, name: &str, declared: Option<&Descriptor>) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.open(name)?
            .take(DOCUMENT_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| Error::Open {
                path: name.to_owned(),
                source,
            })?;
        if bytes.len() as u64 > DOCUMENT_MAX {
            return Err(Error::TooLong {
                name: name.to_owned(),
            });
        }
        if let Some(declared) = declared {
            super::verify(name, declared, bytes.len() as u64, Digest::of(&bytes))?;
        }
        Ok(bytes)
    }
}

/// The name of a blob in an OCI layout.
fn blob(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn parse(name: &str, bytes: &[u8]) -> Result<Document, Error> {
    Document::parse(bytes).map_err(|source| Error::document(name, source))
}

fn name_of(entry: &Descriptor) -> Option<&String> {
    entry.annotations.as_ref()?.get(TAG)
}

/// Tags for an error.
fn listed<'a>(tags: impl Iterator<Item = &'a String>) -> Vec<String> {
    tags.take(TAGS_SHOWN).map(|tag| printable(tag)).collect()
}

/// The regular files of an archive, and links to them by the names that these have.
fn members(file: &File) -> Result<HashMap<String, Extent>, tar::Error> {
    let counting = Counting {
        input: BufReader::with_capacity(128 << 10, file),
        count: 0,
    };
    let mut archive = tar::Archive::new(counting);
    let mut members = HashMap::new();
    let mut links = BTreeMap::new();
    while let Some(member) = archive.next_member()? {
        if members.len() + links.len() == MEMBERS_MAX {
            return Err(tar::Error::Field {
                field: "number of members, more than 100000,",
            });
        }
        let Some(path) = plain(Path::new(""), &member.path) else {
            continue;
        };
        match member.kind {
            tar::Kind::File(length) => {
                let offset = archive.input().count;
                members.insert(path, Extent { offset, length });
            }
            tar::Kind::HardLink(target) => drop(links.insert(path, plain(Path::new(""), &target))),
            tar::Kind::Symlink(target) => {
                // Older ones have a layer that is there twice as a link beside the first.
                let directory = Path::new(&path).parent().unwrap_or(Path::new(""));
                let target = plain(directory, &target);
                links.insert(path, target);
            }
            _ => {}
        }
    }
    for (link, target) in links {
        if let Some(extent) = target.and_then(|target| members.get(&target).copied()) {
            members.insert(link, extent);
        }
    }
    Ok(members)
}

/// A path without `.` and `..`, taken from `directory`; `None` where it leads out.
fn plain(directory: &Path, path: &[u8]) -> Option<String> {
    let mut plain = directory.to_owned();
    for part in Path::new(str::from_utf8(path).ok()?).components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir if plain.pop() => {}
            Component::ParentDir => return None,
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    plain.into_os_string().into_string().ok()
}

/// A reader that knows how far it is.
struct Counting<R> {
    input: R,
    count: u64,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.count += count as u64;
        Ok(count)
    }
}
