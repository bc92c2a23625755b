//! What the agent does not implement is refused by name, never ignored.

use super::{Error, Spec};

/// Fails for the first property of `spec` that the agent would have to ignore.
pub(super) fn unsupported(spec: &Spec) -> Result<(), Error> {
    let linux = &spec.linux;
    let resources = &linux.resources;
    let v1 = "it exists in cgroup v1 alone and the guest has v2; leave it out";
    let later = "this agent does not implement it; leave it out";
    let table: &[(&str, bool, &'static str)] = &[
        (
            "hooks.createContainer",
            !spec.hooks.create_container.is_empty(),
            later,
        ),
        (
            "hooks.startContainer",
            !spec.hooks.start_container.is_empty(),
            later,
        ),
        ("linux.intelRdt", linux.intel_rdt.is_some(), later),
        (
            "linux.personality",
            linux
                .personality
                .as_ref()
                .is_some_and(|p| !matches!(p.domain.as_str(), "" | "LINUX")),
            "only the domain LINUX is",
        ),
        ("linux.timeOffsets", !linux.time_offsets.is_empty(), later),
        ("linux.resources.rdma", !resources.rdma.is_empty(), later),
        (
            "linux.resources.network",
            resources
                .network
                .as_ref()
                .is_some_and(|n| n.class_id.is_some() || !n.priorities.is_empty()),
            v1,
        ),
        (
            "linux.resources.memory.swappiness",
            resources.memory.swappiness.is_some(),
            v1,
        ),
        (
            "linux.resources.memory.disableOOMKiller",
            resources.memory.disable_oom_killer == Some(true),
            v1,
        ),
        (
            "linux.resources.cpu.realtimeRuntime",
            resources.cpu.realtime_runtime.is_some_and(|n| n != 0),
            v1,
        ),
        (
            "linux.resources.cpu.realtimePeriod",
            resources.cpu.realtime_period.is_some_and(|n| n != 0),
            v1,
        ),
        (
            "linux.resources.blockIO.leafWeight",
            resources.block_io.leaf_weight.is_some_and(|n| n != 0),
            v1,
        ),
        (
            "linux.resources.blockIO.weightDevice",
            !resources.block_io.weight_device.is_empty(),
            later,
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
    ];
    if let Some((field, _, reason)) = table.iter().find(|(_, present, _)| *present) {
        return Err(Error::Unsupported {
            field: (*field).into(),
            reason,
        });
    }
    for (index, mount) in spec.mounts.iter().enumerate() {
        if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
            return Err(Error::Unsupported {
                field: format!("mounts[{index}].uidMappings"),
                reason: later,
            });
        }
    }
    Ok(())
}
