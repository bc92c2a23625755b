//! The files that the guest has open.

use std::{collections::HashSet, fs::File, io};

use super::{error, numbers::ByNumber};

/// An open file or directory.
pub(super) struct Handle {
    /// Whether every write goes to the end.
    pub(super) append: bool,
    /// Where a listing goes on without being told.
    pub(super) position: u64,
    /// `None` once its mount is gone.
    file: Option<File>,
    node: u64,
    mount: u64,
}

impl Handle {
    /// The file itself.
    ///
    /// # Errors
    /// `ESTALE` when its mount is gone.
    pub(super) fn file(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| error(libc::ESTALE))
    }
}

/// All open files, by number. Numbers are never used twice.
#[derive(Default)]
pub(super) struct Handles {
    by_number: ByNumber<Handle>,
    last: u64,
}

impl Handles {
    /// Keeps an open file of `node` and gives it a number.
    pub(super) fn insert(&mut self, node: u64, mount: u64, file: File, append: bool) -> u64 {
        self.last += 1;
        self.by_number.insert(
            self.last,
            Handle {
                append,
                position: 0,
                file: Some(file),
                node,
                mount,
            },
        );
        self.last
    }

    /// The open file of that number, if it is one of that node.
    pub(super) fn get(&self, number: u64, node: u64) -> io::Result<&Handle> {
        self.by_number
            .get(&number)
            .filter(|handle| handle.node == node)
            .ok_or_else(|| error(libc::EBADF))
    }

    /// As [`Handles::get`], to be changed.
    pub(super) fn get_mut(&mut self, number: u64, node: u64) -> io::Result<&mut Handle> {
        self.by_number
            .get_mut(&number)
            .filter(|handle| handle.node == node)
            .ok_or_else(|| error(libc::EBADF))
    }

    /// Closes an open file.
    pub(super) fn remove(&mut self, number: u64, node: u64) -> io::Result<()> {
        self.get(number, node)?;
        self.by_number.remove(&number);
        Ok(())
    }

    /// Closes what is open on mounts that are gone; the guest's numbers for it stay, and all
    /// that is asked of them fails.
    pub(super) fn close_mounts(&mut self, gone: &HashSet<u64>) {
        for handle in self.by_number.values_mut() {
            if gone.contains(&handle.mount) {
                handle.file = None;
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_number.len()
    }
}
