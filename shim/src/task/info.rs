//! `-info`: what the runtime is and can do, for clients that ask containerd.

use protobuf::{Message, MessageField, well_known_types::any::Any};

use super::proto::bootstrap::{RuntimeInfo, RuntimeVersion};
use crate::features;

/// The name under which containerd's clients know this runtime.
const NAME: &str = "io.containerd.bulkhead.v2";

/// The type of the features, whose form is JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Standard input is no Any.
    #[error("standard input has {length} bytes that are no Any with options")]
    Input {
        /// How many.
        length: usize,
    },
}

/// What `-info` prints, with the options that came on standard input.
///
/// # Errors
/// When standard input holds anything else.
pub fn info(options: &[u8]) -> Result<Vec<u8>, Error> {
    let options = match options {
        [] => None,
        bytes => Some(Any::parse_from_bytes(bytes).map_err(|_| Error::Input {
            length: bytes.len(),
        })?),
    };
    let info = RuntimeInfo {
        name: NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        options: options.into(),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value: features::document().to_string().into_bytes(),
            ..Default::default()
        }),
        ..Default::default()
    };
    Ok(info
        .write_to_bytes()
        .expect("all of its fields can be written"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_tells_its_name_and_gives_options_back() {
        let options = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            ..Default::default()
        };
        let bytes = options.write_to_bytes().expect("written");
        let info = info(&bytes).expect("answered");
        let info = RuntimeInfo::parse_from_bytes(&info).expect("a RuntimeInfo");
        assert_eq!(info.name, "io.containerd.bulkhead.v2");
        assert_eq!(info.options.type_url, "containerd.runc.v1.Options");
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        assert!(info.features.type_url.ends_with("features/Features"));
        let features: oci_spec::runtime::Features =
            serde_json::from_slice(&info.features.value).expect("the specification's form");
        let hooks = features.hooks().clone().unwrap_or_default();
        assert!(hooks.contains(&"createRuntime".to_owned()), "{hooks:?}");
    }

    #[test]
    fn other_input_is_refused() {
        assert!(info(b"\xff").is_err());
        assert!(info(b"").is_ok());
    }
}
