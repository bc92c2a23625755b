//! The shim's command line, as containerd writes it.
//!
//! `-namespace NS -address SOCK -publish-binary FILE -id ID [-bundle DIR] [-debug] start|delete`,
//! with one dash or two, values behind a space or an equals sign.

use std::{ffi::OsString, path::PathBuf};

use crate::{
    id::{self, ContainerId, Namespace},
    text::printable,
};

/// What the shim was called for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
    /// Tell what the runtime is and can.
    Info,
    /// Serve a container.
    Start(Invocation),
    /// Remove what a killed shim left.
    Delete(Invocation),
}

/// Whom the shim serves, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The container.
    pub id: ContainerId,
    /// containerd's socket.
    pub address: String,
    /// The container's bundle, where it is named; else the working directory.
    pub bundle: Option<PathBuf>,
    /// Whether to log what is of use to developers.
    pub debug: bool,
}

/// Why a command line cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag that containerd does not have.
    #[error("unknown flag {flag}; `-h` lists those known")]
    Unknown {
        /// The flag.
        flag: String,
    },
    /// A flag's value is missing.
    #[error("flag -{flag} needs a value")]
    NoValue {
        /// The flag.
        flag: &'static str,
    },
    /// A text that is none.
    #[error("the command line's argument {argument} is not valid UTF-8")]
    NotText {
        /// The argument.
        argument: String,
    },
    /// A flag that must be there is not.
    #[error("flag -{flag} is missing; containerd passes it")]
    Missing {
        /// The flag.
        flag: &'static str,
    },
    /// No name.
    #[error(transparent)]
    Name(#[from] id::Error),
    /// Neither start nor delete.
    #[error(
        "unknown command {command:?}: this program is started by containerd with `start` or `delete`"
    )]
    Command {
        /// The command.
        command: String,
    },
}

/// What `-h` prints.
pub const HELP: &str = "\
Usage: containerd-shim-bulkhead-v2 -namespace NS -id ID -address SOCKET [FLAGS] start|delete
       containerd-shim-bulkhead-v2 -v | -info

Serves containers to containerd, each pod in a virtual machine of its own. containerd starts this
program; people use ctr, nerdctl, docker or Kubernetes with the runtime io.containerd.bulkhead.v2.

  -namespace NS         containerd's namespace of the container
  -id ID                the container
  -address SOCKET       containerd's socket
  -publish-binary FILE  containerd's program; not used: events go to its socket
  -bundle DIR           the container's bundle, for delete [default: the working directory]
  -debug                log what is of use to developers too
  -v                    print the version
  -info                 print what the runtime is and can, as containerd's RuntimeInfo
";

/// Reads the arguments behind the program's name.
///
/// # Errors
/// When they are none of the forms above.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, Error> {
    let mut flags = Flags::default();
    let mut arguments = arguments.into_iter();
    let mut action = None;
    while let Some(argument) = arguments.next() {
        let argument = text(argument)?;
        let Some(flag) = argument.strip_prefix('-') else {
            action = Some(argument);
            break;
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        flags.take(name, value, &mut arguments)?;
    }
    if flags.help {
        return Ok(Command::Help);
    }
    if flags.version {
        return Ok(Command::Version);
    }
    if flags.info {
        return Ok(Command::Info);
    }
    match action.as_deref() {
        Some("start") => Ok(Command::Start(flags.invocation()?)),
        Some("delete") => Ok(Command::Delete(flags.invocation()?)),
        other => Err(Error::Command {
            command: printable(other.unwrap_or_default(), 80),
        }),
    }
}

#[derive(Default)]
struct Flags {
    namespace: Option<String>,
    id: Option<String>,
    address: Option<String>,
    bundle: Option<String>,
    debug: bool,
    help: bool,
    version: bool,
    info: bool,
}

impl Flags {
    fn take(
        &mut self,
        name: &str,
        value: Option<String>,
        rest: &mut impl Iterator<Item = OsString>,
    ) -> Result<(), Error> {
        let mut set = |flag: &'static str| -> Result<String, Error> {
            match value.clone() {
                Some(value) => Ok(value),
                None => text(rest.next().ok_or(Error::NoValue { flag })?),
            }
        };
        match name {
            "namespace" => self.namespace = Some(set("namespace")?),
            "id" => self.id = Some(set("id")?),
            "address" => self.address = Some(set("address")?),
            "bundle" => self.bundle = Some(set("bundle")?),
            // Those that are of no use to us: events go over ttrpc, and the socket is the daemon's.
            "publish-binary" => drop(set("publish-binary")?),
            "socket" => drop(set("socket")?),
            "debug" => self.debug = on(value.as_deref()),
            "h" | "help" => self.help = on(value.as_deref()),
            "v" | "version" => self.version = on(value.as_deref()),
            "info" => self.info = on(value.as_deref()),
            _ => {
                return Err(Error::Unknown {
                    flag: printable(&format!("-{name}"), 80),
                });
            }
        }
        Ok(())
    }

    fn invocation(self) -> Result<Invocation, Error> {
        let missing = |flag| Error::Missing { flag };
        Ok(Invocation {
            namespace: Namespace::parse(&self.namespace.ok_or(missing("namespace"))?)?,
            id: ContainerId::parse(&self.id.ok_or(missing("id"))?)?,
            address: self.address.unwrap_or_default(),
            bundle: self
                .bundle
                .filter(|bundle| !bundle.is_empty())
                .map(PathBuf::from),
            debug: self.debug,
        })
    }
}

fn on(value: Option<&str>) -> bool {
    !matches!(value, Some("false" | "0" | "f" | "F" | "FALSE" | "False"))
}

fn text(argument: OsString) -> Result<String, Error> {
    argument.into_string().map_err(|argument| Error::NotText {
        argument: printable(&argument.to_string_lossy(), 80),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(line: &str) -> Result<Command, Error> {
        parse(line.split(' ').map(OsString::from))
    }

    fn invocation() -> Invocation {
        Invocation {
            namespace: Namespace::parse("default").expect("a name"),
            id: ContainerId::parse("t1").expect("a name"),
            address: "/run/c.sock".to_owned(),
            bundle: None,
            debug: true,
        }
    }

    #[test]
    fn start_is_read_as_every_containerd_writes_it() {
        let line = "-namespace default -address /run/c.sock -publish-binary /usr/bin/containerd -id t1 -debug start";
        let command = parsed(line).expect("understood");
        assert_eq!(command, Command::Start(invocation()));
        let other = "--namespace=default --address=/run/c.sock --id=t1 --debug=true start";
        assert_eq!(parsed(other).expect("understood"), command);
    }

    #[test]
    fn delete_names_its_bundle() {
        let line =
            "-namespace default -address /run/c.sock -publish-binary x -id t1 -bundle /b delete";
        let expected = Invocation {
            bundle: Some("/b".into()),
            debug: false,
            ..invocation()
        };
        assert_eq!(parsed(line).expect("understood"), Command::Delete(expected));
    }

    #[test]
    fn help_version_and_info_need_nothing_else() {
        assert_eq!(parsed("-h").expect("understood"), Command::Help);
        assert_eq!(parsed("-v").expect("understood"), Command::Version);
        assert_eq!(parsed("-info").expect("understood"), Command::Info);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let message = |line| parsed(line).expect_err("refused").to_string();
        assert!(message("-id t1 start").contains("-namespace is missing"));
        assert!(message("-frob 3 start").contains("-frob"));
        assert!(message("-id").contains("-id needs a value"));
        assert!(message("-namespace d -id t1 restart").contains("restart"));
        assert!(message("-namespace d -id ../t1 start").contains("container ID"));
    }

    proptest! {
        #[test]
        fn no_command_line_panics(arguments in prop::collection::vec("-{0,2}[a-z=]{0,12}|.*", 0..8)) {
            let _ = parse(arguments.into_iter().map(OsString::from));
        }
    }
}
