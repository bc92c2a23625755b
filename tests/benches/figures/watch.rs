//! The end of a part that hangs, so that the figures of the others are still taken.

use std::process::exit;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long a part may take.
const PATIENCE: Duration = Duration::from_secs(900);

/// While this is there, the program ends itself when the part takes too long.
pub(crate) struct Watch {
    over: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(crate) fn over(part: &'static str) -> Self {
        let (over, ended) = channel();
        let thread = thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{part}: not done in {PATIENCE:?}");
                exit(124);
            }
        });
        Self {
            over: Some(over),
            thread: Some(thread),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.over.take());
        // it can only have ended well
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
