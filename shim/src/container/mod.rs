//! What a container is connected to on the host: its streams, a terminal, and
//! the signals of the command that runs it.

mod pump;
pub mod signals;
mod stdio;
mod terminal;

pub use signals::Signals;
pub(crate) use stdio::Pumps;
pub use stdio::{Streams, Wiring};
pub use terminal::{NotATerminal, RawMode, Terminal};

/// The exit status of a command of ours that failed itself, as container tools have it.
pub const FAILED: u8 = 125;
