//! What was heard of an agent, noted by whoever hears it: those who call it, and the threads that
//! carry its containers' output.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// Signs of an agent's life. Copies are of the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signs(Arc<State>);

#[derive(Debug, Default)]
struct State {
    heard: AtomicBool,
    /// Calls that may hold the agent up, and are not answered.
    in_hand: AtomicUsize,
    /// Whether such a call was made and nothing was heard since that says that it is done.
    working: AtomicBool,
}

/// A call that may hold the agent up. One that is dropped without [`Work::done`] may do so still.
#[derive(Debug)]
pub(in crate::sandbox) struct Work(Signs);

impl Signs {
    /// It was heard.
    pub(crate) fn heard(&self) {
        let Self(state) = self;
        // Those who carry bytes say so with each of them: mostly there is nothing to change.
        if !state.heard.load(Ordering::Relaxed) {
            state.heard.store(true, Ordering::Relaxed);
        }
        if state.working.load(Ordering::Relaxed) && state.in_hand.load(Ordering::Relaxed) == 0 {
            state.working.store(false, Ordering::Relaxed);
        }
    }

    /// It is set to work.
    pub(in crate::sandbox) fn work(&self) -> Work {
        self.0.in_hand.fetch_add(1, Ordering::Relaxed);
        self.0.working.store(true, Ordering::Relaxed);
        Work(self.clone())
    }

    /// Whether it was heard since the last time that this was asked.
    pub(super) fn take(&self) -> bool {
        self.0.heard.swap(false, Ordering::Relaxed)
    }

    /// Whether it may be held up by what it was set to do.
    pub(super) fn working(&self) -> bool {
        self.0.working.load(Ordering::Relaxed)
    }
}

impl Work {
    /// The agent says that it is done.
    pub(in crate::sandbox) fn done(self) {
        let signs = self.0.clone();
        drop(self);
        signs.heard();
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.0.in_hand.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_heard_is_told_once() {
        let signs = Signs::default();
        assert!(!signs.take());
        signs.clone().heard();
        assert!(signs.take());
        assert!(!signs.take());
    }

    #[test]
    fn an_agent_works_until_all_is_done() {
        let signs = Signs::default();
        assert!(!signs.working());
        let (one, other) = (signs.work(), signs.work());
        one.done();
        assert!(signs.working());
        other.done();
        assert!(!signs.working());
    }

    #[test]
    fn an_agent_whose_caller_gave_up_works_until_it_is_heard_again() {
        let signs = Signs::default();
        drop(signs.work());
        assert!(signs.working());
        signs.heard();
        assert!(!signs.working());
    }
}
