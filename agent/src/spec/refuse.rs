//! What the agent does not implement is refused by name, never ignored.

use super::{Error, Resources, Spec};

const V1: &str = "it exists in cgroup v1 alone and the guest has v2; leave it out";

/// A property, whether it is there, and why it must not be.
type Row = (&'static str, bool, &'static str);

fn first_of(table: &[Row]) -> Result<(), Error> {
    match table.iter().find(|(_, present, _)| *present) {
        Some((field, _, reason)) => Err(Error::Unsupported {
            field: (*field).into(),
            reason,
        }),
        None => Ok(()),
    }
}

/// Fails for the first property of `spec` that the agent would have to ignore.
pub(super) fn unsupported(spec: &Spec) -> Result<(), Error> {
    let linux = &spec.linux;
    first_of(&[
        (
            "linux.intelRdt",
            linux.intel_rdt.is_some(),
            "a virtual machine has no share of the processor's caches to give; leave it out",
        ),
        (
            "linux.netDevices",
            !linux.net_devices.is_empty(),
            "devices of the host's network cannot be moved into a virtual machine; attach them to the pod's network",
        ),
        (
            "vm",
            spec.vm.is_some(),
            "Bulkhead brings hypervisor, kernel and image of its own; leave it out",
        ),
        (
            "linux.seccomp.listenerPath",
            linux
                .seccomp
                .as_ref()
                .and_then(|s| s.listener_path.as_deref())
                .is_some_and(|path| !path.is_empty()),
            "a process of the host cannot answer for the guest's kernel",
        ),
    ])?;
    resources(&linux.resources)
}

/// Fails for the first limit that the guest's kernel does not have.
pub(super) fn resources(resources: &Resources) -> Result<(), Error> {
    let memory = &resources.memory;
    let cpu = &resources.cpu;
    first_of(&[
        (
            "linux.resources.rdma",
            !resources.rdma.is_empty(),
            "the guest has no RDMA device; leave it out",
        ),
        (
            "linux.resources.network",
            resources
                .network
                .as_ref()
                .is_some_and(|n| n.class_id.is_some_and(|id| id != 0) || !n.priorities.is_empty()),
            V1,
        ),
        (
            "linux.resources.memory.swappiness",
            memory.swappiness.is_some(),
            V1,
        ),
        (
            "linux.resources.memory.disableOOMKiller",
            memory.disable_oom_killer == Some(true),
            V1,
        ),
        (
            "linux.resources.cpu.realtimeRuntime",
            cpu.realtime_runtime.is_some_and(|n| n != 0),
            V1,
        ),
        (
            "linux.resources.cpu.realtimePeriod",
            cpu.realtime_period.is_some_and(|n| n != 0),
            V1,
        ),
        (
            "linux.resources.blockIO.leafWeight",
            resources.block_io.leaf_weight.is_some_and(|n| n != 0),
            V1,
        ),
    ])
}
