//! The mounts below the shared directory, which come and go while the guest
//! runs.
//!
//! An open file keeps its mount, and what is mounted there, in use. So when
//! the host unmounts something, the descriptors of it must be closed soon. The
//! kernel tells of every change to a `mountinfo` that is open.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read, Seek},
    os::fd::{AsRawFd, RawFd},
};

/// The list is the host's, but nothing is read without a bound.
const MAX_BYTES: u64 = 16 << 20;

/// The mounts that the process sees.
pub(super) struct Mounts {
    list: File,
}

impl Mounts {
    /// Opens the list at `path`.
    pub(super) fn open(path: &str) -> io::Result<Self> {
        let list = File::open(path)?;
        Ok(Self { list })
    }

    /// The ids of all mounts, as statx has them.
    pub(super) fn ids(&mut self) -> io::Result<HashSet<u64>> {
        let mut text = String::new();
        self.list.rewind()?;
        (&self.list).take(MAX_BYTES).read_to_string(&mut text)?;
        Ok(parse(&text))
    }
}

impl AsRawFd for Mounts {
    /// Exceptional (`POLLPRI`) when mounts have come or gone.
    fn as_raw_fd(&self) -> RawFd {
        self.list.as_raw_fd()
    }
}

/// A line is `id parent major:minor ...`.
fn parse(text: &str) -> HashSet<u64> {
    let id = |line: &str| line.split(' ').next()?.parse().ok();
    text.lines().filter_map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::OwnFiles, *};

    #[test]
    fn the_first_number_of_a_line_is_the_mounts() {
        let text = "21 28 0:20 / /sys rw - sysfs sysfs rw\n303 21 0:6 / /a\\040b rw - tmpfs x rw\n";
        assert_eq!(parse(text), HashSet::from([21, 303]));
    }

    #[test]
    fn the_mount_of_an_open_file_is_among_them() {
        let file = File::open("/proc/self/status").unwrap();
        let mount = super::super::sys::attributes(&file).unwrap().stx_mnt_id;
        let mut mounts = Mounts::open(OwnFiles::IN_PROC.mounts).unwrap();
        assert!(mounts.ids().unwrap().contains(&mount));
        assert!(mounts.ids().unwrap().contains(&mount), "and read again");
    }
}
