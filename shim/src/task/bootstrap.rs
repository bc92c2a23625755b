//! What containerd and `start` say to each other before there is a socket.
//!
//! | containerd | standard input | standard output |
//! | --- | --- | --- |
//! | 1.6 | an Any with the runtime's options, or nothing | the address |
//! | 1.7 to 2.2 | the same, and `MAX_SHIM_VERSION` is set | JSON with the version, or the address |
//! | 2.3 and later | `BootstrapParams` | `BootstrapResult` |
//!
//! Nothing says which it is, but for the input itself: `BootstrapParams` begins with the ID and
//! the namespace that are also on the command line.

use std::path::PathBuf;

use protobuf::{Message, well_known_types::any::Any};
use serde_json::json;

use super::{
    arguments::Invocation,
    options::{self, Options},
    proto::bootstrap::{BootstrapParams, BootstrapResult},
};

/// The most of standard input that is read.
pub const STDIN_MAX: u64 = 4 << 20;

/// The newest task service that is served.
const NEWEST: u32 = 3;

/// The oldest.
const OLDEST: u32 = 2;

/// Where shims' sockets are where nobody says otherwise.
pub(super) const SOCKETS: &str = "/run/containerd/s";

/// The log level from which on developers' lines are wanted.
const DEBUG: i32 = -4;

/// How containerd wants the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dialect {
    /// The address alone, which stands for version 2.
    Address,
    /// JSON with the version of the task service.
    Json {
        /// The newest version that containerd knows.
        version: u32,
    },
    /// A `BootstrapResult`.
    Protobuf,
}

/// What containerd said.
#[derive(Debug, Clone, PartialEq)]
pub struct Bootstrap {
    /// How it wants the answer.
    pub dialect: Dialect,
    /// Where events go.
    pub events_address: String,
    /// Where sockets are to be made.
    pub sockets: PathBuf,
    /// Whether to log what is of use to developers.
    pub debug: bool,
    /// The runtime's options.
    pub options: Options,
}

/// The environment variables that matter.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `MAX_SHIM_VERSION`.
    pub max_shim_version: Option<String>,
    /// `TTRPC_ADDRESS`.
    pub ttrpc_address: Option<String>,
}

/// Why containerd was not understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither of the forms above.
    #[error(
        "standard input has {length} bytes that are neither BootstrapParams nor an Any with options"
    )]
    Input {
        /// How many.
        length: usize,
    },
    /// Options that cannot be followed.
    #[error(transparent)]
    Options(#[from] options::Error),
}

impl Environment {
    /// This process's.
    pub fn of_process() -> Self {
        let variable = |name| std::env::var(name).ok();
        Self {
            max_shim_version: variable("MAX_SHIM_VERSION"),
            ttrpc_address: variable("TTRPC_ADDRESS"),
        }
    }
}

impl Bootstrap {
    /// Reads standard input, as far as it was given.
    ///
    /// # Errors
    /// When it is in no form that is known, or asks for what cannot be done.
    pub fn read(
        input: &[u8],
        invocation: &Invocation,
        environment: &Environment,
    ) -> Result<Self, Error> {
        let mut bootstrap = Self {
            dialect: dialect(environment.max_shim_version.as_deref()),
            events_address: events_address(
                environment.ttrpc_address.as_deref(),
                &invocation.address,
            ),
            sockets: PathBuf::from(SOCKETS),
            debug: invocation.debug,
            options: Options::default(),
        };
        if let Some(params) = params(input, invocation) {
            bootstrap.dialect = Dialect::Protobuf;
            bootstrap.debug |= params.log_level <= DEBUG;
            if !params.containerd_ttrpc_address.is_empty() {
                bootstrap.events_address = plain(&params.containerd_ttrpc_address).to_owned();
            }
            if params.socket_dir.starts_with('/') {
                bootstrap.sockets = PathBuf::from(params.socket_dir);
            }
            // Further extensions are for those who know them.
            let mut values = params
                .extensions
                .iter()
                .filter_map(|one| one.value.as_ref());
            if let Some(options) = values.rfind(|any| Options::known(any)) {
                bootstrap.options = Options::read(options)?;
            }
        } else if !input.is_empty() {
            let any = Any::parse_from_bytes(input).ok();
            let any = any.filter(|any| !any.type_url.is_empty());
            let any = any.ok_or(Error::Input {
                length: input.len(),
            })?;
            bootstrap.options = Options::read(&any)?;
        }
        Ok(bootstrap)
    }

    /// What `start` prints for a shim that serves on `address`, and nothing but that.
    pub fn answer(&self, address: &str) -> Vec<u8> {
        match self.dialect {
            Dialect::Address => address.as_bytes().to_vec(),
            Dialect::Json { version } => {
                let answer = json!({"version": version, "address": address, "protocol": "ttrpc"});
                answer.to_string().into_bytes()
            }
            Dialect::Protobuf => {
                let result = BootstrapResult {
                    version: NEWEST as i32,
                    address: address.to_owned(),
                    protocol: "ttrpc".to_owned(),
                    ..Default::default()
                };
                result
                    .write_to_bytes()
                    .expect("all of its fields can be written")
            }
        }
    }
}

fn dialect(max_shim_version: Option<&str>) -> Dialect {
    match max_shim_version.map(str::parse::<u32>) {
        None | Some(Err(_)) => Dialect::Address,
        Some(Ok(version)) if version < OLDEST => Dialect::Address,
        Some(Ok(version)) => Dialect::Json {
            version: version.min(NEWEST),
        },
    }
}

/// The input as `BootstrapParams`, if it is that: an Any's first two fields have the same types.
fn params(input: &[u8], invocation: &Invocation) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    let ours = params.instance_id == invocation.id.as_str()
        && params.namespace == invocation.namespace.as_str();
    ours.then_some(params)
}

fn events_address(ttrpc_address: Option<&str>, address: &str) -> String {
    match ttrpc_address {
        Some(address) if !address.is_empty() => plain(address).to_owned(),
        _ => format!("{}.ttrpc", plain(address)),
    }
}

fn plain(address: &str) -> &str {
    address.strip_prefix("unix://").unwrap_or(address)
}

#[cfg(test)]
mod tests;
