//! Images fetched from a registry: documents into memory, layers into files, each verified
//! against its digest. A layer whose fetch was cut off goes on where it ended.

use std::{
    fs::{self, File, OpenOptions},
    future::poll_fn,
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    pin::Pin,
    time::Duration,
};

use futures_core::Stream;
use nix::fcntl::{Flock, FlockArg};
use oci_client::{
    Client, Reference,
    client::{
        BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol, SizedStream,
    },
    errors::OciDistributionError,
    manifest::OciDescriptor,
    secrets::RegistryAuth,
};
use rootfs_builder::{
    digest::{Digest, Hasher},
    image::{
        DOCUMENTS_MAX, PART_SUFFIX, for_our_machines,
        json::{DOCUMENT_MAX, Descriptor, Document},
    },
};

use super::{
    certificates,
    credentials::{self, Credentials},
    pull::{Access, Event, Report},
};
use crate::text::printable;

/// The documents that are understood.
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// How long a connection may take, and how long nothing may come.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often a fetch is taken up again when nothing new came at all.
const ATTEMPTS: u32 = 3;

/// How long is waited before that, longer each time.
const PAUSE: Duration = Duration::from_millis(500);

/// As many layers are fetched at a time.
const AT_A_TIME: usize = 3;

/// Why an image cannot be fetched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No credentials where there should be.
    #[error(transparent)]
    Credentials(#[from] credentials::Error),
    /// What the registry says, or that it says nothing.
    #[error("cannot fetch {what}: {reason}")]
    Registry {
        /// What.
        what: String,
        /// Why not.
        reason: String,
    },
    /// A document that is none.
    #[error("cannot take {what}")]
    Document {
        /// Which.
        what: String,
        /// What is wrong with it.
        #[source]
        source: rootfs_builder::image::json::Error,
    },
    /// An image that is of no use.
    #[error(transparent)]
    Image(#[from] rootfs_builder::image::Error),
    /// Other bytes than should come.
    #[error(
        "the registry sent {what} with the digest {digest} where {declared} was asked for; it is \
         not used"
    )]
    Digest {
        /// What.
        what: String,
        /// Its digest.
        digest: Digest,
        /// What was asked for.
        declared: Digest,
    },
    /// More or fewer bytes than should come.
    #[error(
        "the registry sent {length} bytes for {what} where {declared} are declared; it is not used"
    )]
    Length {
        /// What.
        what: String,
        /// How many came.
        length: u64,
        /// How many should.
        declared: u64,
    },
    /// Certificates of authorities.
    #[error(transparent)]
    Certificates(#[from] certificates::Error),
    /// A file of a layer.
    #[error("cannot write {}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// A registry that answered, and the image that it was asked for.
pub struct Registry {
    client: Client,
    reference: Reference,
    /// What the name leads to.
    pub digest: Digest,
    /// The manifest for these machines.
    pub manifest: Vec<u8>,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

impl Registry {
    /// Asks a registry for the manifest of an image.
    ///
    /// # Errors
    /// When it does not answer or has none for these machines.
    pub async fn ask(reference: &Reference, access: &Access) -> Result<Self, Error> {
        let auth = auth(reference, access)?;
        let certificates =
            certificates::find(reference.resolve_registry(), access.certificates.as_deref())?;
        let mut ways = ways(reference, access.tls_verify).into_iter().peekable();
        while let Some(way) = ways.next() {
            let client = way.client(&certificates);
            match client.pull_manifest_raw(reference, &auth, &ACCEPTED).await {
                Ok((bytes, _)) => return Self::of(client, reference, &auth, bytes.to_vec()).await,
                // Another protocol is tried where nobody spoke this one.
                Err(OciDistributionError::RequestError(_)) if ways.peek().is_some() => {}
                Err(error) => return Err(refused(&reference.whole(), &error)),
            }
        }
        Err(Error::Registry {
            what: reference.whole(),
            reason: "there is no way to it".to_owned(),
        })
    }

    async fn of(
        client: Client,
        reference: &Reference,
        auth: &RegistryAuth,
        bytes: Vec<u8>,
    ) -> Result<Self, Error> {
        let whole = reference.whole();
        let digest = Digest::of(&bytes);
        if let Some(pinned) = reference.digest() {
            let declared = pinned.parse().map_err(|error| Error::Registry {
                what: whole.clone(),
                reason: format!("{error}"),
            })?;
            check(&whole, declared, digest)?;
        }
        let (mut at, mut bytes) = (reference.clone(), bytes);
        for _ in 0..DOCUMENTS_MAX {
            let document = Document::parse(&bytes).map_err(|source| Error::Document {
                what: at.whole(),
                source,
            })?;
            match document {
                Document::Manifest(document) => {
                    return Ok(Self {
                        client,
                        reference: reference.clone(),
                        digest,
                        manifest: bytes,
                        config: document.config,
                        layers: document.layers,
                    });
                }
                Document::Index(manifests) => {
                    let entry = for_our_machines(&manifests)?;
                    at = reference.clone_with_digest(entry.digest.to_string());
                    let pulled = client.pull_manifest_raw(&at, auth, &ACCEPTED).await;
                    bytes = pulled
                        .map_err(|error| refused(&at.whole(), &error))?
                        .0
                        .to_vec();
                    check(&at.whole(), entry.digest, Digest::of(&bytes))?;
                }
            }
        }
        Err(rootfs_builder::image::Error::TooManyIndexes.into())
    }

    /// The digest of the configuration, which is the image's id.
    pub fn id(&self) -> Digest {
        self.config.digest
    }

    /// Fetches the configuration.
    ///
    /// # Errors
    /// When it does not come, or another.
    pub async fn config(&self) -> Result<Vec<u8>, Error> {
        let what = format!("the configuration {}", self.config.digest);
        if self.config.size > DOCUMENT_MAX {
            let (length, declared) = (self.config.size, DOCUMENT_MAX);
            return Err(Error::Length {
                what,
                length,
                declared,
            });
        }
        let mut bytes = Vec::new();
        let (BlobResponse::Full(mut stream) | BlobResponse::Partial(mut stream)) = self
            .request(&self.config, 0)
            .await
            .map_err(|error| refused(&what, &error))?;
        while let Some(part) = next(&mut stream).await {
            let part = part.map_err(|error| failed(&what, &error))?;
            bytes.extend_from_slice(&part);
            if bytes.len() as u64 > self.config.size {
                break;
            }
        }
        check_length(&what, &self.config, bytes.len() as u64)?;
        check(&what, self.config.digest, Digest::of(&bytes))?;
        Ok(bytes)
    }

    /// Fetches the layers into `directory`, some at a time, each under its digest's digits.
    ///
    /// # Errors
    /// When one does not come, or another.
    pub async fn layers(&self, directory: &Path, report: Report<'_>) -> Result<(), Error> {
        let mut missing = Vec::new();
        for layer in &self.layers {
            // The same layer may be there twice.
            let again = missing.contains(&layer);
            if !again && !directory.join(layer.digest.hex()).exists() {
                report(Event::Layer {
                    digest: layer.digest,
                    bytes: layer.size,
                });
                missing.push(layer);
            }
        }
        let mut rest = missing.into_iter();
        let first = rest.by_ref().take(AT_A_TIME);
        let mut running: Vec<_> = first
            .map(|layer| Box::pin(self.layer(layer, directory, report)))
            .collect();
        while !running.is_empty() {
            let (done, result) = poll_fn(|context| {
                let ready = running.iter_mut().enumerate().find_map(|(index, layer)| {
                    match layer.as_mut().poll(context) {
                        std::task::Poll::Ready(result) => Some((index, result)),
                        std::task::Poll::Pending => None,
                    }
                });
                ready.map_or(std::task::Poll::Pending, std::task::Poll::Ready)
            })
            .await;
            result?;
            drop(running.swap_remove(done));
            if let Some(layer) = rest.next() {
                running.push(Box::pin(self.layer(layer, directory, report)));
            }
        }
        Ok(())
    }

    /// The files of the layers in `directory`.
    pub fn files(&self, directory: &Path) -> Vec<PathBuf> {
        let name = |layer: &Descriptor| directory.join(layer.digest.hex());
        self.layers.iter().map(name).collect()
    }

    async fn layer(
        &self,
        layer: &Descriptor,
        directory: &Path,
        report: Report<'_>,
    ) -> Result<(), Error> {
        let what = format!("the layer {}", layer.digest);
        let path = directory.join(layer.digest.hex());
        let mut part = Part::open(&path, layer).await?;
        if path.exists() {
            // Another process fetched it while we waited for our turn.
            return part.discard();
        }
        report(Event::Fetched {
            digest: layer.digest,
            bytes: part.length,
        });
        let mut attempts = 0;
        while part.length < layer.size {
            let before = part.length;
            let error = match self.go_on(layer, &mut part, report).await {
                Ok(()) if part.length < layer.size => "the answer was cut off".to_owned(),
                Ok(()) => break,
                Err(Failure::Fetch(reason)) => reason,
                Err(Failure::Write(error)) => return Err(error),
            };
            attempts = if part.length > before {
                1
            } else {
                attempts + 1
            };
            if attempts > ATTEMPTS {
                return Err(Error::Registry {
                    what,
                    reason: error,
                });
            }
            tracing::debug!(%error, length = part.length, "{what} is taken up again");
            tokio::time::sleep(PAUSE * attempts).await;
        }
        let length = part.length;
        let digest = part.digest();
        let checked =
            check_length(&what, layer, length).and_then(|()| check(&what, layer.digest, digest));
        match checked {
            Ok(()) => part.keep(&path),
            Err(error) => {
                part.discard()?;
                Err(error)
            }
        }
    }

    /// Fetches what is missing of a layer, until it is there or the answer ends.
    async fn go_on(
        &self,
        layer: &Descriptor,
        part: &mut Part,
        report: Report<'_>,
    ) -> Result<(), Failure> {
        let response = self.request(layer, part.length).await;
        let mut stream = match response.map_err(|error| Failure::Fetch(reason(&error)))? {
            BlobResponse::Partial(stream) => stream,
            // A registry that does not know parts sends all of it.
            BlobResponse::Full(stream) => {
                part.clear().map_err(Failure::Write)?;
                stream
            }
        };
        while let Some(bytes) = next(&mut stream).await {
            let bytes = match bytes {
                Ok(bytes) => bytes,
                // The library compares digests too; ours says more.
                Err(_) if part.length >= layer.size => break,
                Err(error) => return Err(Failure::Fetch(chain(&error))),
            };
            part.add(&bytes).map_err(Failure::Write)?;
            report(Event::Fetched {
                digest: layer.digest,
                bytes: bytes.len() as u64,
            });
            if part.length > layer.size {
                break;
            }
        }
        Ok(())
    }

    async fn request(
        &self,
        blob: &Descriptor,
        offset: u64,
    ) -> Result<BlobResponse, OciDistributionError> {
        let descriptor = OciDescriptor {
            digest: blob.digest.to_string(),
            ..OciDescriptor::default()
        };
        self.client
            .pull_blob_stream_partial(&self.reference, &descriptor, offset, None)
            .await
    }
}

/// Why a fetch does not go on.
enum Failure {
    /// What can be tried again.
    Fetch(String),
    /// What cannot.
    Write(Error),
}

/// A layer's file while it is incomplete. Its lock is held: one process fetches, others wait.
struct Part {
    file: Flock<File>,
    path: PathBuf,
    hasher: Hasher,
    length: u64,
}

impl Part {
    async fn open(complete: &Path, layer: &Descriptor) -> Result<Self, Error> {
        let path = PathBuf::from(format!("{}{PART_SUFFIX}", complete.display()));
        let failed = |source| Error::Write {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        let locked = tokio::task::spawn_blocking(|| Flock::lock(file, FlockArg::LockExclusive));
        let file = locked
            .await
            .map_err(|error| failed(io::Error::other(error)))?
            .map_err(|(_, errno)| failed(errno.into()))?;
        let mut part = Self {
            file,
            path: path.clone(),
            hasher: Hasher::new(),
            length: 0,
        };
        let mut buffer = vec![0; 128 << 10];
        loop {
            match part.file.read(&mut buffer).map_err(failed)? {
                0 => break,
                count => {
                    part.hasher.update(&buffer[..count]);
                    part.length += count as u64;
                }
            }
        }
        if part.length > layer.size {
            part.clear()?;
        }
        Ok(part)
    }

    fn add(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        let written = self.file.write_all(bytes);
        written.map_err(|source| self.failed(source))
    }

    fn clear(&mut self) -> Result<(), Error> {
        (self.hasher, self.length) = (Hasher::new(), 0);
        let cleared = self
            .file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cleared.map(drop).map_err(|source| self.failed(source))
    }

    fn digest(&mut self) -> Digest {
        std::mem::take(&mut self.hasher).finish()
    }

    /// It is whole: it gets its own name.
    fn keep(self, complete: &Path) -> Result<(), Error> {
        fs::rename(&self.path, complete).map_err(|source| self.failed(source))
    }

    fn discard(self) -> Result<(), Error> {
        fs::remove_file(&self.path).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Write {
            path: self.path.clone(),
            source,
        }
    }
}

/// A protocol to try.
struct Way {
    protocol: ClientProtocol,
    any_certificate: bool,
}

impl Way {
    fn client(self, authorities: &[Vec<u8>]) -> Client {
        let authority = |pem: &Vec<u8>| Certificate {
            encoding: CertificateEncoding::Pem,
            data: pem.clone(),
        };
        Client::new(ClientConfig {
            extra_root_certificates: authorities.iter().map(authority).collect(),
            protocol: self.protocol,
            accept_invalid_certificates: self.any_certificate,
            connect_timeout: Some(PATIENCE),
            read_timeout: Some(PATIENCE),
            user_agent: concat!("bulkhead/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })
    }
}

/// The protocols to try: https with a certificate that is right, unless the flag says otherwise or
/// the registry is on this host.
fn ways(reference: &Reference, tls_verify: Option<bool>) -> Vec<Way> {
    // The library's network code wants to be told whose cryptography to use; telling twice is no
    // harm.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let way = |protocol, any_certificate| Way {
        protocol,
        any_certificate,
    };
    match tls_verify {
        Some(true) => vec![way(ClientProtocol::Https, false)],
        Some(false) => vec![
            way(ClientProtocol::Https, true),
            way(ClientProtocol::Http, false),
        ],
        None if is_this_host(reference.resolve_registry()) => vec![
            way(ClientProtocol::Http, false),
            way(ClientProtocol::Https, false),
        ],
        None => vec![way(ClientProtocol::Https, false)],
    }
}

/// Whether a registry's name, perhaps with a port, is one of this host.
fn is_this_host(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => registry.split(':').next().unwrap_or_default(),
    };
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn auth(reference: &Reference, access: &Access) -> Result<RegistryAuth, Error> {
    let found = match &access.credentials {
        Some(credentials) => Some(credentials.clone()),
        None => Credentials::find(
            reference.registry(),
            reference.repository(),
            access.credentials_file.as_deref(),
        )?,
    };
    Ok(found.map_or(RegistryAuth::Anonymous, |found| {
        RegistryAuth::Basic(found.user, found.password)
    }))
}

async fn next<T>(stream: &mut SizedStream) -> Option<io::Result<T>>
where
    SizedStream: Stream<Item = io::Result<T>>,
{
    poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}

fn check(what: &str, declared: Digest, digest: Digest) -> Result<(), Error> {
    match digest == declared {
        true => Ok(()),
        false => Err(Error::Digest {
            what: what.to_owned(),
            digest,
            declared,
        }),
    }
}

fn check_length(what: &str, declared: &Descriptor, length: u64) -> Result<(), Error> {
    match length == declared.size {
        true => Ok(()),
        false => Err(Error::Length {
            what: what.to_owned(),
            length,
            declared: declared.size,
        }),
    }
}

fn refused(what: &str, error: &OciDistributionError) -> Error {
    Error::Registry {
        what: what.to_owned(),
        reason: reason(error),
    }
}

fn failed(what: &str, error: &io::Error) -> Error {
    Error::Registry {
        what: what.to_owned(),
        reason: chain(error),
    }
}

/// What a registry said, in its own words where it has some.
fn reason(error: &OciDistributionError) -> String {
    use OciDistributionError as E;
    match error {
        E::UnauthorizedError { .. } | E::AuthenticationFailure(_) => {
            "the registry wants other credentials; give --creds USER:PASSWORD, or log in with \
             podman or docker"
                .to_owned()
        }
        E::ImageManifestNotFoundError(_) => "the registry does not have it".to_owned(),
        E::RegistryError { envelope, .. } => {
            let words = envelope
                .errors
                .iter()
                .map(|error| match &error.message[..] {
                    "" => format!("{:?}", error.code),
                    message => message.to_owned(),
                });
            printable(&words.collect::<Vec<_>>().join("; "), 300)
        }
        E::ServerError { code, .. } => format!("the registry answers with status {code}"),
        other => chain(other),
    }
}

/// An error of others and its causes, on one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    printable(&crate::text::chain(error), 400)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_spoken_to_without_encryption() {
        for registry in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.9.9.9",
            "[::1]:5000",
        ] {
            assert!(is_this_host(registry), "{registry}");
        }
        for registry in [
            "docker.io",
            "localhost.example.org",
            "10.0.0.1:5000",
            "128.0.0.1",
        ] {
            assert!(!is_this_host(registry), "{registry}");
        }
        let plain = |name: &str, flag| {
            let reference = name.parse().unwrap();
            let first = ways(&reference, flag).remove(0);
            (
                first.protocol == ClientProtocol::Http,
                first.any_certificate,
            )
        };
        assert_eq!(plain("localhost:5000/x", None), (true, false));
        assert_eq!(plain("localhost:5000/x", Some(true)), (false, false));
        assert_eq!(plain("example.org/x", None), (false, false));
        assert_eq!(plain("example.org/x", Some(false)), (false, true));
    }
}
