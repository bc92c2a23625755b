//! Copying a directory's contents, for `tmpcopyup`: what the container's image
//! holds is never followed out of the directory.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    dir::Dir,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{
        FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstat, fstatat, mkdirat,
        mknodat, utimensat,
    },
    sys::time::TimeSpec,
    unistd::{Gid, Uid, fchownat, symlinkat},
};

/// Directories within directories that are copied: more than any program makes, and no more than
/// there are descriptors for.
const DEEPEST: usize = 128;

/// Copies what the directory `from` holds to the directory `to`, with owners, modes and times,
/// and gives `to` those of `from`.
pub(super) fn contents(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let from = reopen(from)?;
    let to = reopen(to)?;
    entries(&from, &to, 0)?;
    let stat = fstat(&from)?;
    nix::unistd::fchown(
        &to,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )?;
    Ok(nix::sys::stat::fchmod(&to, mode(&stat))?)
}

fn reopen(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(openat(directory, ".", flags, Mode::empty())?)
}

fn entries(from: &OwnedFd, to: &OwnedFd, depth: usize) -> io::Result<()> {
    if depth > DEEPEST {
        return Err(nix::errno::Errno::ELOOP.into());
    }
    let mut directory = Dir::from_fd(from.try_clone()?)?;
    for found in directory.iter() {
        let name = found?.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            entry(from, to, &name, depth)?;
        }
    }
    Ok(())
}

fn entry(from: &OwnedFd, to: &OwnedFd, name: &std::ffi::CStr, depth: usize) -> io::Result<()> {
    let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    let private = Mode::from_bits_truncate(0o700);
    let below = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match kind {
        SFlag::S_IFDIR => {
            mkdirat(to, name, private)?;
            let directory = below | OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let inner = openat(from, name, directory, Mode::empty())?;
            let copy = openat(to, name, directory, Mode::empty())?;
            entries(&inner, &copy, depth + 1)?;
        }
        SFlag::S_IFREG => {
            let reading = below | OFlag::O_RDONLY | OFlag::O_NONBLOCK;
            let mut source = std::fs::File::from(openat(from, name, reading, Mode::empty())?);
            let writing = below | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
            let mut copy = std::fs::File::from(openat(to, name, writing, private)?);
            io::copy(&mut source, &mut copy)?;
        }
        SFlag::S_IFLNK => symlinkat(&*readlinkat(from, name)?, to, name)?,
        other => mknodat(to, name, other, private, stat.st_rdev)?,
    }
    like(to, name, &stat, kind)
}

/// Gives the copy owner, mode and time of what it was copied from.
fn like(to: &OwnedFd, name: &std::ffi::CStr, stat: &FileStat, kind: SFlag) -> io::Result<()> {
    fchownat(
        to,
        name,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    if kind != SFlag::S_IFLNK {
        // Nobody else has the new file system yet, so the name is still what was made.
        fchmodat(to, name, mode(stat), FchmodatFlags::FollowSymlink)?;
    }
    let accessed = TimeSpec::new(stat.st_atime, stat.st_atime_nsec);
    let modified = TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec);
    utimensat(
        to.as_fd(),
        name,
        &accessed,
        &modified,
        UtimensatFlags::NoFollowSymlink,
    )?;
    Ok(())
}

fn mode(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode & 0o7777)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    use super::*;

    fn open(path: &std::path::Path) -> OwnedFd {
        fs::File::open(path).unwrap().into()
    }

    #[test]
    fn files_directories_and_links_are_copied_as_they_are() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(from.path().join("a/b")).unwrap();
        fs::write(from.path().join("a/b/file"), "text").unwrap();
        let mode = fs::Permissions::from_mode(0o4750);
        fs::set_permissions(from.path().join("a/b/file"), mode).unwrap();
        symlink("/etc/passwd", from.path().join("a/link")).unwrap();
        contents(open(from.path()).as_fd(), open(to.path()).as_fd()).unwrap();
        let copy = to.path().join("a/b/file");
        assert_eq!(fs::read_to_string(&copy).unwrap(), "text");
        let (source, copy) = (from.path().join("a/b/file"), fs::metadata(copy).unwrap());
        assert_eq!(copy.permissions().mode() & 0o7777, 0o4750);
        let source = fs::metadata(source).unwrap();
        assert_eq!(copy.modified().unwrap(), source.modified().unwrap());
        let link = fs::read_link(to.path().join("a/link")).unwrap();
        assert_eq!(link, std::path::Path::new("/etc/passwd"));
    }

    #[test]
    fn the_copy_has_the_mode_of_the_directory() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::set_permissions(from.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        contents(open(from.path()).as_fd(), open(to.path()).as_fd()).unwrap();
        assert_eq!(
            fs::metadata(to.path()).unwrap().permissions().mode() & 0o7777,
            0o1777
        );
    }
}
