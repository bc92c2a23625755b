//! What a device's thread is to do next, beside its queues.
//!
//! There is room for one message of each kind, so that a driver that asks faster than the thread
//! answers costs no memory: a later message takes the place of an earlier one.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::{Link, worker::Activation};

/// Told when a device was reset.
pub type OnReset = Box<dyn FnOnce() + Send>;

/// One thing for the thread to do.
pub(super) enum Message {
    Stop,
    Reset(OnReset),
    SetLink(Link),
    Activate(Box<Activation>),
    WriteConfig(Vec<u8>),
}

/// The messages for one thread.
#[derive(Default)]
pub(super) struct Mailbox {
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

#[derive(Default)]
struct Inbox {
    stop: bool,
    reset: Option<OnReset>,
    link: Option<Link>,
    activation: Option<Box<Activation>>,
    config: Option<Vec<u8>>,
    /// The thread has ended.
    ended: bool,
}

impl Mailbox {
    /// Leaves a message. A reset takes back what the driver asked for before it.
    pub(super) fn put(&self, message: Message) {
        let mut inbox = self.inbox();
        match message {
            Message::Stop => inbox.stop = true,
            Message::Reset(done) => {
                inbox.reset = Some(done);
                inbox.activation = None;
                inbox.config = None;
            }
            Message::SetLink(link) => inbox.link = Some(link),
            Message::Activate(activation) => inbox.activation = Some(activation),
            Message::WriteConfig(fields) => inbox.config = Some(fields),
        }
        self.changed.notify_all();
    }

    /// Takes the most urgent message.
    pub(super) fn take(&self) -> Option<Message> {
        self.inbox().take()
    }

    /// Waits for a message.
    pub(super) fn wait(&self) -> Message {
        let mut inbox = self.inbox();
        loop {
            if let Some(message) = inbox.take() {
                return message;
            }
            inbox = self
                .changed
                .wait(inbox)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The thread is at its end.
    pub(super) fn end(&self) {
        self.inbox().ended = true;
        self.changed.notify_all();
    }

    /// Waits for the thread's end, but not beyond `deadline`; whether it came.
    pub(super) fn ended_by(&self, deadline: Instant) -> bool {
        let patience = deadline.saturating_duration_since(Instant::now());
        let waited = self
            .changed
            .wait_timeout_while(self.inbox(), patience, |inbox| !inbox.ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    fn take(&mut self) -> Option<Message> {
        if self.stop {
            return Some(Message::Stop);
        }
        if let Some(done) = self.reset.take() {
            return Some(Message::Reset(done));
        }
        if let Some(link) = self.link.take() {
            return Some(Message::SetLink(link));
        }
        if let Some(activation) = self.activation.take() {
            return Some(Message::Activate(activation));
        }
        self.config.take().map(Message::WriteConfig)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_driver_that_writes_its_configuration_all_the_time_fills_nothing() {
        let mailbox = Mailbox::default();
        for number in 0..100_000u32 {
            mailbox.put(Message::WriteConfig(number.to_le_bytes().into()));
        }
        let Some(Message::WriteConfig(last)) = mailbox.take() else {
            panic!("a write waits");
        };
        assert_eq!(last, 99_999u32.to_le_bytes());
        assert!(mailbox.take().is_none());
    }

    #[test]
    fn a_reset_takes_back_what_the_driver_wrote_before_it() {
        let mailbox = Mailbox::default();
        mailbox.put(Message::WriteConfig(vec![1]));
        mailbox.put(Message::SetLink(Link::Down));
        mailbox.put(Message::Reset(Box::new(|| {})));
        assert!(matches!(mailbox.take(), Some(Message::Reset(_))));
        assert!(matches!(mailbox.take(), Some(Message::SetLink(Link::Down))));
        assert!(mailbox.take().is_none());
    }

    #[test]
    fn the_end_of_a_thread_is_awaited_for_a_while_only() {
        let mailbox = Mailbox::default();
        let soon = || Instant::now() + Duration::from_millis(1);
        assert!(!mailbox.ended_by(soon()));
        mailbox.end();
        assert!(mailbox.ended_by(soon()));
    }
}
