//! What becomes of the packets that come in at an interface, as long as this lives.

use std::{io, sync::Arc};

use netlink::{Instruction, Socket, Verdict};

/// Where our filters are among those that others may have put at an interface: behind most.
const PRIORITY: u16 = 0x6268;

/// A filter at an interface.
#[derive(Debug)]
pub(super) struct Filter {
    kernel: Arc<Socket>,
    at: u32,
    /// Whether the place for filters was made for it.
    own_ingress: bool,
}

impl Filter {
    /// What comes in at `at` goes out at `to`.
    pub(super) fn redirect(kernel: &Arc<Socket>, at: u32, to: u32) -> io::Result<Self> {
        let this = Self::place(kernel, at)?;
        kernel.add_filter(at, PRIORITY, Verdict::Redirect(to))?;
        Ok(this)
    }

    /// What comes in at `at` and is wanted by `program` is dropped.
    pub(super) fn drop(kernel: &Arc<Socket>, at: u32, program: &[Instruction]) -> io::Result<Self> {
        let this = Self::place(kernel, at)?;
        kernel.add_program(at, PRIORITY, program, Verdict::Drop)?;
        Ok(this)
    }

    fn place(kernel: &Arc<Socket>, at: u32) -> io::Result<Self> {
        let own_ingress = match kernel.add_ingress(at) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error),
        };
        Ok(Self {
            kernel: Arc::clone(kernel),
            at,
            own_ingress,
        })
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        // Either fails when the interface is gone, and so is what it had.
        let _ = match self.own_ingress {
            true => self.kernel.delete_ingress(self.at),
            false => self.kernel.delete_filter(self.at, PRIORITY),
        };
    }
}
