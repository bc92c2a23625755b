//! The guest kernel's log: a ring in shared memory that outlives the guest.
//!
//! The guest's ramoops driver writes it without exits. Its layout, little
//! endian:
//!
//! ```text
//!   0   u32  mark "DBGC"
//!   4   u32  where the next byte goes
//!   8   u32  bytes that are valid
//!   12  ...  the ring
//! ```
//!
//! Every byte of it is the guest's: nothing here trusts one.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
    unistd::ftruncate,
};

use crate::text::printable;

/// The ring's size: a power of two, as the driver wants it.
pub const SIZE: usize = 64 * 1024;

const MARK: u32 = 0x4347_4244;
const HEADER: usize = 12;
/// The lines that are searched for the reason of an end.
const LOOKED_AT: usize = 100;
/// How the kernel begins to tell of its own end.
const PANIC: &str = "Kernel panic";
/// The longest line that is shown.
const LINE_MAX: usize = 200;

/// The ring, kept by the host.
#[derive(Debug)]
pub struct Console(std::fs::File);

impl Console {
    /// An empty ring whose size nobody can change.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new() -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let ring = memfd_create(c"console", flags)?;
        ftruncate(&ring, SIZE as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&ring, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(Self(ring.into()))
    }

    /// The ring for the VMM.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn for_vmm(&self) -> io::Result<OwnedFd> {
        self.0.as_fd().try_clone_to_owned()
    }

    /// The last lines that the guest's kernel or agent wrote, oldest first.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let mut memory = vec![0; SIZE];
        match self.0.read_exact_at(&mut memory, 0) {
            Ok(()) => last_lines(&memory, count),
            Err(_) => Vec::new(),
        }
    }
}

/// The last `count` lines of the ring in `memory`: printable, each bounded.
pub fn last_lines(memory: &[u8], count: usize) -> Vec<String> {
    let log = contents(memory);
    let text = String::from_utf8_lossy(&log);
    let mut lines: Vec<&str> = text
        .rsplit('\n')
        .map(|line| line.trim_end_matches(['\r', '\0']))
        .filter(|line| !line.is_empty())
        .take(LOOKED_AT)
        .collect();
    lines.reverse();
    // A kernel that panics prints its stack last; the reason is above it.
    let last = lines.len().saturating_sub(count);
    let panic = lines.iter().position(|line| line.contains(PANIC));
    let first = panic.map_or(last, |at| at.saturating_sub(count / 2).min(last));
    let shown = lines[first..].iter().take(count);
    shown.map(|line| printable(line, LINE_MAX)).collect()
}

/// The bytes of the ring, oldest first; nothing where `memory` is no ring.
fn contents(memory: &[u8]) -> Vec<u8> {
    let field = |at: usize| {
        let bytes = memory.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let (Some(MARK), Some(start), Some(size)) = (field(0), field(4), field(8)) else {
        return Vec::new();
    };
    let ring = &memory[HEADER..];
    let (start, size) = (start as usize, size as usize);
    if size > ring.len() || start > size {
        return Vec::new();
    }
    // Until it is full the next byte goes behind the last; then `start` is the oldest.
    let (newer, older) = ring[..size].split_at(start);
    [older, newer].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ring(start: u32, size: u32, data: &[u8]) -> Vec<u8> {
        let header = [MARK, start, size].map(u32::to_le_bytes).concat();
        [&header, data].concat()
    }

    #[test]
    fn a_ring_that_never_was_full_is_read_from_its_begin() {
        let memory = ring(10, 10, b"one\ntwo\n\r\n\0\0\0\0\0");
        assert_eq!(last_lines(&memory, 8), ["one", "two"]);
    }

    #[test]
    fn a_full_ring_is_read_from_the_oldest_byte() {
        let memory = ring(4, 8, b"two\none\n");
        assert_eq!(last_lines(&memory, 8), ["one", "two"]);
    }

    #[test]
    fn only_the_last_lines_are_kept() {
        let memory = ring(12, 12, b"one\ntwo\nthr\n");
        assert_eq!(last_lines(&memory, 2), ["two", "thr"]);
    }

    #[test]
    fn a_panics_reason_is_shown_rather_than_the_end_of_its_stack() {
        let log = "a\nb\nc\nKernel panic - x\n1\n2\n3\n4\n5\n6\n";
        let memory = ring(log.len() as u32, log.len() as u32, log.as_bytes());
        assert_eq!(last_lines(&memory, 4), ["b", "c", "Kernel panic - x", "1"]);
    }

    #[test]
    fn terminal_sequences_of_a_guest_are_shown_and_not_obeyed() {
        let memory = ring(5, 5, b"\x1b[2J\n");
        assert_eq!(last_lines(&memory, 8), ["\\u{1b}[2J"]);
    }

    #[test]
    fn memory_that_is_no_ring_has_no_lines() {
        assert!(last_lines(&[0; 64], 8).is_empty());
        assert!(last_lines(b"DB", 8).is_empty());
        assert!(last_lines(&ring(9, 4, b"1234"), 8).is_empty());
        assert!(last_lines(&ring(0, 5, b"1234"), 8).is_empty());
    }

    #[test]
    fn a_new_console_is_empty_and_of_a_fixed_size() {
        let console = Console::new().expect("made");
        assert!(console.last_lines(3).is_empty());
        assert!(ftruncate(console.for_vmm().expect("cloned"), 0).is_err());
    }

    proptest! {
        #[test]
        fn any_memory_gives_few_bounded_printable_lines(
            start in any::<u32>(),
            size in any::<u32>(),
            small in any::<bool>(),
            data in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let (start, size) = if small { (start % 2100, size % 2100) } else { (start, size) };
            let lines = last_lines(&ring(start, size, &data), 10);
            prop_assert!(lines.len() <= 10);
            for line in lines {
                prop_assert!(line.len() <= LINE_MAX + 16);
                prop_assert!(!line.chars().any(char::is_control));
            }
        }
    }
}
