//! The runtime's options: what an administrator writes below `options` in containerd's
//! configuration, or docker and ctr send by themselves.

use protobuf::{Message, well_known_types::any::Any};

use super::proto::bootstrap::{RuncOptions, RuntimeOptions};
use crate::text::printable;

/// What can be asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether `linux.cgroupsPath` is systemd's `slice:prefix:name`.
    pub systemd_cgroup: bool,
}

/// Why options cannot be followed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Of another runtime.
    #[error(
        "runtime options of the type {type_url:?} are not known; remove `options` of this runtime from containerd's configuration"
    )]
    Type {
        /// The type.
        type_url: String,
    },
    /// They are not what their type says.
    #[error("the runtime options cannot be read as {name}")]
    Form {
        /// The type.
        name: &'static str,
    },
    /// One that cannot be followed.
    #[error("the runtime option {name} = {value:?} is not supported; {advice}")]
    Unsupported {
        /// The option as containerd's configuration calls it.
        name: &'static str,
        /// Its value.
        value: String,
        /// What to do.
        advice: &'static str,
    },
}

const RUNC: &str = "containerd.runc.v1.Options";
const GENERIC: &str = "runtimeoptions.v1.Options";

impl Options {
    /// Whether this is a message with options.
    pub fn known(any: &Any) -> bool {
        [RUNC, GENERIC].contains(&name(any))
    }

    /// Reads them.
    ///
    /// # Errors
    /// When they are of a type that is not known, or ask for what cannot be done.
    pub fn read(any: &Any) -> Result<Self, Error> {
        match name(any) {
            RUNC => {
                let options = RuncOptions::parse_from_bytes(&any.value);
                Self::of_runc(&options.map_err(|_| Error::Form { name: RUNC })?)
            }
            GENERIC => {
                let options = RuntimeOptions::parse_from_bytes(&any.value);
                Self::generic(&options.map_err(|_| Error::Form { name: GENERIC })?)
            }
            _ => Err(Error::Type {
                type_url: printable(&any.type_url, 120),
            }),
        }
    }

    /// The others concern runc's program, its pivot_root, keyring and pipes, none of which are there.
    fn of_runc(options: &RuncOptions) -> Result<Self, Error> {
        let refuse = |name, value: &str, advice| match value.is_empty() {
            true => Ok(()),
            false => Err(Error::Unsupported {
                name,
                value: printable(value, 120),
                advice,
            }),
        };
        refuse(
            "BinaryName",
            &options.binary_name,
            "this shim runs no other program; use io.containerd.runc.v2 for that",
        )?;
        refuse(
            "ShimCgroup",
            &options.shim_cgroup,
            "the shim stays in the cgroup of containerd",
        )?;
        Ok(Self {
            systemd_cgroup: options.systemd_cgroup,
        })
    }

    fn generic(options: &RuntimeOptions) -> Result<Self, Error> {
        if !options.config_path.is_empty() || !options.config_body.is_empty() {
            return Err(Error::Unsupported {
                name: "ConfigPath",
                value: printable(&options.config_path, 120),
                advice: "the shim is configured by no file; remove it",
            });
        }
        Ok(Self::default())
    }
}

fn name(any: &Any) -> &str {
    let url = any.type_url.as_str();
    url.rsplit('/').next().unwrap_or(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, message: &impl Message) -> Any {
        Any {
            type_url: type_url.to_owned(),
            value: message.write_to_bytes().expect("written"),
            ..Default::default()
        }
    }

    #[test]
    fn an_option_that_cannot_be_followed_is_named() {
        let options = RuncOptions {
            binary_name: "crun".to_owned(),
            ..Default::default()
        };
        let error = Options::read(&any(RUNC, &options)).expect_err("refused");
        assert!(
            error.to_string().contains("BinaryName = \"crun\""),
            "{error}"
        );
        let options = RuntimeOptions {
            config_path: "/etc/x".to_owned(),
            ..Default::default()
        };
        let error = Options::read(&any(GENERIC, &options)).expect_err("refused");
        assert!(error.to_string().contains("/etc/x"), "{error}");
    }

    #[test]
    fn empty_options_of_either_kind_are_none() {
        for any in [
            any(RUNC, &RuncOptions::default()),
            any(
                &format!("types.example.org/{GENERIC}"),
                &RuntimeOptions::default(),
            ),
        ] {
            assert_eq!(Options::read(&any), Ok(Options::default()));
        }
    }

    #[test]
    fn options_of_another_runtime_are_refused() {
        let error = Options::read(&any("other.v1.Options", &RuncOptions::default()));
        assert!(
            error
                .expect_err("refused")
                .to_string()
                .contains("other.v1.Options")
        );
    }
}
