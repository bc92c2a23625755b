//! Which device files a container may use, and what has to hold it to that.
//!
//! A program of its cgroup can hold any container to any rules, but to load
//! the first costs as much as the rest of a container's making. Most need
//! none: who cannot make device files, and finds none but those of its own
//! /dev, uses what the agent put there.

use crate::spec::{Capabilities, DeviceRule, Process, Spec};

/// What holds a container to its rules about devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guard {
    /// Nothing: it may use every device.
    None,
    /// Its mounts, on which no device file counts, but for its own /dev.
    Mounts,
    /// A program of its cgroup.
    Program,
}

impl Guard {
    /// What the container of `spec` needs.
    pub(crate) fn of(spec: &Spec) -> Self {
        let rules = &spec.linux.resources.devices;
        if rules.last().is_some_and(allows_all) {
            return Self::None;
        }
        let made = spec.process.as_ref().is_some_and(can_make_devices);
        let given = !spec.linux.devices.is_empty() || rules.iter().any(|rule| rule.allow);
        if made || given {
            Self::Program
        } else {
            Self::Mounts
        }
    }
}

/// Whether `process` can make device files, or execute what can.
pub(crate) fn can_make_devices(process: &Process) -> bool {
    let Some(Capabilities {
        bounding,
        effective,
        inheritable,
        permitted,
        ambient,
    }) = &process.capabilities
    else {
        return false;
    };
    [bounding, effective, inheritable, permitted, ambient]
        .into_iter()
        .flatten()
        .any(|name| name.to_ascii_uppercase().ends_with("MKNOD"))
}

/// Whether `rule` allows every use of every device.
fn allows_all(rule: &DeviceRule) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number == -1);
    let all_uses = rule.access.as_deref().is_none_or(|access| {
        access.is_empty() || ['r', 'w', 'm'].iter().all(|way| access.contains(*way))
    });
    let all_kinds = rule
        .kind
        .as_deref()
        .is_none_or(|kind| kind == "a" || kind.is_empty());
    rule.allow && all_kinds && any(rule.major) && any(rule.minor) && all_uses
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(capabilities: &str, linux: &str) -> Guard {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","process":{{"cwd":"/","args":["sh"],
                "capabilities":{{"bounding":[{capabilities}]}}}},"linux":{linux}}}"#
        );
        Guard::of(&Spec::parse(json.as_bytes()).unwrap())
    }

    #[test]
    fn who_cannot_make_device_files_is_held_by_its_mounts() {
        assert_eq!(guard(r#""CAP_CHOWN""#, "{}"), Guard::Mounts);
        let denied = r#"{"resources":{"devices":[{"allow":false,"access":"rwm"}]}}"#;
        assert_eq!(guard("", denied), Guard::Mounts);
    }

    #[test]
    fn who_can_make_or_is_given_device_files_is_held_by_a_program() {
        assert_eq!(guard(r#""CAP_MKNOD""#, "{}"), Guard::Program);
        assert_eq!(
            guard("", r#"{"devices":[{"type":"c","path":"/dev/x"}]}"#),
            Guard::Program
        );
        let rule = r#"{"resources":{"devices":[{"allow":true,"type":"c","major":10}]}}"#;
        assert_eq!(guard("", rule), Guard::Program);
    }

    #[test]
    fn who_may_use_all_devices_is_not_held() {
        let all = r#"{"resources":{"devices":[{"allow":true,"access":"rwm"}]}}"#;
        assert_eq!(guard(r#""CAP_MKNOD""#, all), Guard::None);
        let then_not = r#"{"resources":{"devices":[{"allow":true},{"allow":false,"type":"b"}]}}"#;
        assert_eq!(guard("", then_not), Guard::Program);
    }
}
