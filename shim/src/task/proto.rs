//! containerd's messages and services, generated from `shim/proto/*.proto`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protobuf::{MessageField, well_known_types::timestamp::Timestamp};

/// The Task service and its messages.
#[allow(warnings, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod task {
    include!(concat!(env!("OUT_DIR"), "/task.rs"));
}

/// The server trait of the Task service.
#[allow(warnings, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod task_ttrpc {
    pub use super::task;
    include!(concat!(env!("OUT_DIR"), "/task_ttrpc.rs"));
}

/// The events and the messages that carry them.
#[allow(warnings, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod events {
    include!(concat!(env!("OUT_DIR"), "/events.rs"));
}

/// The client of containerd's Events service.
#[allow(warnings, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod events_ttrpc {
    pub use super::events;
    include!(concat!(env!("OUT_DIR"), "/events_ttrpc.rs"));
}

/// What goes over standard input and output.
#[allow(warnings, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod bootstrap {
    include!(concat!(env!("OUT_DIR"), "/bootstrap.rs"));
}

/// A container's counters.
#[allow(warnings, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod metrics {
    include!(concat!(env!("OUT_DIR"), "/metrics.rs"));
}

/// The first second of the year 1, which stands for "not yet" in containerd's timestamps.
const NEVER: i64 = -62_135_596_800;

/// A moment as containerd writes it; `None` is "not yet".
pub(crate) fn timestamp(moment: Option<SystemTime>) -> MessageField<Timestamp> {
    let (seconds, nanos) = match moment.map(|moment| moment.duration_since(UNIX_EPOCH)) {
        None => (NEVER, 0),
        Some(since) => {
            let since = since.unwrap_or(Duration::ZERO);
            (since.as_secs() as i64, since.subsec_nanos() as i32)
        }
    };
    MessageField::some(Timestamp {
        seconds,
        nanos,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_has_not_ended_ended_in_the_year_1() {
        assert_eq!(timestamp(None).seconds, -62_135_596_800);
        let moment = UNIX_EPOCH + Duration::new(5, 7);
        let stamp = timestamp(Some(moment));
        assert_eq!((stamp.seconds, stamp.nanos), (5, 7));
    }
}
