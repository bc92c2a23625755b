//! Names that people give: containers and namespaces. Each becomes the name of
//! a directory.

use std::fmt;

/// The longest file name of Linux, in bytes.
const MAX_BYTES: usize = 255;

/// Why a text is no name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Empty, `.`, `..`, or with other characters than `[A-Za-z0-9_+-.]`.
    #[error(
        "invalid {what} {name:?}: use one or more of the characters a-z A-Z 0-9 _ + - . and not just dots"
    )]
    Format {
        /// What was to be named.
        what: &'static str,
        /// The text.
        name: String,
    },
    /// Longer than a file name may be.
    #[error("the {what} has {length} bytes, at most {MAX_BYTES} are possible")]
    TooLong {
        /// What was to be named.
        what: &'static str,
        /// Its length.
        length: usize,
    },
}

/// A container's name, unique in its namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ContainerId(String);

/// A group of containers that know nothing of other groups.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Namespace(String);

impl ContainerId {
    /// Takes `name` if it can be a container's.
    ///
    /// # Errors
    /// When it is empty, too long, only dots, or has a character outside `[A-Za-z0-9_+-.]`.
    pub fn parse(name: &str) -> Result<Self, Error> {
        checked("container ID", name).map(Self)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Namespace {
    /// Takes `name` if it can be a namespace's.
    ///
    /// # Errors
    /// As [`ContainerId::parse`].
    pub fn parse(name: &str) -> Result<Self, Error> {
        checked("namespace", name).map(Self)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn checked(what: &'static str, name: &str) -> Result<String, Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    if name.bytes().all(|byte| byte == b'.') || !name.bytes().all(allowed) {
        return Err(Error::Format {
            what,
            name: name.to_owned(),
        });
    }
    if name.len() > MAX_BYTES {
        return Err(Error::TooLong {
            what,
            length: name.len(),
        });
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_characters_that_other_runtimes_take_are_taken() {
        assert_eq!(
            ContainerId::parse("web-0_a.B+9").map(|id| id.to_string()),
            Ok("web-0_a.B+9".to_owned())
        );
    }

    #[test]
    fn empty_names_and_directories_are_refused() {
        for name in ["", ".", "..", "...", "a/b", "a b", "ä", "a\0"] {
            assert!(ContainerId::parse(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_name_longer_than_a_file_name_is_refused_by_its_length() {
        assert!(ContainerId::parse(&"a".repeat(255)).is_ok());
        assert_eq!(
            ContainerId::parse(&"a".repeat(256)),
            Err(Error::TooLong {
                what: "container ID",
                length: 256
            })
        );
    }

    proptest! {
        #[test]
        fn whatever_is_taken_is_a_single_plain_path_component(name in ".{0,300}") {
            if let Ok(id) = ContainerId::parse(&name) {
                let path = std::path::Path::new(id.as_str());
                let components: Vec<_> = path.components().collect();
                prop_assert_eq!(components.len(), 1);
                prop_assert!(matches!(components[0], std::path::Component::Normal(_)));
            }
        }
    }
}
