//! Where an image is, as people write it: a name at a registry, or a transport and a place.

use std::{fmt, path::PathBuf, str::FromStr};

use oci_client::Reference;

/// Why a text names no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not the form of a name.
    #[error(
        "{text:?} is not the name of an image: {reason}; names are such as alpine, \
         example.org/team/app:1.2 or app@sha256:..., or begin with oci:, oci-archive:, \
         docker-archive:, containers-storage: or docker-daemon:"
    )]
    Name {
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A transport without a place.
    #[error("{0:?} names no file or directory behind the colon")]
    Empty(String),
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// At a registry.
    Registry(Reference),
    /// In a directory of the OCI's layout.
    Layout {
        /// The directory.
        path: PathBuf,
        /// The tag, where there are several images.
        tag: Option<String>,
    },
    /// In an archive of such a directory.
    LayoutArchive {
        /// The archive.
        path: PathBuf,
        /// The tag, where there are several images.
        tag: Option<String>,
    },
    /// In an archive of `docker save`.
    DockerArchive {
        /// The archive.
        path: PathBuf,
        /// The image's name, where there are several.
        name: Option<String>,
    },
    /// In another program's store, where skopeo gets it from.
    Foreign(String),
}

impl Location {
    /// Whether a text begins with a transport, so that it is no name that a store could know.
    pub fn has_transport(text: &str) -> bool {
        let transports = [
            "docker://",
            "oci:",
            "oci-archive:",
            "docker-archive:",
            "containers-storage:",
            "docker-daemon:",
        ];
        transports
            .iter()
            .any(|transport| text.starts_with(transport))
    }
}

impl FromStr for Location {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let place = |rest: &str| match rest.split_once(':') {
            _ if rest.is_empty() || rest.starts_with(':') => Err(Error::Empty(text.to_owned())),
            Some((path, tag)) if !tag.is_empty() => Ok((path.into(), Some(tag.to_owned()))),
            Some((path, _)) => Ok((path.into(), None)),
            None => Ok((rest.into(), None)),
        };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (path, tag) = place(rest)?;
            return Ok(Self::Layout { path, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (path, tag) = place(rest)?;
            return Ok(Self::LayoutArchive { path, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (path, name) = place(rest)?;
            return Ok(Self::DockerArchive { path, name });
        }
        if ["containers-storage:", "docker-daemon:"]
            .iter()
            .any(|transport| text.starts_with(transport))
        {
            return Ok(Self::Foreign(text.to_owned()));
        }
        let name = text.strip_prefix("docker://").unwrap_or(text);
        match name.parse() {
            Ok(reference) => Ok(Self::Registry(reference)),
            Err(error) => Err(Error::Name {
                text: name.chars().take(300).collect(),
                reason: error.to_string(),
            }),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut place = |transport: &str, path: &PathBuf, name: &Option<String>| {
            write!(f, "{transport}:{}", path.display())?;
            name.as_ref().map_or(Ok(()), |name| write!(f, ":{name}"))
        };
        match self {
            Self::Registry(reference) => f.write_str(&reference.whole()),
            Self::Layout { path, tag } => place("oci", path, tag),
            Self::LayoutArchive { path, tag } => place("oci-archive", path, tag),
            Self::DockerArchive { path, name } => place("docker-archive", path, name),
            Self::Foreign(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(text: &str) -> String {
        text.parse::<Location>().expect(text).to_string()
    }

    #[test]
    fn short_names_are_of_the_default_registry() {
        assert_eq!(shown("alpine"), "docker.io/library/alpine:latest");
        assert_eq!(shown("docker://a/b:1"), "docker.io/a/b:1");
        assert_eq!(shown("localhost:5000/x"), "localhost:5000/x:latest");
    }

    #[test]
    fn a_transport_has_a_place_and_perhaps_a_tag() {
        let with_tag = Location::Layout {
            path: "/tmp/layout".into(),
            tag: Some("3.1".to_owned()),
        };
        assert_eq!("oci:/tmp/layout:3.1".parse::<Location>().unwrap(), with_tag);
        for text in [
            "oci:dir",
            "oci-archive:a.tar:1",
            "docker-archive:a.tar:x/y:1",
        ] {
            assert_eq!(shown(text), text);
        }
        assert_eq!(
            "docker-daemon:alpine:latest".parse::<Location>().unwrap(),
            Location::Foreign("docker-daemon:alpine:latest".to_owned())
        );
    }

    #[test]
    fn what_is_no_name_is_refused_with_examples() {
        for text in ["", "UPPER", "a b", "x@sha256:1", "-"] {
            let error = text.parse::<Location>().unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("alpine"), "{error}");
        }
        for text in ["oci:", "oci::", "oci::tag"] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_means_the_same(text in "(oci:|docker-archive:|)[a-z0-9./:@-]{1,30}") {
            if let Ok(location) = text.parse::<Location>() {
                prop_assert_eq!(location.to_string().parse::<Location>().unwrap(), location);
            }
        }
    }
}
