//! `linux.seccomp` compiled to a BPF program for the kernel.

use crate::{spec::Seccomp, sys};

/// Why a filter cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not yet.
    #[error("linux.seccomp is not supported")]
    Unsupported,
}

/// A compiled filter.
#[derive(Debug, Clone)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: u64,
}

impl Filter {
    /// Compiles the configuration's rules.
    pub(crate) fn compile(_: &Seccomp) -> Result<Self, Error> {
        Err(Error::Unsupported)
    }

    /// Confines this process, and what it executes, from now on.
    pub(crate) fn install(&self) -> std::io::Result<()> {
        sys::install_seccomp(&self.program, self.flags)
    }
}
