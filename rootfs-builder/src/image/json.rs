//! The JSON documents of images: index, manifest and configuration.
//!
//! Two families describe the same things in nearly the same words: the OCI image specification
//! and Docker's second schema. What is not needed is not read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// A document of either kind is at most this long.
pub const DOCUMENT_MAX: u64 = 4 << 20;

/// As many layers an image may have at most; overlays of others end at 128.
const LAYERS_MAX: usize = 1000;

/// Why a document is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON, or of another form.
    #[error("it is not valid")]
    Json(#[from] serde_json::Error),
    /// A kind of artifact that is no container image.
    #[error("it is of the type {0:?}; images and indexes of OCI and of Docker's schema 2 are read")]
    Type(String),
    /// Neither layers nor manifests.
    #[error("it has neither layers nor manifests")]
    Neither,
    /// Layers that nobody stacks.
    #[error("it has {0} layers, at most {LAYERS_MAX} are read")]
    TooManyLayers(usize),
}

/// A reference to a document or layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length.
    pub size: u64,
    /// For what machines it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// What else is said of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// A kind of machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Its architecture, as Go names it.
    pub architecture: String,
    /// Its operating system.
    pub os: String,
    /// Which of several kinds of the architecture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// The machines that Bulkhead makes.
    pub const ARCHITECTURE: &str = "amd64";

    /// Whether a machine of ours runs what is for this kind.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == Self::ARCHITECTURE
    }
}

/// One image: its configuration and its layers, the lowest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers.
    pub layers: Vec<Descriptor>,
}

/// What a name can lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Images for several machines, or of several names.
    Index(Vec<Descriptor>),
}

impl Document {
    /// Reads a document.
    ///
    /// # Errors
    ///
    /// When it is neither index nor manifest of an image.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Any {
            media_type: Option<String>,
            config: Option<Descriptor>,
            layers: Option<Vec<Descriptor>>,
            manifests: Option<Vec<Descriptor>>,
        }
        let any: Any = serde_json::from_slice(bytes)?;
        let kinds = [
            "application/vnd.oci.image.manifest.v1+json",
            "application/vnd.oci.image.index.v1+json",
            "application/vnd.docker.distribution.manifest.v2+json",
            "application/vnd.docker.distribution.manifest.list.v2+json",
        ];
        if let Some(kind) = any.media_type
            && !kinds.contains(&kind.as_str())
        {
            return Err(Error::Type(kind.chars().take(100).collect()));
        }
        match (any.config, any.layers, any.manifests) {
            (Some(config), Some(layers), None) if layers.len() <= LAYERS_MAX => {
                Ok(Self::Manifest(Manifest { config, layers }))
            }
            (Some(_), Some(layers), None) => Err(Error::TooManyLayers(layers.len())),
            (None, None, Some(manifests)) => Ok(Self::Index(manifests)),
            _ => Err(Error::Neither),
        }
    }
}

/// An image's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Config {
    /// The machines that it is for.
    #[serde(flatten)]
    pub platform: Platform,
    /// When it was made.
    #[serde(default)]
    pub created: Option<String>,
    /// How it is run.
    #[serde(default)]
    pub config: Option<Execution>,
    /// Its layers.
    pub rootfs: RootFs,
}

/// The layers, unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RootFs {
    /// Their digests, the lowest first.
    #[serde(default)]
    pub diff_ids: Vec<Digest>,
}

/// How an image is run. Docker writes `null` where OCI leaves out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Execution {
    /// User and group, by names or numbers.
    pub user: Option<String>,
    /// Variables, `NAME=value`.
    pub env: Option<Vec<String>>,
    /// What begins the command.
    pub entrypoint: Option<Vec<String>>,
    /// What follows, where nothing else is asked for.
    pub cmd: Option<Vec<String>>,
    /// Where it starts.
    pub working_dir: Option<String>,
    /// What ends it.
    pub stop_signal: Option<String>,
    /// Directories for data that outlives the container.
    pub volumes: Option<BTreeMap<String, serde_json::Value>>,
}

impl Config {
    /// Reads a configuration.
    ///
    /// # Errors
    ///
    /// When it is not JSON, or of another form.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let config: Self = serde_json::from_slice(bytes)?;
        match config.rootfs.diff_ids.len() {
            count if count > LAYERS_MAX => Err(Error::TooManyLayers(count)),
            _ => Ok(config),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn descriptor(kind: &str) -> serde_json::Value {
        json!({"mediaType": kind, "digest": Digest::of(kind.as_bytes()), "size": 7})
    }

    #[test]
    fn manifests_and_indexes_are_told_apart() {
        let manifest = json!({
            "schemaVersion": 2,
            "config": descriptor("c"),
            "layers": [descriptor("l")],
        });
        let Document::Manifest(manifest) =
            Document::parse(manifest.to_string().as_bytes()).unwrap()
        else {
            panic!("not a manifest");
        };
        assert_eq!(manifest.layers[0].size, 7);
        let mut entry = descriptor("m");
        entry["platform"] = json!({"architecture": "amd64", "os": "linux", "variant": "v3"});
        let index = json!({"manifests": [entry]});
        let Document::Index(manifests) = Document::parse(index.to_string().as_bytes()).unwrap()
        else {
            panic!("not an index");
        };
        assert!(manifests[0].platform.as_ref().unwrap().is_ours());
    }

    #[test]
    fn what_is_no_image_is_refused_by_its_type() {
        let old = json!({"mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws"});
        let error = Document::parse(old.to_string().as_bytes()).unwrap_err();
        assert!(error.to_string().contains("v1+prettyjws"), "{error}");
        assert!(matches!(Document::parse(b"{}"), Err(Error::Neither)));
        assert!(matches!(Document::parse(b"[1"), Err(Error::Json(_))));
    }

    #[test]
    fn a_configuration_may_have_null_everywhere() {
        let text = json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Env": null, "Cmd": ["sh"], "Entrypoint": null, "Volumes": null,
                       "User": "", "Labels": {"a": "b"}},
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"")]},
        });
        let config = Config::parse(text.to_string().as_bytes()).unwrap();
        let execution = config.config.unwrap();
        assert_eq!(execution.cmd, Some(vec!["sh".to_owned()]));
        assert_eq!(execution.env, None);
    }

    proptest! {
        #[test]
        fn any_text_is_a_document_or_an_error(text in "[\\[\\]{}\",:a-z0-9]{0,80}") {
            let _ = Document::parse(text.as_bytes());
            let _ = Config::parse(text.as_bytes());
        }
    }
}
