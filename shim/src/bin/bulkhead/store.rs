//! What the commands around images have in common: the store, the way to registries, and the bars
//! that show how far a fetch is.

use std::{
    collections::HashMap,
    io::IsTerminal as _,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;
use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use rootfs_builder::{
    digest::Digest,
    image::{Store, Stored},
};
use shim::image::{Access, Event, Location, credentials::Credentials, pull};

/// Where images are kept.
#[derive(Debug, Clone, Args)]
pub(crate) struct StoreArgs {
    /// Directory in which images are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/bulkhead/images")]
    pub(crate) image_root: PathBuf,
}

/// Where named volumes are kept.
#[derive(Debug, Clone, Args)]
pub(crate) struct VolumeRootArgs {
    /// Directory in which named volumes are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/bulkhead/volumes")]
    pub(crate) volume_root: PathBuf,
}

/// How registries are spoken to.
#[derive(Debug, Clone, Args)]
pub(crate) struct AccessArgs {
    /// Credentials for the registry [default: those of podman or docker]
    #[arg(long, value_name = "USER:PASSWORD")]
    pub(crate) creds: Option<String>,
    /// File with credentials for registries
    #[arg(long, value_name = "FILE")]
    pub(crate) authfile: Option<PathBuf>,
    /// Directory with certificates (*.crt) of authorities to trust [default: certs.d of podman or docker]
    #[arg(long, value_name = "DIR")]
    pub(crate) cert_dir: Option<PathBuf>,
    /// Whether a registry must have a valid certificate [default: true, but not on this host]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) tls_verify: Option<bool>,
}

impl StoreArgs {
    /// The store.
    pub(crate) fn open(&self) -> anyhow::Result<Store> {
        Ok(Store::open(&self.image_root)?)
    }
}

impl AccessArgs {
    fn access(&self) -> anyhow::Result<Access> {
        let credentials = self.creds.as_deref().map(Credentials::parse);
        Ok(Access {
            credentials: credentials.transpose()?,
            credentials_file: self.authfile.clone(),
            certificates: self.cert_dir.clone(),
            tls_verify: self.tls_verify,
        })
    }
}

/// Brings an image into the store, with bars on a terminal unless `quiet`.
pub(crate) fn fetch(
    store: &Store,
    location: &Location,
    name: Option<&str>,
    args: &AccessArgs,
    quiet: bool,
) -> anyhow::Result<Stored> {
    let access = args.access()?;
    let name = name.map(|name| match name.parse()? {
        Location::Registry(reference) => Ok(reference),
        _ => anyhow::bail!("--name {name:?} is a place and no name"),
    });
    let name = name.transpose()?;
    let bars = Bars::new(!quiet && std::io::stderr().is_terminal());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let report = |event| bars.show(event);
    let pulled = runtime.block_on(pull(store, location, &access, name.as_ref(), &report));
    bars.clear();
    Ok(pulled?)
}

/// A bar for each layer, and one for the disk.
struct Bars {
    all: Option<MultiProgress>,
    bars: Mutex<HashMap<Option<Digest>, ProgressBar>>,
}

impl Bars {
    fn new(shown: bool) -> Self {
        Self {
            all: shown.then(MultiProgress::new),
            bars: Mutex::default(),
        }
    }

    fn show(&self, event: Event) {
        let Some(all) = &self.all else {
            return;
        };
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Layer { digest, bytes } => {
                let name = digest.hex()[..12].to_owned();
                bars.insert(Some(digest), all.add(bar(&name, bytes)));
            }
            Event::Making { bytes } => {
                bars.insert(None, all.add(bar("disk", bytes)));
            }
            Event::Fetched { digest, bytes } => {
                if let Some(bar) = bars.get(&Some(digest)) {
                    bar.inc(bytes);
                }
            }
            Event::Made { bytes } => {
                if let Some(bar) = bars.get(&None) {
                    bar.inc(bytes);
                }
            }
        }
    }

    fn clear(&self) {
        if let Some(all) = &self.all {
            // What remains is the answer; a terminal that is gone needs no clearing.
            let _ = all.clear();
        }
    }
}

fn bar(name: &str, bytes: u64) -> ProgressBar {
    let template = "{msg:12} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}";
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::new(bytes)
        .with_style(style)
        .with_message(name.to_owned())
}
