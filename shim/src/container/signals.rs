//! Signals that come to the command, before the container runs and after.

use std::io;

use nix::sys::signal::Signal;
use tokio::{
    signal::unix::{Signal as Stream, SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
};

/// Those that are passed on to the container's process. Others are for the command itself, or
/// cannot be caught.
const FORWARDED: &[Signal] = &[
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGTERM,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGWINCH,
];

/// The signals of this process from now on. Dropping it ends their watch.
#[derive(Debug)]
pub struct Signals {
    received: mpsc::Receiver<Signal>,
    watchers: Vec<JoinHandle<()>>,
}

impl Signals {
    /// Catches them.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn catch() -> io::Result<Self> {
        let (sender, received) = mpsc::channel(64);
        let watch = |wanted: &Signal| {
            let stream = signal(SignalKind::from_raw(*wanted as i32))?;
            Ok(tokio::spawn(pass_on(*wanted, stream, sender.clone())))
        };
        Ok(Self {
            watchers: FORWARDED.iter().map(watch).collect::<io::Result<_>>()?,
            received,
        })
    }

    /// The next signal.
    pub async fn next(&mut self) -> Signal {
        match self.received.recv().await {
            Some(signal) => signal,
            // The watchers live as long as this does.
            None => std::future::pending().await,
        }
    }

    /// The next signal that asks the command to end.
    pub async fn end(&mut self) -> Signal {
        loop {
            let signal = self.next().await;
            if Self::ask_for_the_end(signal) {
                return signal;
            }
        }
    }

    /// Whether who sends the signal wants the command to end.
    pub fn ask_for_the_end(signal: Signal) -> bool {
        matches!(
            signal,
            Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM
        )
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.watchers.iter().for_each(JoinHandle::abort);
    }
}

async fn pass_on(signal: Signal, mut stream: Stream, sender: mpsc::Sender<Signal>) {
    while stream.recv().await.is_some() {
        if sender.send(signal).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::{sys::signal::kill, unistd::getpid};

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn signals_are_received_in_turn_and_only_some_ask_for_the_end() {
        let mut signals = Signals::catch().expect("caught");
        kill(getpid(), Signal::SIGUSR1).expect("sent");
        assert_eq!(signals.next().await, Signal::SIGUSR1);
        kill(getpid(), Signal::SIGWINCH).expect("sent");
        kill(getpid(), Signal::SIGHUP).expect("sent");
        assert_eq!(signals.end().await, Signal::SIGHUP);
    }
}
