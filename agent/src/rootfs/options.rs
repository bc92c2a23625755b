//! Mount options as fstab writes them, parsed.

use crate::sys::MountAttr;

const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
const NOATIME: u64 = libc::MOUNT_ATTR_NOATIME;
const STRICTATIME: u64 = libc::MOUNT_ATTR_STRICTATIME;
const RELATIME: u64 = libc::MOUNT_ATTR_RELATIME;
const NODIRATIME: u64 = libc::MOUNT_ATTR_NODIRATIME;
const NOSYMFOLLOW: u64 = libc::MOUNT_ATTR_NOSYMFOLLOW;

/// An option with a fixed meaning for the mount: name, attributes set, attributes cleared.
const ATTRIBUTES: &[(&str, u64, u64)] = &[
    ("ro", RDONLY, 0),
    ("rw", 0, RDONLY),
    ("nosuid", NOSUID, 0),
    ("suid", 0, NOSUID),
    ("nodev", NODEV, 0),
    ("dev", 0, NODEV),
    ("noexec", NOEXEC, 0),
    ("exec", 0, NOEXEC),
    ("nodiratime", NODIRATIME, 0),
    ("diratime", 0, NODIRATIME),
    // The kinds of access time exclude each other: the field is cleared, then one is set.
    ("relatime", RELATIME, ATIME),
    ("norelatime", STRICTATIME, ATIME),
    ("noatime", NOATIME, ATIME),
    ("atime", RELATIME, ATIME),
    ("strictatime", STRICTATIME, ATIME),
    ("nostrictatime", RELATIME, ATIME),
    ("nosymfollow", NOSYMFOLLOW, 0),
    ("symfollow", 0, NOSYMFOLLOW),
];

/// An option that sets how mounts below propagate: name, `MS_...`, whether to all below.
const PROPAGATION: &[(&str, u64, bool)] = &[
    ("private", libc::MS_PRIVATE, false),
    ("rprivate", libc::MS_PRIVATE, true),
    ("shared", libc::MS_SHARED, false),
    ("rshared", libc::MS_SHARED, true),
    ("slave", libc::MS_SLAVE, false),
    ("rslave", libc::MS_SLAVE, true),
    ("unbindable", libc::MS_UNBINDABLE, false),
    ("runbindable", libc::MS_UNBINDABLE, true),
];

/// Options that change nothing: what they ask for is so anyway, or they are of no effect in the
/// guest's kernel, whatever asks for them.
const NOTHING: &[&str] = &[
    "defaults",
    "nomand",
    "loud",
    "silent",
    "acl",
    "noacl",
    "iversion",
    "noiversion",
];

/// Options of a file system as a whole. A bind does not have one, so they do not count there.
const WHOLE: &[&str] = &["sync", "async", "dirsync", "lazytime", "nolazytime", "mand"];

/// What the options of one mount ask for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Attributes of the mount itself.
    pub(crate) attr: MountAttr,
    /// Attributes of the mount and all below it.
    pub(crate) recursive_attr: MountAttr,
    /// Whether a directory or file is mounted rather than a file system.
    pub(crate) bind: bool,
    /// Whether the bind has what is mounted below.
    pub(crate) recursive_bind: bool,
    /// `MS_...` and whether it goes to all below.
    pub(crate) propagation: Option<(u64, bool)>,
    /// Whether what is mounted there changes, rather than something new being mounted.
    pub(crate) remount: bool,
    /// Whether a tmpfs begins with what is there already.
    pub(crate) copy_up: bool,
    /// Whether ids are mapped.
    pub(crate) id_map: Option<IdMap>,
    /// What is left for the file system: keys, most with values.
    pub(crate) data: Vec<(String, Option<String>)>,
}

/// Which mounts of a bind have their ids mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IdMap {
    /// The one.
    One,
    /// And all below it.
    All,
}

/// Parses `options`; the error is the option that cannot be honoured.
pub(crate) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Options, &'a str> {
    let mut parsed = Options::default();
    for option in options {
        // Links in the place of a mount are a matter of other runtimes' own.
        if option == "copy-symlink" {
            return Err(option);
        }
        parsed.add(option);
    }
    Ok(parsed)
}

impl Options {
    fn add(&mut self, option: &str) {
        match option {
            "" => {}
            "bind" => self.bind = true,
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" => self.id_map = Some(IdMap::One),
            "ridmap" => self.id_map = Some(IdMap::All),
            "rbind" => {
                self.bind = true;
                self.recursive_bind = true;
            }
            _ => {
                if let Some((_, set, clear)) = ATTRIBUTES.iter().find(|(name, ..)| *name == option)
                {
                    change(&mut self.attr, *set, *clear);
                } else if let Some((_, set, clear)) = recursive(option) {
                    change(&mut self.recursive_attr, *set, *clear);
                } else if let Some((_, kind, all)) =
                    PROPAGATION.iter().find(|(name, ..)| *name == option)
                {
                    self.propagation = Some((*kind, *all));
                } else if !NOTHING.contains(&option) {
                    self.data.push(match option.split_once('=') {
                        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                        None => (option.to_owned(), None),
                    });
                }
            }
        }
    }
}

impl Options {
    /// The first option that a bind cannot have: one that is the file system's own.
    pub(crate) fn not_of_a_bind(&self) -> Option<&str> {
        self.data
            .iter()
            .map(|(key, _)| key.as_str())
            .find(|key| !WHOLE.contains(key))
    }
}

/// `rro` and the like: an attribute's name behind an `r`.
fn recursive(option: &str) -> Option<&'static (&'static str, u64, u64)> {
    let name = option.strip_prefix('r')?;
    ATTRIBUTES.iter().find(|(known, ..)| *known == name)
}

/// Adds one option to those before it; of two that contradict each other the last counts.
fn change(attr: &mut MountAttr, set: u64, clear: u64) {
    attr.set = attr.set & !clear | set;
    attr.clear = attr.clear & !set | clear;
    if clear & ATIME != 0 {
        attr.clear |= ATIME;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_and_data_are_told_apart() {
        let options = parse(["nosuid", "ro", "mode=755", "size=64k", "newinstance"]).unwrap();
        assert_eq!(options.attr.set, NOSUID | RDONLY);
        assert_eq!(
            options.data,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("64k".to_owned())),
                ("newinstance".to_owned(), None),
            ]
        );
    }

    #[test]
    fn of_two_that_contradict_the_last_counts() {
        let options = parse(["ro", "rw", "noexec", "exec", "noexec"]).unwrap();
        assert_eq!(options.attr.set, NOEXEC);
        assert_eq!(options.attr.clear, RDONLY);
    }

    #[test]
    fn the_kinds_of_access_time_clear_the_whole_field() {
        let options = parse(["noatime", "strictatime"]).unwrap();
        assert_eq!(options.attr.set, STRICTATIME);
        assert_eq!(options.attr.clear, ATIME);
    }

    #[test]
    fn a_recursive_bind_with_propagation_is_understood() {
        let options = parse(["rbind", "rslave", "rro"]).unwrap();
        assert!(options.bind && options.recursive_bind);
        assert_eq!(options.propagation, Some((libc::MS_SLAVE, true)));
        assert_eq!(options.recursive_attr.set, RDONLY);
        assert_eq!(options.attr, MountAttr::default());
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        assert_eq!(parse(["ro", "copy-symlink"]), Err("copy-symlink"));
    }

    #[test]
    fn every_option_of_other_runtimes_is_understood() {
        let options = parse(protocol::MOUNT_OPTIONS.iter().copied()).unwrap();
        let data: Vec<_> = options.data.iter().map(|(key, _)| key.as_str()).collect();
        assert!(data.iter().all(|key| WHOLE.contains(key)), "{data:?}");
        assert_eq!(options.not_of_a_bind(), None);
        assert!(options.remount && options.copy_up);
        assert_eq!(options.id_map, Some(IdMap::All));
    }

    #[test]
    fn clients_are_told_of_every_option() {
        let attributes = ATTRIBUTES.iter().map(|(name, ..)| *name);
        let propagation = PROPAGATION.iter().map(|(name, ..)| *name);
        let all = attributes.chain(propagation).chain(NOTHING.iter().copied());
        for name in all.chain(WHOLE.iter().copied()) {
            assert!(protocol::MOUNT_OPTIONS.contains(&name), "{name}");
        }
        assert!(protocol::MOUNT_OPTIONS.is_sorted());
    }

    #[test]
    fn a_bind_has_no_options_of_a_file_system() {
        let options = parse(["rbind", "sync", "size=1m"]).unwrap();
        assert_eq!(options.not_of_a_bind(), Some("size"));
    }

    proptest! {
        #[test]
        fn nothing_is_both_set_and_cleared_but_the_access_time(
            names in proptest::collection::vec(0..ATTRIBUTES.len(), 0..12)
        ) {
            let options = parse(names.iter().map(|n| ATTRIBUTES[*n].0)).unwrap();
            prop_assert_eq!(options.attr.set & options.attr.clear & !ATIME, 0);
        }

        #[test]
        fn any_text_is_parsed_or_refused(options in proptest::collection::vec(".*", 0..5)) {
            let _ = parse(options.iter().map(String::as_str));
        }
    }
}
