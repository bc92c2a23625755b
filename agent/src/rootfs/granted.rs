//! What the agent takes out of the guest's file tree for a container that
//! could not: root of a user namespace may mount little and open less, and ids
//! are mapped by who is root of the guest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::{
    mount::{MntFlags, umount2},
    sched::CloneFlags,
};

use super::{
    Error, Scratch, Source, block, directory, doing, mounts,
    options::{IdMap, Options},
};
use crate::{
    mappings::Mappings,
    spec::{self, Spec},
    sys,
};

/// Detached mounts for a container.
#[derive(Debug, Default)]
pub(crate) struct Granted {
    root: Option<OwnedFd>,
    /// By their places in the configuration's `mounts`.
    mounts: Vec<(usize, OwnedFd)>,
}

/// The same in the container's process, where the descriptors have other numbers.
#[derive(Debug, Default)]
pub(crate) struct Given {
    /// The root.
    pub(super) root: Option<BorrowedFd<'static>>,
    mounts: Vec<(usize, BorrowedFd<'static>)>,
}

/// A user namespace that a container has for itself.
pub(crate) struct Users<'a> {
    /// Its ids.
    pub(crate) ids: &'a Mappings,
    /// The kinds of namespaces that the container shares with the guest.
    pub(crate) shared: CloneFlags,
}

impl Granted {
    /// Takes what the container of `spec` cannot mount itself.
    pub(crate) fn take(
        spec: &Spec,
        source: &Source,
        scratch: &Scratch,
        users: Option<&Users<'_>>,
    ) -> Result<Self, Error> {
        let mut granted = Self::default();
        for (place, mount) in spec.mounts.iter().enumerate() {
            if let Some(tree) = one(mount, users)? {
                granted.mounts.push((place, tree));
            }
        }
        if let Some(users) = users {
            granted.root = Some(root(source, scratch, users.ids)?);
        }
        Ok(granted)
    }

    /// The descriptors, in the order of [`Self::given`].
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let mounts = self.mounts.iter().map(|(_, tree)| tree.as_fd());
        self.root.iter().map(AsFd::as_fd).chain(mounts)
    }

    /// The same where the descriptors have the numbers from `first` on.
    pub(crate) fn given(&self, first: i32) -> Given {
        let mut numbers = (first..).map(sys::arranged);
        Given {
            root: self.root.as_ref().and_then(|_| numbers.next()),
            mounts: self
                .mounts
                .iter()
                .map(|(place, _)| *place)
                .zip(numbers)
                .collect(),
        }
    }
}

impl Given {
    /// The mount for the place `place` in the configuration.
    pub(super) fn mount(&self, place: usize) -> Option<BorrowedFd<'static>> {
        self.mounts
            .iter()
            .find(|(known, _)| *known == place)
            .map(|(_, tree)| *tree)
    }
}

fn one(mount: &spec::Mount, users: Option<&Users<'_>>) -> Result<Option<OwnedFd>, Error> {
    let options = mounts::options(mount)?;
    let mapped = !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty();
    if mounts::is_bind(mount, &options) && !options.remount {
        let id_map = options.id_map.or(mapped.then_some(IdMap::One));
        return match (id_map, users) {
            (None, None) => Ok(None),
            (None, Some(_)) => bind(mount, &options).map(Some),
            (Some(id_map), users) => {
                let tree = bind(mount, &options)?;
                let ids = ids_of(mount, users)?;
                map(&tree, id_map == IdMap::All, &ids)
                    .map_err(doing(format!("map the ids of {}", mount.destination)))?;
                Ok(Some(tree))
            }
        };
    }
    if mapped || options.id_map.is_some() {
        return Err(Error::Option {
            option: "idmap".into(),
            destination: mount.destination.clone(),
        });
    }
    let kind = mount.kind.as_deref().unwrap_or_default();
    // A file system that shows a namespace which is not the container's own.
    let of_guest = users.is_some_and(|users| match kind {
        "sysfs" => users.shared.contains(CloneFlags::CLONE_NEWNET),
        "mqueue" => users.shared.contains(CloneFlags::CLONE_NEWIPC),
        _ => false,
    });
    if !of_guest {
        return Ok(None);
    }
    mounts::filesystem(kind, &[("source", Some(kind))], options.attr.set)
        .map(Some)
        .map_err(|(source, hint)| Error::Mount {
            what: kind.to_owned(),
            destination: mount.destination.clone(),
            hint,
            source,
        })
}

fn bind(mount: &spec::Mount, options: &Options) -> Result<OwnedFd, Error> {
    let source = mount.source.as_deref().unwrap_or_default();
    mounts::bind(source, options).map_err(|error| Error::Mount {
        what: source.to_owned(),
        destination: mount.destination.clone(),
        hint: String::new(),
        source: error,
    })
}

/// The ids that `mount` is mapped by: its own, or those of the container.
fn ids_of(mount: &spec::Mount, users: Option<&Users<'_>>) -> Result<Mappings, Error> {
    let own = || Mappings::new(&mount.uid_mappings, &mount.gid_mappings);
    let given = !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty();
    let ids = match users {
        Some(users) if !given => Some(users.ids.clone()),
        _ => own(),
    };
    ids.ok_or_else(|| Error::Value {
        field: "mounts.uidMappings",
        value: mount.destination.clone(),
        reason: "an id-mapped mount needs mounts.uidMappings and mounts.gidMappings, of at most 340 lines each, or a container with a user namespace",
    })
}

fn map(tree: &OwnedFd, recursive: bool, ids: &Mappings) -> std::io::Result<()> {
    let namespace = ids.namespace()?;
    sys::id_map(tree.as_fd(), recursive, namespace.as_fd())
}

/// The root of a container with its own users. On devices there are an image's owners, whose ids
/// become the container's; a directory has the owners that the host gave it.
fn root(source: &Source, scratch: &Scratch, ids: &Mappings) -> Result<OwnedFd, Error> {
    match source {
        Source::Directory(path) => directory(path),
        Source::Block {
            device,
            filesystem,
            options,
        } => {
            let tree = block(device, filesystem, super::Writes::IfPossible, options)?;
            map(&tree, false, ids).map_err(doing("map the ids of the root"))?;
            Ok(tree)
        }
        Source::Layers(layers) => {
            let namespace = ids
                .namespace()
                .map_err(doing("make a user namespace for the root"))?;
            let tree = layers.mount(scratch, Some(namespace.as_fd()));
            // The overlay has the layers for itself; here nobody needs them any more.
            for place in [&scratch.lower, &scratch.upper] {
                let _ = umount2(place.as_str(), MntFlags::MNT_DETACH);
            }
            tree
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::options, *};

    #[test]
    fn ids_are_mapped_for_binds_with_ids_alone() {
        let mount = |json: &str| -> spec::Mount { serde_json::from_str(json).unwrap() };
        let tmpfs = mount(r#"{"destination":"/a","type":"tmpfs","options":["idmap"]}"#);
        assert!(
            matches!(one(&tmpfs, None), Err(Error::Option { option, .. }) if option == "idmap")
        );
        let nobody =
            mount(r#"{"destination":"/a","type":"bind","source":"/","options":["idmap"]}"#);
        let text = one(&nobody, None).unwrap_err().to_string();
        assert!(text.starts_with("mounts.uidMappings is \"/a\""), "{text}");
        let plain = mount(r#"{"destination":"/a","type":"bind","source":"/"}"#);
        assert!(one(&plain, None).unwrap().is_none());
        let options = options::parse(["bind"]).unwrap();
        assert!(mounts::is_bind(&plain, &options));
    }
}
