//! A layer of a container image, applied to a [`FileSystem`].
//!
//! A layer is a tar archive. A member adds or replaces what its path names; one called
//! `.wh.NAME` hides what lower layers have at NAME, one called `.wh..wh..opq` all that they have
//! in its directory. Nothing is unpacked onto this host: paths mean something within the image
//! alone, so there is nothing for a hostile one to reach. Those that try are refused all the same.

use std::collections::BTreeMap;
use std::io::{self, Read};

mod budget;
mod compression;
pub mod tar;
#[cfg(test)]
pub(crate) mod testing;

pub use budget::{Budget, Exceeded, Limits};
pub use compression::{Bounded, TooMuch, unpacked};

use self::tar::{Archive, Member};
use crate::filesystem::{
    Attributes, Entry, FileSystem, Inode, InodeId, Kind, NAME_MAX, Spool, TARGET_MAX,
};

/// As many symbolic links are followed on the way to one member.
const LINKS_MAX: usize = 40;

/// What an inode costs in memory besides its names and attributes.
const INODE_BYTES: usize = 160;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What begins so is the bookkeeping of an old file system and no part of the image.
const BOOKKEEPING: &[u8] = b".wh..wh.";

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive.
    #[error(transparent)]
    Archive(#[from] tar::Error),
    /// One of its members.
    #[error("the entry {path:?}")]
    Entry {
        /// Its path as the archive has it.
        path: String,
        /// What is wrong with it.
        source: EntryError,
    },
}

/// What is wrong with a member.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// A path with `..` in it.
    #[error("leads out of the image by \"..\"")]
    DotDot,
    /// A path through a symbolic link that may lead anywhere.
    #[error("leads through the symbolic link {link:?} to {target:?}, out of the image")]
    LeadsOut {
        /// The link's name.
        link: String,
        /// Its target.
        target: String,
    },
    /// Symbolic links that lead to each other.
    #[error("leads through more than {LINKS_MAX} symbolic links")]
    TooManyLinks,
    /// A path through something that is no directory.
    #[error("lies in {name:?}, which is not a directory")]
    NotADirectory {
        /// What it leads through.
        name: String,
    },
    /// A name that no directory can hold.
    #[error("has a name that is too long or has a zero in it")]
    Name,
    /// The root, as something else.
    #[error("would make the image's root something else than a directory")]
    Root,
    /// Two members of one path.
    #[error("is there twice")]
    Duplicate,
    /// A whiteout of something that can have no name.
    #[error("is a whiteout of nothing that has a name")]
    Whiteout,
    /// A hard link to nothing.
    #[error("is a hard link to {target:?}, which is not there or is a directory")]
    HardLink {
        /// The path of its target.
        target: String,
    },
    /// A symbolic link whose target cannot be.
    #[error("is a symbolic link with a target of {length} bytes, or one with a zero in it")]
    Target {
        /// The target's length.
        length: usize,
    },
    /// A device that there is not.
    #[error(
        "is the device {major}:{minor}; majors up to 4095 and minors up to 1048575 are possible, \
         but for 0:0"
    )]
    Device {
        /// Its major number.
        major: u64,
        /// Its minor number.
        minor: u64,
    },
    /// An owner that there is not.
    #[error("belongs to {0}; ids up to 4294967294 are possible")]
    Owner(u64),
    /// An extended attribute that no file system keeps.
    #[error("has an extended attribute {name:?} of {length} bytes; 65535 are possible")]
    Xattr {
        /// Its name.
        name: String,
        /// The length of its value.
        length: usize,
    },
    /// Too much of something.
    #[error(transparent)]
    Exceeded(#[from] Exceeded),
    /// Its content.
    #[error("cannot be unpacked")]
    Content(#[source] io::Error),
}

/// Applies the archive in `input` as layer number `layer` and reads it to the end.
///
/// # Errors
///
/// See [`Error`]; `filesystem` is then of no further use.
pub fn apply(
    filesystem: &mut FileSystem,
    spool: &mut Spool,
    budget: &mut Budget,
    input: impl Read,
    layer: u32,
) -> Result<(), Error> {
    let mut archive = Archive::new(input);
    let mut change = Change {
        filesystem,
        budget,
        layer,
    };
    while let Some(member) = archive.next_member()? {
        let path = member.path.clone();
        change
            .member(&path, member, &mut archive, spool)
            .map_err(|source| Error::Entry {
                path: printable(&path),
                source,
            })?;
    }
    Ok(archive.finish()?)
}

/// One layer on its way into the file system.
struct Change<'a> {
    filesystem: &'a mut FileSystem,
    budget: &'a mut Budget,
    layer: u32,
}

/// A directory that was found, with those it is in, the root first.
type Trail = Vec<InodeId>;

/// Whether directories that are not there are made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Fail,
}

impl Change<'_> {
    fn member(
        &mut self,
        path: &[u8],
        member: Member,
        archive: &mut Archive<impl Read>,
        spool: &mut Spool,
    ) -> Result<(), EntryError> {
        self.budget.entry()?;
        let parts = components(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return self.root(member);
        };
        if parts.iter().any(|part| part.starts_with(BOOKKEEPING)) && *name != OPAQUE {
            return Ok(());
        }
        if parents.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err(EntryError::Whiteout);
        }
        if name.starts_with(WHITEOUT) {
            let Some(directory) = self.directory(parents, Missing::Fail)? else {
                // Nothing there that could be hidden.
                return Ok(());
            };
            return self.whiteout(directory, name);
        }
        let Some(directory) = self.directory(parents, Missing::Make)? else {
            return Err(EntryError::Root);
        };
        let entry = self.filesystem.lookup(directory, name);
        let is_directory = |entry: &Entry| self.filesystem.inode(entry.inode).is_directory();
        if let Some(entry) = entry.filter(is_directory)
            && member.kind == tar::Kind::Directory
        {
            // What is in it stays, it alone is changed.
            let attributes = self.attributes(member)?;
            self.filesystem.inode_mut(entry.inode).attributes = attributes;
            self.link(directory, name, entry.inode);
            return Ok(());
        }
        if entry.is_some_and(|entry| entry.layer == self.layer) {
            return Err(EntryError::Duplicate);
        }
        let inode = match &member.kind {
            tar::Kind::HardLink(target) => self.hard_link(target)?,
            _ => self.new_inode(member, archive, spool)?,
        };
        self.budget.metadata(name.len() + INODE_BYTES)?;
        self.link(directory, name, inode);
        Ok(())
    }

    /// A member that is the root itself.
    fn root(&mut self, member: Member) -> Result<(), EntryError> {
        if member.kind != tar::Kind::Directory {
            return Err(EntryError::Root);
        }
        let attributes = self.attributes(member)?;
        self.filesystem.inode_mut(FileSystem::ROOT).attributes = attributes;
        Ok(())
    }

    fn new_inode(
        &mut self,
        member: Member,
        archive: &mut Archive<impl Read>,
        spool: &mut Spool,
    ) -> Result<InodeId, EntryError> {
        let kind = match &member.kind {
            tar::Kind::Directory => Kind::Directory(BTreeMap::new()),
            tar::Kind::Fifo => Kind::Fifo,
            tar::Kind::Symlink(target) => {
                let length = target.len();
                if !(1..=TARGET_MAX).contains(&length) || target.contains(&0) {
                    return Err(EntryError::Target { length });
                }
                self.budget.metadata(length)?;
                Kind::Symlink(target.clone())
            }
            tar::Kind::Device {
                block,
                major,
                minor,
            } => device(*block, *major, *minor)?,
            tar::Kind::File(size) => {
                // What is declared must be allowed before any of it is unpacked.
                self.budget.allow_unpacked(*size)?;
                let extent = spool.append(archive.content());
                Kind::File(extent.map_err(EntryError::Content)?)
            }
            tar::Kind::HardLink(target) => {
                let target = printable(target);
                return Err(EntryError::HardLink { target });
            }
        };
        let attributes = self.attributes(member)?;
        Ok(self.filesystem.add(Inode { attributes, kind }))
    }

    fn attributes(&mut self, member: Member) -> Result<Attributes, EntryError> {
        let id = |id: u64| match u32::try_from(id) {
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(EntryError::Owner(id)),
        };
        let mut xattrs = member.xattrs;
        xattrs.retain(|name, _| is_kept(name));
        for (name, value) in &xattrs {
            self.budget.metadata(name.len() + value.len())?;
            if name.len() > NAME_MAX || u16::try_from(value.len()).is_err() {
                return Err(EntryError::Xattr {
                    name: printable(name),
                    length: value.len(),
                });
            }
        }
        Ok(Attributes {
            mode: member.mode,
            uid: id(member.uid)?,
            gid: id(member.gid)?,
            mtime: member.mtime,
            xattrs,
        })
    }

    fn hard_link(&mut self, target: &[u8]) -> Result<InodeId, EntryError> {
        let refused = || EntryError::HardLink {
            target: printable(target),
        };
        let parts = components(target)?;
        let (name, parents) = parts.split_last().ok_or_else(refused)?;
        let directory = self.directory(parents, Missing::Fail)?;
        let found = directory.and_then(|directory| self.filesystem.lookup(directory, name));
        match found {
            Some(entry) if !self.filesystem.inode(entry.inode).is_directory() => Ok(entry.inode),
            _ => Err(refused()),
        }
    }

    /// Hides what lower layers have.
    fn whiteout(&mut self, directory: InodeId, name: &[u8]) -> Result<(), EntryError> {
        if name == OPAQUE {
            return self.hide_within(directory);
        }
        let victim = &name[WHITEOUT.len()..];
        if matches!(victim, b"" | b"." | b"..") {
            return Err(EntryError::Whiteout);
        }
        let Some(entry) = self.filesystem.lookup(directory, victim) else {
            return Ok(());
        };
        self.hide_within(entry.inode)?;
        if entry.layer != self.layer && self.is_empty(entry.inode) {
            self.filesystem.unlink(directory, victim);
        }
        Ok(())
    }

    /// Takes out of a directory what lower layers have put there, at any depth.
    fn hide_within(&mut self, top: InodeId) -> Result<(), EntryError> {
        // Directories first, each before what is in it; then from behind, so that one that has
        // become empty goes too.
        let mut directories = vec![top];
        let mut next = 0;
        while let Some(directory) = directories.get(next).copied() {
            next += 1;
            for entry in self.filesystem.names(directory).into_iter().flatten() {
                self.budget.step()?;
                if self.filesystem.inode(entry.1.inode).is_directory() {
                    directories.push(entry.1.inode);
                }
            }
        }
        for directory in directories.into_iter().rev() {
            let names = self.filesystem.names(directory).into_iter().flatten();
            let gone: Vec<Vec<u8>> = names
                .filter(|(_, entry)| entry.layer != self.layer && self.is_empty(entry.inode))
                .map(|(name, _)| name.clone())
                .collect();
            for name in gone {
                self.filesystem.unlink(directory, &name);
            }
        }
        Ok(())
    }

    /// Whether an inode is no directory or one without names.
    fn is_empty(&self, inode: InodeId) -> bool {
        self.filesystem.names(inode).is_none_or(BTreeMap::is_empty)
    }

    /// The directory of a path. Symbolic links on the way are followed within the image.
    fn directory(
        &mut self,
        parts: &[&[u8]],
        missing: Missing,
    ) -> Result<Option<InodeId>, EntryError> {
        let mut trail: Trail = vec![FileSystem::ROOT];
        let mut left: Vec<Vec<u8>> = parts.iter().rev().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(name) = left.pop() {
            self.budget.step()?;
            if name == b".." {
                // Of a link's target; links on its way may lie less deep than they look.
                trail.pop();
                if trail.is_empty() {
                    return Err(EntryError::DotDot);
                }
                continue;
            }
            let here = *trail.last().unwrap_or(&FileSystem::ROOT);
            let Some(entry) = self.filesystem.lookup(here, &name) else {
                if missing == Missing::Fail {
                    return Ok(None);
                }
                trail.push(self.make_directory(here, &name)?);
                continue;
            };
            match &self.filesystem.inode(entry.inode).kind {
                Kind::Directory(_) => trail.push(entry.inode),
                Kind::Symlink(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(EntryError::TooManyLinks);
                    }
                    if leads_out(target, trail.len() - 1) {
                        return Err(EntryError::LeadsOut {
                            link: printable(&name),
                            target: printable(target),
                        });
                    }
                    let parts = target.split(|byte| *byte == b'/').rev();
                    let parts = parts.filter(|part| !part.is_empty() && *part != b".");
                    left.extend(parts.map(<[u8]>::to_owned));
                }
                _ if missing == Missing::Fail => return Ok(None),
                _ => {
                    let name = printable(&name);
                    return Err(EntryError::NotADirectory { name });
                }
            }
        }
        Ok(trail.pop())
    }

    /// A directory that no layer describes, as others make it too.
    fn make_directory(&mut self, parent: InodeId, name: &[u8]) -> Result<InodeId, EntryError> {
        self.budget.entry()?;
        self.budget.metadata(name.len() + INODE_BYTES)?;
        let inode = self.filesystem.add(Inode::directory(0o755));
        self.link(parent, name, inode);
        Ok(inode)
    }

    fn link(&mut self, directory: InodeId, name: &[u8], inode: InodeId) {
        let layer = self.layer;
        self.filesystem
            .link(directory, name, Entry { inode, layer });
    }
}

fn device(block: bool, major: u64, minor: u64) -> Result<Kind, EntryError> {
    let refused = EntryError::Device { major, minor };
    match (u32::try_from(major), u32::try_from(minor)) {
        // An overlay takes 0:0 for the mark of something that is gone.
        (Ok(0), Ok(0)) => Err(refused),
        (Ok(major @ ..4096), Ok(minor @ ..0x10_0000)) => Ok(Kind::Device {
            block,
            major,
            minor,
        }),
        _ => Err(refused),
    }
}

/// Whether a link's target leads out of the image from a directory `depth` below its root.
fn leads_out(target: &[u8], mut depth: usize) -> bool {
    if target.starts_with(b"/") {
        return true;
    }
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if depth == 0 => return true,
            b".." => depth -= 1,
            _ => depth += 1,
        }
    }
    false
}

/// Whether an extended attribute is of the image. Those of other systems are of namespaces that
/// Linux does not have, and those of overlayfs would say something about the container's own
/// overlay.
fn is_kept(name: &[u8]) -> bool {
    let namespaces: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    let known = namespaces
        .iter()
        .any(|prefix| name.len() > prefix.len() && name.starts_with(prefix))
        || matches!(
            name,
            b"system.posix_acl_access" | b"system.posix_acl_default"
        );
    known && !name.starts_with(b"trusted.overlay.") && !name.starts_with(b"user.overlay.")
}

/// The parts of a member's path, which is taken from the image's root.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, EntryError> {
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(EntryError::DotDot),
            part if part.len() > NAME_MAX || part.contains(&0) => return Err(EntryError::Name),
            part => parts.push(part),
        }
    }
    Ok(parts)
}

/// A path as it is shown in an error.
fn printable(path: &[u8]) -> String {
    const SHOWN: usize = 300;
    let text = String::from_utf8_lossy(&path[..path.len().min(SHOWN)]);
    match path.len() > SHOWN {
        true => format!("{text}..."),
        false => text.into_owned(),
    }
}

#[cfg(test)]
mod tests;
