//! Where the guest's output goes. It knows nothing of virtio.
//!
//! A reader that does not keep up must not stop the guest: Linux waits for its
//! console with interrupts off. So a bounded part is kept for the reader, what
//! goes beyond is lost, and the reader is told how much that was.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, RawFd},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::{VolatileMemoryError, WriteVolatile};

use crate::virtio::slices::Slices;

/// The most output that is kept for a slow reader.
pub const MAX_KEPT_BYTES: usize = 256 << 10;

/// The output's file.
#[derive(Debug)]
pub struct Output {
    file: File,
    kept: VecDeque<u8>,
    /// Bytes that were lost since the reader was last told.
    lost: u64,
    /// Whether nobody will ever read.
    closed: bool,
}

impl Output {
    /// Writes to `file`, which is set to never block.
    ///
    /// # Errors
    /// When the kernel does not let it be set so.
    pub fn new(file: File) -> io::Result<Self> {
        let flags = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self {
            file,
            kept: VecDeque::new(),
            lost: 0,
            closed: false,
        })
    }

    /// Writes `data` as far as the reader takes it, and keeps or loses the rest.
    pub fn write(&mut self, mut data: Slices<'_>) {
        while self.kept.is_empty() && !self.closed && !data.is_empty() {
            match self.file.write_volatile(&data.parts()[0]) {
                Ok(count) => data.skip(count),
                Err(VolatileMemoryError::IOError(error)) if is_passing(&error) => break,
                Err(_) => self.closed = true,
            }
        }
        if !self.closed {
            self.keep(data);
        }
    }

    fn keep(&mut self, mut data: Slices<'_>) {
        let room = MAX_KEPT_BYTES - self.kept.len();
        self.lost += data.len().saturating_sub(room) as u64;
        data.truncate(room);
        let mut bytes = vec![0; data.len()];
        data.read(&mut bytes);
        self.kept.extend(bytes);
    }

    /// Writes what was kept, now that the reader takes more.
    pub fn flush(&mut self) {
        while !self.kept.is_empty() {
            match self.file.write(self.kept.as_slices().0) {
                Ok(count) => drop(self.kept.drain(..count)),
                Err(error) if is_passing(&error) => return,
                Err(_) => {
                    self.closed = true;
                    self.kept = VecDeque::new();
                    return;
                }
            }
            if self.kept.is_empty() && self.lost > 0 {
                let note = format!("\r\n[{} bytes of output lost]\r\n", self.lost);
                self.lost = 0;
                self.kept.extend(note.as_bytes());
            }
        }
        self.kept = VecDeque::new();
    }

    /// Whether something is kept, so that [`Output::flush`] is wanted.
    pub fn is_waiting(&self) -> bool {
        !self.kept.is_empty()
    }
}

/// Whether a later try may succeed.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

impl AsRawFd for Output {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::OwnedFd};

    use vm_memory::VolatileSlice;

    use super::*;

    fn write(output: &mut Output, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        output.write(Slices::from(VolatileSlice::from(bytes.as_mut_slice())));
    }

    #[test]
    fn a_slow_reader_gets_what_is_kept_and_is_told_what_is_lost() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut output = Output::new(File::from(OwnedFd::from(writer))).unwrap();
        let sent = vec![b'x'; 1 << 20];
        for part in sent.chunks(1000) {
            write(&mut output, part);
        }
        assert!(output.is_waiting());

        let mut received = Vec::new();
        let mut piece = vec![0; 1 << 16];
        while output.is_waiting() {
            let count = reader.read(&mut piece).unwrap();
            received.extend_from_slice(&piece[..count]);
            output.flush();
        }
        drop(output);
        reader.read_to_end(&mut received).unwrap();

        let text = String::from_utf8(received).unwrap();
        let kept = text.bytes().take_while(|&byte| byte == b'x').count();
        assert!(kept >= MAX_KEPT_BYTES && kept < sent.len());
        let lost = sent.len() - kept;
        assert_eq!(
            text[kept..],
            format!("\r\n[{lost} bytes of output lost]\r\n")
        );
    }

    #[test]
    fn output_without_a_reader_is_thrown_away() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut output = Output::new(File::from(OwnedFd::from(writer))).unwrap();
        write(&mut output, b"to nobody");
        assert!(!output.is_waiting());
    }
}
