//! Container images: found in a [`Source`], built into one EROFS image, kept in a [`Store`].
//!
//! An image is a configuration and a stack of layers. Its id is the configuration's digest; the
//! configuration has the digests of the unpacked layers, so that the id stands for every byte.
//! [`build`] checks all of them on the way.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

mod index;
pub mod json;
mod source;
mod store;

pub use index::{DOCUMENTS_MAX, for_our_machines};
pub use source::Source;
pub use store::{
    Error as StoreError, Freed, Listed, Name, PART_SUFFIX, Record, Removed, Store, Stored,
};

use self::json::{Config, Descriptor, Document};
use crate::digest::{Digest, Hashing};
use crate::erofs::{self, Written};
use crate::filesystem::{FileSystem, Spool};
use crate::layer::{self, Bounded, Budget, Exceeded, Limits, tar, unpacked};

/// Why an image is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A part of it is not there.
    #[error("cannot read {path}")]
    Open {
        /// Which.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// An archive that is none.
    #[error(
        "{path} is not a tar archive that is read as it lies there; unpack a compressed one first"
    )]
    Archive {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        source: tar::Error,
    },
    /// A document of another form.
    #[error("cannot take {name}")]
    Document {
        /// Which.
        name: String,
        /// What is wrong with it.
        source: json::Error,
    },
    /// A document that is too long.
    #[error("{name} is longer than {} bytes", json::DOCUMENT_MAX)]
    TooLong {
        /// Which.
        name: String,
    },
    /// An index that is none.
    #[error("index.json is not an index of images")]
    NoIndex,
    /// Indexes in indexes.
    #[error("an index leads to an index, and that to another, without end")]
    TooManyIndexes,
    /// No image of the tag, or more than one.
    #[error("no single image for the tag {tag:?}; there are: {}", names(tags))]
    NoTag {
        /// What was asked for.
        tag: String,
        /// What there is.
        tags: Vec<String>,
    },
    /// Several images where none was asked for.
    #[error(
        "there are several images; put one of the tags behind the place and a colon: {}",
        names(tags)
    )]
    NoneChosen {
        /// What there is.
        tags: Vec<String>,
    },
    /// Nothing that could run.
    #[error("there is no image, neither for linux/amd64 nor for others")]
    NoImage,
    /// An image for other machines.
    #[error("the image is not for linux/amd64 but for {}", platforms.join(", "))]
    NotForUs {
        /// For what it is.
        platforms: Vec<String>,
    },
    /// Another number of layers than of digests.
    #[error("the image has {layers} layers, but digests of {digests} in its configuration")]
    LayerCount {
        /// How many there are.
        layers: usize,
        /// How many digests.
        digests: usize,
    },
    /// A layer of a kind that cannot be read.
    #[error(
        "layer {number} ({digest}) is of the type {media_type:?}; tar archives are read, plain or \
         packed by gzip or zstd"
    )]
    LayerType {
        /// Counted from 1.
        number: usize,
        /// Its digest.
        digest: Digest,
        /// The type.
        media_type: String,
    },
    /// Something is longer or shorter than it should be.
    #[error("{what} has {length} bytes where {declared} are declared; it is truncated or another")]
    Size {
        /// What.
        what: String,
        /// Its length.
        length: u64,
        /// What was said.
        declared: u64,
    },
    /// Something is not what it should be.
    #[error(
        "{what} has the digest {digest} where {declared} is declared; it is damaged or another"
    )]
    Digest {
        /// What.
        what: String,
        /// Its digest.
        digest: Digest,
        /// What was said.
        declared: Digest,
    },
    /// A layer cannot be applied.
    #[error("cannot apply layer {number} ({name})")]
    Layer {
        /// Counted from 1.
        number: usize,
        /// Its digest, or the file's name.
        name: String,
        /// What is wrong with it.
        source: layer::Error,
    },
    /// A layer cannot be read or unpacked.
    #[error("cannot unpack layer {number} ({name})")]
    Unpack {
        /// Counted from 1.
        number: usize,
        /// Its digest, or the file's name.
        name: String,
        /// What is wrong with it.
        source: io::Error,
    },
    /// All layers together are too large.
    #[error(transparent)]
    Exceeded(#[from] Exceeded),
    /// The image cannot be kept.
    #[error("cannot write in {path}")]
    Write {
        /// Where.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The EROFS image cannot be made.
    #[error("cannot make an image of the layers")]
    Erofs(#[from] erofs::Error),
}

impl Error {
    fn document(name: &str, source: json::Error) -> Self {
        Self::Document {
            name: name.to_owned(),
            source,
        }
    }
}

/// An image, described; its layers are files of a [`Source`].
#[derive(Debug)]
pub struct Image {
    /// The digest of its configuration.
    pub id: Digest,
    /// The names that it was found under.
    pub names: Vec<String>,
    /// The manifest, where it has one.
    pub manifest: Option<Vec<u8>>,
    /// Its configuration.
    pub config: Config,
    /// The same, as it was read.
    pub config_bytes: Vec<u8>,
    layers: Vec<LayerFile>,
}

/// A layer's file in a source.
#[derive(Debug)]
struct LayerFile {
    name: String,
    /// Digest and length of the file as a manifest has them.
    declared: Option<Descriptor>,
}

impl Image {
    /// The image of a manifest and a configuration, which was verified; `name` says under which
    /// name the file of a digest will be found.
    ///
    /// # Errors
    ///
    /// When they do not fit each other, or it cannot be run here.
    pub fn new(
        manifest: Vec<u8>,
        config: Vec<u8>,
        name: impl Fn(&Digest) -> String,
    ) -> Result<Self, Error> {
        let document =
            Document::parse(&manifest).map_err(|source| Error::document("the manifest", source))?;
        let Document::Manifest(document) = document else {
            return Err(Error::document("the manifest", json::Error::Neither));
        };
        for (index, layer) in document.layers.iter().enumerate() {
            if !is_layer(&layer.media_type) {
                return Err(Error::LayerType {
                    number: index + 1,
                    digest: layer.digest,
                    media_type: layer.media_type.chars().take(100).collect(),
                });
            }
        }
        let layers = document.layers.into_iter().map(|layer| LayerFile {
            name: name(&layer.digest),
            declared: Some(layer),
        });
        let parsed = Config::parse(&config)
            .map_err(|source| Error::document("the configuration", source))?;
        index::for_our_machine(&parsed.platform)?;
        Ok(Self {
            id: Digest::of(&config),
            names: Vec::new(),
            manifest: Some(manifest),
            config: parsed,
            config_bytes: config,
            layers: layers.collect(),
        })
    }

    /// How many bytes the layers' files have, as far as it is known.
    #[must_use]
    pub fn packed_bytes(&self) -> u64 {
        let sizes = self
            .layers
            .iter()
            .filter_map(|layer| layer.declared.as_ref());
        sizes.map(|layer| layer.size).fold(0, u64::saturating_add)
    }
}

fn is_layer(media_type: &str) -> bool {
    let packings = ["", "+gzip", "+zstd", ".gzip", ".zstd"];
    [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
    ]
    .iter()
    .any(|kind| {
        let packing = media_type.strip_prefix(kind);
        packing.is_some_and(|packing| packings.contains(&packing))
    })
}

/// Checks length and digest of something against what was declared.
fn verify(what: &str, declared: &Descriptor, length: u64, digest: Digest) -> Result<(), Error> {
    if length != declared.size {
        return Err(Error::Size {
            what: what.to_owned(),
            length,
            declared: declared.size,
        });
    }
    verify_digest(what, declared.digest, digest)
}

fn verify_digest(what: &str, declared: Digest, digest: Digest) -> Result<(), Error> {
    match digest == declared {
        true => Ok(()),
        false => Err(Error::Digest {
            what: what.to_owned(),
            digest,
            declared,
        }),
    }
}

/// Builds the EROFS image of an image's layers into an empty file. Every length and digest is
/// checked; nothing but nameless files is made in the directory `scratch`. `progress` is told how
/// many bytes of the layers' files were read.
///
/// # Errors
///
/// See [`Error`]; each names the layer that it is about.
pub fn build(
    image: &Image,
    source: &Source,
    limits: Limits,
    scratch: &Path,
    output: &mut File,
    progress: &mut dyn FnMut(u64),
) -> Result<Written, Error> {
    let digests = &image.config.rootfs.diff_ids;
    if image.layers.len() != digests.len() {
        return Err(Error::LayerCount {
            layers: image.layers.len(),
            digests: digests.len(),
        });
    }
    let mut stack = Stack {
        filesystem: FileSystem::new(),
        spool: Spool::new(scratch).map_err(|source| Error::Write {
            path: scratch.to_owned(),
            source,
        })?,
        budget: Budget::new(limits),
    };
    for (index, (layer, unpacked)) in image.layers.iter().zip(digests).enumerate() {
        stack.add(index + 1, layer, *unpacked, source, progress)?;
    }
    // Two images of the same layers differ in this alone, and never within one id.
    let uuid = std::array::from_fn(|at| image.id.bytes()[at]);
    Ok(erofs::write(&stack.filesystem, &stack.spool, uuid, output)?)
}

/// Layers, one on the other.
struct Stack {
    filesystem: FileSystem,
    spool: Spool,
    budget: Budget,
}

impl Stack {
    fn add(
        &mut self,
        number: usize,
        layer: &LayerFile,
        unpacked_digest: Digest,
        source: &Source,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        let name = match &layer.declared {
            Some(declared) => declared.digest.to_string(),
            None => layer.name.clone(),
        };
        let what = format!("layer {number} ({name})");
        let declared = layer.declared.as_ref();
        let mut file = Hashing::new(Told {
            // One more, so that a longer one is seen.
            input: source
                .open(&layer.name)?
                .take(declared.map_or(u64::MAX, |declared| declared.size.saturating_add(1))),
            progress,
        });
        let applied = self.apply(number, &name, &mut file);
        // Whatever is wrong with the content, a wrong file is the better reason.
        io::copy(&mut file, &mut io::sink()).map_err(|source| Error::Unpack {
            number,
            name: name.clone(),
            source,
        })?;
        let (length, digest) = file.finish();
        if let Some(declared) = declared {
            verify(&what, declared, length, digest)?;
        }
        verify_digest(&format!("{what}, unpacked,"), unpacked_digest, applied?)
    }

    /// Applies a layer and returns the digest of what it unpacked to.
    fn apply(&mut self, number: usize, name: &str, file: &mut impl Read) -> Result<Digest, Error> {
        let unpacked = unpacked(file).map_err(|source| Error::Unpack {
            number,
            name: name.to_owned(),
            source,
        })?;
        let bounded = Bounded::new(unpacked, self.budget.unpacked_bytes_left());
        let mut content = Hashing::new(bounded);
        let layer = u32::try_from(number).unwrap_or(u32::MAX);
        let (filesystem, spool) = (&mut self.filesystem, &mut self.spool);
        layer::apply(filesystem, spool, &mut self.budget, &mut content, layer).map_err(
            |source| Error::Layer {
                number,
                name: name.to_owned(),
                source,
            },
        )?;
        let (length, digest) = content.finish();
        self.budget.unpacked_bytes(length)?;
        Ok(digest)
    }
}

/// What a stranger's document says, short and without anything that a terminal obeys.
fn printable(text: &str) -> String {
    const SHOWN: usize = 80;
    text.chars()
        .take(SHOWN)
        .flat_map(char::escape_debug)
        .collect()
}

/// Tags for an error.
fn names(tags: &[String]) -> String {
    match tags {
        [] => "none with a tag".to_owned(),
        tags => tags.join(", "),
    }
}

/// A reader that tells how much was read.
struct Told<'a, R> {
    input: R,
    progress: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Told<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        (self.progress)(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
