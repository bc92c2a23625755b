//! An image from where it is into the store.

use std::{env, io, path::PathBuf, process::Command};

use oci_client::Reference;
use rootfs_builder::{
    digest::Digest,
    image::{Image, Name, Source, Store, StoreError, Stored},
    layer::Limits,
};

use super::{
    credentials::Credentials,
    location::Location,
    registry::{self, Registry},
};
use crate::text::printable;

/// Why an image is not there afterwards.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store, or the image itself.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// No skopeo.
    #[error(
        "cannot run skopeo, which gets images out of other programs' stores; install Debian's package skopeo, or save the image to a file and use docker-archive:FILE"
    )]
    NoSkopeo(#[source] io::Error),
    /// It did not work.
    #[error("skopeo cannot copy {location}: {reason}")]
    Skopeo {
        /// From where.
        location: String,
        /// What it says.
        reason: String,
    },
    /// A directory for it.
    #[error("cannot make a directory for the image")]
    Directory(#[source] io::Error),
    /// The task that does the work failed.
    #[error("the image's making failed")]
    Task(#[source] tokio::task::JoinError),
}

impl From<rootfs_builder::image::Error> for Error {
    fn from(error: rootfs_builder::image::Error) -> Self {
        Self::Store(error.into())
    }
}

/// How registries are spoken to.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Credentials from the command line.
    pub credentials: Option<Credentials>,
    /// The file with credentials, in place of the usual ones.
    pub credentials_file: Option<PathBuf>,
    /// The directory of authorities' certificates, in place of the usual ones.
    pub certificates: Option<PathBuf>,
    /// Whether a registry must show a certificate. Without a word: yes, unless it is on this host.
    pub tls_verify: Option<bool>,
}

/// What happens on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A layer will be fetched.
    Layer {
        /// Its digest.
        digest: Digest,
        /// Its length.
        bytes: u64,
    },
    /// More of a layer is there.
    Fetched {
        /// Its digest.
        digest: Digest,
        /// How much more.
        bytes: u64,
    },
    /// The disk is made from layers that have as many bytes, as far as that is known.
    Making {
        /// All of them.
        bytes: u64,
    },
    /// More of the layers was read.
    Made {
        /// How much more.
        bytes: u64,
    },
}

/// Who is told.
pub type Report<'a> = &'a (dyn Fn(Event) + Sync);

/// Brings an image into the store, unless it is there, and returns it. `name` is a further name
/// for it.
///
/// # Errors
/// When it is not there, is not what was asked for, or is of no use; nothing new is left then, but
/// for layers that were fetched in part and can be taken up again.
pub async fn pull(
    store: &Store,
    location: &Location,
    access: &Access,
    name: Option<&Reference>,
    report: Report<'_>,
) -> Result<Stored, Error> {
    let (stored, mut names, digest) = match location {
        Location::Registry(reference) => {
            let registry = Registry::ask(reference, access).await?;
            let stored = from_registry(store, &registry, report).await?;
            (stored, vec![reference.whole()], Some(registry.digest))
        }
        Location::Layout { path, tag } => {
            let source = Source::directory(path);
            let image = source.oci_image(tag.as_deref())?;
            let names = full_names(&image);
            (add(store, &image, &source, report)?, names, None)
        }
        Location::LayoutArchive { path, tag } => {
            let source = Source::archive(path)?;
            let image = source.oci_image(tag.as_deref())?;
            let names = full_names(&image);
            (add(store, &image, &source, report)?, names, None)
        }
        Location::DockerArchive { path, name } => {
            let source = Source::archive(path)?;
            let image = source.docker_image(name.as_deref())?;
            let names = full_names(&image);
            (add(store, &image, &source, report)?, names, None)
        }
        Location::Foreign(text) => {
            let (stored, names) = foreign(store, text, report)?;
            (stored, names, None)
        }
    };
    names.extend(name.map(Reference::whole));
    let id = stored.id;
    if !names.is_empty() {
        store.name(&names, &Name { id, digest })?;
    }
    Ok(stored)
}

async fn from_registry(
    store: &Store,
    registry: &Registry,
    report: Report<'_>,
) -> Result<Stored, Error> {
    if let Some(stored) = store.get(registry.id()) {
        return Ok(stored);
    }
    let config = registry.config().await?;
    let image = Image::new(registry.manifest.clone(), config, Digest::hex)?;
    let downloads = store.downloads()?;
    registry.layers(&downloads, report).await?;
    let stored = add(store, &image, &Source::directory(&downloads), report);
    // Good or bad, they are not needed any more; one that is gone already was another process's.
    for file in registry.files(&downloads) {
        let _ = std::fs::remove_file(file);
    }
    stored
}

fn add(store: &Store, image: &Image, source: &Source, report: Report<'_>) -> Result<Stored, Error> {
    report(Event::Making {
        bytes: image.packed_bytes(),
    });
    let mut progress = |bytes| report(Event::Made { bytes });
    Ok(store.add(image, source, Limits::default(), &mut progress)?)
}

/// The names of an image that are more than a tag.
fn full_names(image: &Image) -> Vec<String> {
    let full = image.names.iter().filter(|name| name.contains('/'));
    let parsed = full.filter_map(|name| name.parse::<Reference>().ok());
    parsed.map(|reference| reference.whole()).collect()
}

/// An image out of podman's or docker's store, by way of skopeo.
fn foreign(store: &Store, text: &str, report: Report<'_>) -> Result<(Stored, Vec<String>), Error> {
    let directory = tempfile::tempdir_in(store.downloads()?).map_err(Error::Directory)?;
    let layout = directory.path().join("layout");
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "--quiet"]);
    // It asks the daemon at the usual place alone, wherever docker's own command asks.
    if text.starts_with("docker-daemon:")
        && let Some(host) = env::var_os("DOCKER_HOST").filter(|host| !host.is_empty())
    {
        skopeo.arg("--src-daemon-host").arg(host);
    }
    let output = skopeo
        .arg(text)
        .arg(format!("oci:{}:image", layout.display()))
        .output()
        .map_err(Error::NoSkopeo)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty());
        return Err(Error::Skopeo {
            location: text.to_owned(),
            reason: printable(last.unwrap_or("it says nothing"), 300),
        });
    }
    let source = Source::directory(&layout);
    let image = source.oci_image(None)?;
    let stored = add(store, &image, &source, report)?;
    let name = text
        .split_once(':')
        .and_then(|(_, name)| name.parse::<Reference>().ok());
    Ok((stored, name.iter().map(Reference::whole).collect()))
}
