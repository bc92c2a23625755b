//! Names that the host gives: containers and execs.

use std::fmt;

/// A name that is no name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Nothing at all.
    #[error("the {0} id is empty; give it at least one character")]
    Empty(&'static str),
    /// More than [`protocol::MAX_ID_BYTES`].
    #[error(
        "the {what} id has {length} bytes; at most {} are allowed",
        protocol::MAX_ID_BYTES
    )]
    TooLong {
        /// Whose id.
        what: &'static str,
        /// How long it is.
        length: usize,
    },
    /// A character outside `[A-Za-z0-9_.+-]`, or `.` or `..` as the whole.
    #[error("the {what} id {id:?} is not made of letters, digits and _ . + - alone")]
    Characters {
        /// Whose id.
        what: &'static str,
        /// The id.
        id: String,
    },
}

/// A container's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerId(String);

/// The name of an exec in its container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExecId(String);

impl ContainerId {
    /// Takes `id` if it is a name.
    ///
    /// # Errors
    /// When it is empty, too long or has other characters than `[A-Za-z0-9_.+-]`.
    pub fn parse(id: &str) -> Result<Self, Error> {
        check("container", id).map(|()| Self(id.to_owned()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl ExecId {
    /// Takes `id` if it is a name.
    ///
    /// # Errors
    /// As [`ContainerId::parse`].
    pub fn parse(id: &str) -> Result<Self, Error> {
        check("exec", id).map(|()| Self(id.to_owned()))
    }

    /// Takes `id` if it is a name, and nothing where it is empty.
    ///
    /// # Errors
    /// As [`ContainerId::parse`].
    pub fn parse_optional(id: &str) -> Result<Option<Self>, Error> {
        if id.is_empty() {
            Ok(None)
        } else {
            Self::parse(id).map(Some)
        }
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ExecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check(what: &'static str, id: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
    if id.is_empty() {
        Err(Error::Empty(what))
    } else if id.len() > protocol::MAX_ID_BYTES {
        Err(Error::TooLong {
            what,
            length: id.len(),
        })
    } else if id == "." || id == ".." || !id.bytes().all(allowed) {
        Err(Error::Characters {
            what,
            id: id.to_owned(),
        })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_id_of_the_allowed_characters_is_taken_as_it_is() {
        assert_eq!(
            ContainerId::parse("web-0_a.B+9").map(|id| id.to_string()),
            Ok("web-0_a.B+9".to_owned())
        );
    }

    #[test]
    fn names_of_directories_are_no_ids() {
        for id in [".", "..", "a/b", "/"] {
            assert!(ContainerId::parse(id).is_err(), "{id}");
        }
    }

    #[test]
    fn an_id_may_have_1024_bytes_and_not_one_more() {
        assert!(ContainerId::parse(&"a".repeat(1024)).is_ok());
        assert!(ContainerId::parse(&"a".repeat(1025)).is_err());
    }

    #[test]
    fn an_empty_exec_id_means_the_container_itself() {
        assert_eq!(ExecId::parse_optional(""), Ok(None));
        assert_eq!(ExecId::parse(""), Err(Error::Empty("exec")));
    }

    proptest! {
        #[test]
        fn what_is_taken_is_one_plain_file_name(id in ".*") {
            if let Ok(id) = ContainerId::parse(&id) {
                let path = std::path::Path::new(id.as_str());
                prop_assert_eq!(path.components().count(), 1);
                prop_assert_eq!(path.file_name(), Some(id.as_str().as_ref()));
            }
        }
    }
}
