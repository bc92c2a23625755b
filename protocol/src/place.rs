//! Places of the guest that a container's configuration names for what it
//! shares with others: namespaces, memory.

use std::fmt;

/// The pod's /dev/shm: the `source` of a bind mount. It is made when the first container names it.
pub const POD_SHM: &str = "/run/bulkhead/pod/shm";

const POD: &str = "/run/bulkhead/pod/ns/";
const CONTAINERS: &str = "/run/bulkhead/containers/";

/// A namespace that a container joins. Its text is what stands in `linux.namespaces[].path` of
/// the configuration: a name that the agent knows, no file.
///
/// ```
/// use protocol::Namespace;
/// let shared = Namespace::Pod("ipc").to_string();
/// assert_eq!(Namespace::parse(&shared), Some(Namespace::Pod("ipc")));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace<'a> {
    /// The pod's, of the kinds `network`, `ipc`, `uts` and `pid`. The first three are the guest's
    /// own; the fourth has a first process of the agent's, which collects orphans.
    Pod(&'a str),
    /// That of another container's first process, or of what a placeholder stands for; of any
    /// kind but `mount`.
    Container {
        /// The container.
        id: &'a str,
        /// The kind, as `linux.namespaces[].type` has it.
        kind: &'a str,
    },
}

impl<'a> Namespace<'a> {
    /// Reads the text; nothing where it is another path.
    pub fn parse(path: &'a str) -> Option<Self> {
        if let Some(kind) = path.strip_prefix(POD) {
            return is_word(kind).then_some(Self::Pod(kind));
        }
        let (id, kind) = path.strip_prefix(CONTAINERS)?.split_once("/ns/")?;
        (is_word(id) && is_word(kind)).then_some(Self::Container { id, kind })
    }
}

impl fmt::Display for Namespace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(kind) => write!(f, "{POD}{kind}"),
            Self::Container { id, kind } => write!(f, "{CONTAINERS}{id}/ns/{kind}"),
        }
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.contains('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_survives_its_text() {
        for namespace in [
            Namespace::Pod("uts"),
            Namespace::Container {
                id: "web-0",
                kind: "pid",
            },
        ] {
            assert_eq!(Namespace::parse(&namespace.to_string()), Some(namespace));
        }
    }

    #[test]
    fn other_paths_are_none() {
        for path in [
            "/proc/1/ns/pid",
            "/run/bulkhead/pod/ns/",
            "/run/bulkhead/pod/ns/a/b",
            "/run/bulkhead/containers//ns/pid",
            "/run/bulkhead/containers/a/b/ns/pid",
        ] {
            assert_eq!(Namespace::parse(path), None, "{path}");
        }
    }
}
