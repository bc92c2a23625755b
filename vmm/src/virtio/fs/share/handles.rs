//! The files that the guest has open.

use std::{collections::HashMap, fs::File, io};

use super::error;

/// An open file or directory.
pub(super) struct Handle {
    pub(super) file: File,
    /// Whether every write goes to the end.
    pub(super) append: bool,
    node: u64,
}

/// All open files, by number. Numbers are never used twice.
#[derive(Default)]
pub(super) struct Handles {
    by_number: HashMap<u64, Handle>,
    last: u64,
}

impl Handles {
    /// Keeps an open file and gives it a number.
    pub(super) fn insert(&mut self, node: u64, file: File, append: bool) -> u64 {
        self.last += 1;
        self.by_number
            .insert(self.last, Handle { file, append, node });
        self.last
    }

    /// The open file of that number, if it is one of that node.
    pub(super) fn get(&mut self, number: u64, node: u64) -> io::Result<&mut Handle> {
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

    pub(super) fn len(&self) -> usize {
        self.by_number.len()
    }
}
