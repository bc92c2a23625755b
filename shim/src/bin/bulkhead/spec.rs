//! `bulkhead spec`: a configuration to begin with.

use std::{fs::OpenOptions, io::Write};

use anyhow::Context as _;
use nix::unistd::{getegid, geteuid};
use serde_json::{Value, json};
use shim::features::SPECIFICATION;

use super::cli::SpecArgs;

/// Writes it.
pub(crate) fn spec(args: &SpecArgs) -> anyhow::Result<u8> {
    let file = args.bundle.join("config.json");
    let mut config = config();
    if args.rootless {
        rootless(&mut config, geteuid().as_raw(), getegid().as_raw());
    }
    let text = serde_json::to_string_pretty(&config)? + "\n";
    let mut new = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&file)
        .with_context(|| match file.exists() {
            true => format!("file {} exists. Remove it first", file.display()),
            false => format!("cannot write {}", file.display()),
        })?;
    new.write_all(text.as_bytes())
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(0)
}

fn config() -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": source, "options": options});
    let harmless = ["nosuid", "noexec", "nodev"];
    json!({
        "ociVersion": SPECIFICATION,
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm"
            ],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "bulkhead",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &[
                "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
            ]),
            mount("/dev/shm", "tmpfs", "shm", &[
                "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"
            ]),
            mount("/dev/mqueue", "mqueue", "mqueue", &harmless),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &[
                "nosuid", "noexec", "nodev", "relatime", "ro"
            ])
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"}, {"type": "cgroup"}
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                "/proc/scsi"
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
            ]
        }
    })
}

/// A user namespace in which root is the user who asks. The rest stays: a virtual machine needs
/// none of what a user without privileges is denied on the host.
fn rootless(config: &mut Value, uid: u32, gid: u32) {
    let map = |id: u32| json!([{"containerID": 0, "hostID": id, "size": 1}]);
    let linux = &mut config["linux"];
    linux["uidMappings"] = map(uid);
    linux["gidMappings"] = map(gid);
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    for mount in config["mounts"].as_array_mut().into_iter().flatten() {
        // Groups that are not mapped cannot own a terminal.
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| option != "gid=5");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_one_of_the_specification() {
        let mut config = config();
        rootless(&mut config, 1000, 1000);
        let spec: oci_spec::runtime::Spec = serde_json::from_value(config).expect("valid");
        let linux = spec.linux().as_ref().expect("linux");
        let mappings = linux.uid_mappings().as_ref().expect("mappings");
        assert_eq!(mappings[0].host_id(), 1000);
    }
}
