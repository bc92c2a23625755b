//! Where a stream goes, as containerd's clients write it.
//!
//! ```text
//!   ""                          nowhere
//!   /path, fifo:///path         a named pipe that the client made
//!   file:///path                a file that is appended to
//!   binary:///path?key=value    a program that logs: `path key value`
//! ```

use std::path::PathBuf;

use crate::text::printable;

/// Where a stream goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Nowhere.
    Null,
    /// To a named pipe.
    Fifo(PathBuf),
    /// To the end of a file.
    File(PathBuf),
    /// To a program.
    Logger {
        /// The program.
        program: PathBuf,
        /// Its arguments.
        arguments: Vec<String>,
    },
}

/// Why a text names no target.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A scheme that is not served.
    #[error("unknown STDIO scheme {scheme:?}: fifo, file and binary are known")]
    Scheme {
        /// The scheme.
        scheme: String,
    },
    /// No absolute path.
    #[error("the stream's target {uri:?} has no absolute path")]
    Path {
        /// The text.
        uri: String,
    },
    /// A percent sign that escapes nothing, or no UTF-8.
    #[error("the stream's target {uri:?} has an invalid escape")]
    Escape {
        /// The text.
        uri: String,
    },
}

impl Target {
    /// Reads one.
    ///
    /// # Errors
    /// When it is none of the forms above.
    pub fn parse(uri: &str) -> Result<Self, Error> {
        if uri.is_empty() {
            return Ok(Self::Null);
        }
        // A path is taken as it is: names of pipes are escaped by nobody.
        if uri.starts_with('/') {
            return Ok(Self::Fifo(uri.into()));
        }
        let no_path = || Error::Path {
            uri: printable(uri, 200),
        };
        let (scheme, rest) = uri.split_once("://").ok_or_else(no_path)?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        if !path.starts_with('/') {
            return Err(no_path());
        }
        let bad_escape = || Error::Escape {
            uri: printable(uri, 200),
        };
        let path = PathBuf::from(unescaped(path, false).ok_or_else(bad_escape)?);
        match scheme {
            "fifo" => Ok(Self::Fifo(path)),
            "file" => Ok(Self::File(path)),
            "binary" => Ok(Self::Logger {
                program: path,
                arguments: arguments(query).ok_or_else(bad_escape)?,
            }),
            _ => Err(Error::Scheme {
                scheme: printable(scheme, 40),
            }),
        }
    }
}

/// The keys and values of a query, each once, in the order in which they stand.
fn arguments(query: &str) -> Option<Vec<String>> {
    let mut arguments: Vec<(String, String)> = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let key = unescaped(key, true)?;
        if !arguments.iter().any(|(known, _)| *known == key) {
            arguments.push((key, unescaped(value, true)?));
        }
    }
    let pairs = arguments.into_iter();
    Some(pairs.flat_map(|(key, value)| [key, value]).collect())
}

/// Percent escapes resolved, and in a query a plus sign.
fn unescaped(text: &str, query: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                let digit = |byte: u8| char::from(byte).to_digit(16);
                (digit(digits[0])? * 16 + digit(digits[1])?) as u8
            }
            b'+' if query => b' ',
            byte => byte,
        });
    }
    let valid = !bytes.contains(&0);
    valid.then(|| String::from_utf8(bytes).ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn logger(program: &str, arguments: &[&str]) -> Target {
        Target::Logger {
            program: program.into(),
            arguments: arguments.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    #[test]
    fn each_form_is_understood() {
        let parse = |uri| Target::parse(uri).expect("understood");
        assert_eq!(parse(""), Target::Null);
        assert_eq!(parse("/run/f/a%20b"), Target::Fifo("/run/f/a%20b".into()));
        assert_eq!(parse("fifo:///run/f"), Target::Fifo("/run/f".into()));
        assert_eq!(parse("file:///l/a%20b"), Target::File("/l/a b".into()));
        assert_eq!(parse("binary:///bin/log"), logger("/bin/log", &[]));
    }

    #[test]
    fn a_loggers_arguments_are_its_keys_and_values() {
        assert_eq!(
            Target::parse("binary:///bin/log?file=/tmp/a%26b&k=1+2&k=3&flag"),
            Ok(logger(
                "/bin/log",
                &["file", "/tmp/a&b", "k", "1 2", "flag", ""]
            ))
        );
    }

    #[test]
    fn what_is_none_is_refused_by_its_name() {
        let message = |uri| Target::parse(uri).expect_err("refused").to_string();
        assert!(message("npipe:///x").contains("npipe"));
        assert!(message("file://x").contains("file://x"));
        assert!(message("x").contains("no absolute path"));
        assert!(message("file:///%zz").contains("invalid escape"));
        assert!(message("file:///a%00b").contains("invalid escape"));
    }

    proptest! {
        #[test]
        fn every_target_has_an_absolute_path(uri in "((fifo|file|binary)://)?/?[a-z%0-9?&=+/.]{0,40}|.*") {
            match Target::parse(&uri) {
                Ok(Target::Fifo(path) | Target::File(path) | Target::Logger { program: path, .. }) => {
                    prop_assert!(path.is_absolute());
                }
                Ok(Target::Null) => prop_assert!(uri.is_empty()),
                Err(_) => {}
            }
        }
    }
}
