//! What is said on the control socket: one JSON object a line, a [`Request`]
//! one way and a [`Reply`] the other.
//!
//! ```text
//! {"request":"pause"}
//! {"reply":"done"}
//! {"request":"remove_device","slot":9}
//! {"reply":"failed","message":"there is no device in slot 9"}
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{config::DeviceConfig, counters::DeviceReading, virtio::Link, vm::trace::Mark};

/// The longest line, of either side, in bytes.
pub const MAX_LINE_BYTES: usize = 64 << 10;
/// The most descriptors that go with one request.
pub const MAX_DESCRIPTORS: usize = 16;

/// What the VMM is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What the VM is and does: [`Reply::Status`].
    Status {},
    /// Whether guest code runs: [`Reply::State`]. Nothing that a guest does holds the answer up.
    State {},
    /// Everything that is counted: [`Reply::Counters`].
    Counters {},
    /// Stop guest code until [`Request::Resume`]; once answered, none runs.
    Pause {},
    /// Let guest code run again.
    Resume {},
    /// End the VM at once, without asking the guest.
    Stop {},
    /// Put a device on the bus: [`Reply::Added`]. A resource `{"fd": n}` is the n-th descriptor,
    /// from 0, that is sent with the request's first byte (`SCM_RIGHTS`).
    AddDevice {
        /// The device.
        device: DeviceConfig,
    },
    /// Give a network card its cable or take it away.
    SetLink {
        /// Its slot.
        slot: u8,
        /// Whether it has one.
        link: Link,
    },
    /// Take a device off the bus. The guest must have let go of it.
    RemoveDevice {
        /// Its slot.
        slot: u8,
    },
}

/// What the VMM answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// It is so.
    Done {},
    /// It is not, because of this.
    Failed {
        /// Why, and what to do.
        message: String,
    },
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::State`].
    State {
        /// Whether it does.
        state: State,
    },
    /// To [`Request::Counters`].
    Counters(Counters),
    /// To [`Request::AddDevice`].
    Added {
        /// The slot that the guest finds the device in.
        slot: u8,
    },
}

/// What the VM is and does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether guest code runs.
    pub state: State,
    /// The devices on the bus.
    pub devices: Vec<Device>,
}

/// Whether guest code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It does.
    Running,
    /// It does not, until [`Request::Resume`].
    Paused,
}

/// A device on the bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its slot.
    pub slot: u8,
    /// What it is.
    pub kind: String,
    /// Whether the guest's driver uses it.
    pub in_use: bool,
}

/// Everything that is counted, from the VM's start on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Exits of guest code that the VMM answered, by kind.
    pub exits: BTreeMap<String, u64>,
    /// What KVM counts itself, all processors together, by KVM's names; `exits` among them is the
    /// number of all exits. Empty where KVM does not tell.
    pub kvm: BTreeMap<String, u64>,
    /// Each device on the bus.
    pub devices: Vec<DeviceCounters>,
    /// When each step of the start was done.
    pub trace: Vec<Mark>,
}

/// What one device counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCounters {
    /// Its slot.
    pub slot: u8,
    /// What it is.
    pub kind: String,
    /// The numbers.
    #[serde(flatten)]
    pub counted: DeviceReading,
}
