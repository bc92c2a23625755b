//! What the host learns unasked: the last events, numbered, which it fetches
//! by the number of the last one it has seen.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::{guest, id::ContainerId};

/// Something that happened to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Counts from 1.
    pub number: u64,
    /// When, in nanoseconds since the epoch.
    pub at_ns: u64,
    /// To which.
    pub container: ContainerId,
    /// What.
    pub what: What,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The kernel killed processes for want of memory: how many so far.
    OutOfMemory(u64),
}

/// How many events are kept for a host that is slow.
const KEPT: usize = 256;

/// The last events.
#[derive(Debug, Default)]
pub struct Events {
    kept: Mutex<Kept>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Kept {
    last: u64,
    events: VecDeque<Event>,
}

impl Events {
    /// Adds an event; the oldest goes when there are too many.
    pub fn add(&self, container: ContainerId, what: What) {
        let mut kept = self.lock();
        kept.last += 1;
        let number = kept.last;
        kept.events.push_back(Event {
            number,
            at_ns: guest::now_ns(),
            container,
            what,
        });
        if kept.events.len() > KEPT {
            kept.events.pop_front();
        }
        drop(kept);
        self.changed.notify_waiters();
    }

    /// Waits for events behind the number `after`; answers them and how many were not kept.
    pub async fn after(&self, after: u64) -> (Vec<Event>, u64) {
        loop {
            // Before the look, so that none between is missed.
            let changed = self.changed.notified();
            let found = self.lock().after(after);
            if let Some(found) = found {
                return found;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn after(&self, after: u64) -> Option<(Vec<Event>, u64)> {
        let events: Vec<_> = self
            .events
            .iter()
            .filter(|event| event.number > after)
            .cloned()
            .collect();
        let first = events.first()?.number;
        Some((events, first - after - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(count: u64) -> Events {
        let events = Events::default();
        for number in 1..=count {
            let id = ContainerId::parse("c").unwrap();
            events.add(id, What::OutOfMemory(number));
        }
        events
    }

    #[tokio::test]
    async fn events_come_in_order_behind_the_last_seen() {
        let (found, lost) = events(5).after(3).await;
        let numbers: Vec<_> = found.iter().map(|event| event.number).collect();
        assert_eq!((numbers, lost), (vec![4, 5], 0));
    }

    #[tokio::test]
    async fn what_was_not_kept_is_counted() {
        let (found, lost) = events(300).after(10).await;
        assert_eq!(found.len(), KEPT);
        assert_eq!(lost, 300 - 256 - 10);
    }

    #[tokio::test]
    async fn who_has_seen_all_waits_for_the_next() {
        let events = events(1);
        let id = ContainerId::parse("d").unwrap();
        let (found, ()) = tokio::join!(events.after(1), async {
            tokio::task::yield_now().await;
            events.add(id.clone(), What::OutOfMemory(1));
        });
        assert_eq!(found.0[0].container, id);
    }
}
