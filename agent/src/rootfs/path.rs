//! Opening and making paths inside a container's root, whatever links the
//! container's image or volumes hold.
//!
//! The path is walked one component at a time with `O_NOFOLLOW`, links are
//! read and walked likewise, and `..` goes back to the directory that the walk
//! came through. So nothing outside the root is ever reached, even while
//! another container moves directories about.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat},
};

/// What to make where the path ends and nothing is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Nothing: it is an error.
    Fail,
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// Links followed in one walk, as the kernel's limit.
const MAX_LINKS: usize = 40;

/// Opens `path` inside `root` with `O_PATH`; absent directories on the way are made unless
/// `missing` is [`Missing::Fail`].
pub(crate) fn open(root: BorrowedFd<'_>, path: &Path, missing: Missing) -> io::Result<OwnedFd> {
    let mut walk = Walk {
        root,
        through: Vec::new(),
        ahead: components(path.as_os_str()).collect(),
        links: 0,
    };
    while let Some(name) = walk.ahead.pop_front() {
        walk.step(&name, missing)?;
    }
    match walk.through.pop() {
        Some(fd) => Ok(fd),
        None => root.try_clone_to_owned(),
    }
}

/// Opens the directory that `path` is in, made if absent, and says the path's last name.
pub(crate) fn open_parent(root: BorrowedFd<'_>, path: &Path) -> io::Result<(OwnedFd, OsString)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    Ok((open(root, parent, Missing::Directory)?, name.to_owned()))
}

/// The kind of file that `fd` is.
pub(crate) fn kind(fd: BorrowedFd<'_>) -> io::Result<SFlag> {
    Ok(kind_of(&fstat(fd)?))
}

struct Walk<'a> {
    root: BorrowedFd<'a>,
    through: Vec<OwnedFd>,
    ahead: VecDeque<OsString>,
    links: usize,
}

impl Walk<'_> {
    fn step(&mut self, name: &OsStr, missing: Missing) -> io::Result<()> {
        if name == ".." {
            self.through.pop();
            return Ok(());
        }
        let here = self.through.last().map_or(self.root, AsFd::as_fd);
        let opened = match enter(here, name) {
            Err(Errno::ENOENT) => {
                make(here, name, self.ahead.is_empty(), missing)?;
                enter(here, name)?
            }
            other => other?,
        };
        if kind(opened.as_fd())? != SFlag::S_IFLNK {
            self.through.push(opened);
            return Ok(());
        }
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Errno::ELOOP.into());
        }
        let target = readlinkat(&opened, "")?;
        if target.as_bytes().starts_with(b"/") {
            self.through.clear();
        }
        for part in components(&target).rev() {
            self.ahead.push_front(part);
        }
        Ok(())
    }
}

fn enter(directory: BorrowedFd<'_>, name: &OsStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(directory, name, flags, Mode::empty())
}

fn make(directory: BorrowedFd<'_>, name: &OsStr, last: bool, missing: Missing) -> nix::Result<()> {
    match missing {
        Missing::Fail => Err(Errno::ENOENT),
        Missing::File if last => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
            openat(directory, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
        }
        _ => mkdirat(directory, name, Mode::from_bits_truncate(0o755)),
    }
}

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// The components of `path` but for `.` and empty ones.
fn components(path: &OsStr) -> impl DoubleEndedIterator<Item = OsString> + use<> {
    path.as_bytes()
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(|part| OsStr::from_bytes(part).to_owned())
        .collect::<Vec<_>>()
        .into_iter()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use proptest::prelude::*;

    use super::*;

    struct Root {
        outside: tempfile::TempDir,
        fd: OwnedFd,
    }

    /// A root directory with a file beside it that no walk may reach.
    fn root() -> Root {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "s").unwrap();
        fs::create_dir_all(outside.path().join("root/dir/sub")).unwrap();
        fs::write(outside.path().join("root/dir/file"), "f").unwrap();
        let fd = fs::File::open(outside.path().join("root")).unwrap().into();
        Root { outside, fd }
    }

    impl Root {
        fn link(&self, target: &str, name: &str) {
            symlink(target, self.outside.path().join("root").join(name)).unwrap();
        }

        fn open(&self, path: &str, missing: Missing) -> io::Result<std::path::PathBuf> {
            let fd = open(self.fd.as_fd(), Path::new(path), missing)?;
            use std::os::fd::AsRawFd;
            fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        }

        fn path(&self, path: &str) -> std::path::PathBuf {
            self.outside
                .path()
                .canonicalize()
                .unwrap()
                .join("root")
                .join(path)
        }
    }

    #[test]
    fn a_plain_path_is_opened() {
        let root = root();
        assert_eq!(
            root.open("/dir/./file", Missing::Fail).unwrap(),
            root.path("dir/file")
        );
    }

    #[test]
    fn dots_do_not_lead_out_of_the_root() {
        let root = root();
        assert!(root.open("/../../secret", Missing::Fail).is_err());
        assert_eq!(
            root.open("/dir/../../../dir", Missing::Fail).unwrap(),
            root.path("dir")
        );
    }

    #[test]
    fn links_do_not_lead_out_of_the_root() {
        let root = root();
        root.link("../../secret", "up");
        root.link("/dir/file", "absolute");
        assert!(root.open("/up", Missing::Fail).is_err());
        assert_eq!(
            root.open("/absolute", Missing::Fail).unwrap(),
            root.path("dir/file")
        );
    }

    #[test]
    fn what_a_dangling_link_names_is_made_inside_the_root() {
        let root = root();
        root.link("../run/systemd/resolve/stub.conf", "dir/resolv.conf");
        let made = root.open("/dir/resolv.conf", Missing::File).unwrap();
        assert_eq!(made, root.path("run/systemd/resolve/stub.conf"));
        assert!(made.is_file());
    }

    #[test]
    fn links_that_go_round_are_an_error() {
        let root = root();
        root.link("b", "a");
        root.link("a", "b");
        assert_eq!(
            root.open("/a", Missing::Directory)
                .unwrap_err()
                .raw_os_error(),
            Some(libc::ELOOP)
        );
    }

    #[test]
    fn a_file_on_the_way_is_an_error() {
        let root = root();
        assert!(root.open("/dir/file/below", Missing::Directory).is_err());
    }

    proptest! {
        #[test]
        fn no_path_leads_out_of_the_root(
            path in "(/|\\.|\\.\\.|dir|sub|file|x|up|down|/)(/(\\.\\.|dir|sub|x|up|down|secret)){0,6}",
            up in "(\\.\\./){0,4}(dir|secret)?",
        ) {
            let root = root();
            root.link(if up.is_empty() { "." } else { &up }, "up");
            root.link("/up/..", "dir/down");
            for missing in [Missing::Fail, Missing::Directory] {
                if let Ok(found) = root.open(&path, missing) {
                    prop_assert!(found.starts_with(root.path("").parent().unwrap().join("root")));
                }
            }
        }
    }
}
