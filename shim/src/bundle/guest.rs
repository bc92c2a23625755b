//! The configuration as the guest's agent gets it: what the host does is taken
//! out, paths become the guest's.

use protocol::{Namespace, POD_SHM};
use serde_json::{Map, Value, json};

use super::{BlockDevice, Bundle, Role, Source};
use crate::id::ContainerId;

/// `config.json`, rewritten for the guest.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestSpec(Value);

/// Where in the guest what came from the host is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// The root file system.
    pub root: String,
    /// Whether nothing can be written to it, whatever the configuration says.
    pub root_read_only: bool,
    /// Directories and files, by their number among the configuration's `mounts`.
    pub volumes: Vec<(usize, String)>,
}

impl Bundle {
    /// The configuration for the guest. `terminal_size` is the terminal's columns and rows.
    pub fn for_guest(&self, places: &Places, terminal_size: Option<(u16, u16)>) -> GuestSpec {
        let mut config = self.config.clone();
        rewrite(&mut config, places, terminal_size);
        give(&mut config, &self.devices);
        for volume in &self.volumes {
            let source = match &volume.source {
                Source::Memory { .. } => POD_SHM,
                Source::Device { path } => path,
                Source::Shared { .. } | Source::Disk(_) => continue,
            };
            config["mounts"][volume.index]["source"] = json!(source);
        }
        if let Role::Member { sandbox } = &self.role {
            join(&mut config, sandbox);
        }
        GuestSpec(config)
    }
}

impl GuestSpec {
    /// The wire form.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.0).unwrap_or_default()
    }
}

/// Everything that is rewritten, and nothing else: properties that this version does not know
/// stay as they are.
fn rewrite(config: &mut Value, places: &Places, terminal_size: Option<(u16, u16)>) {
    config["root"]["path"] = json!(places.root);
    if places.root_read_only {
        config["root"]["readonly"] = json!(true);
    }
    for (index, path) in &places.volumes {
        let mount = &mut config["mounts"][index];
        mount["source"] = json!(path);
        if let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) {
            // An image file is a disk in the guest.
            options.retain(|option| option != "loop");
        }
    }
    let Some(object) = config.as_object_mut() else {
        return;
    };
    if let Some(hooks) = object.get_mut("hooks").and_then(Value::as_object_mut) {
        // They run on the host.
        for hook in ["prestart", "createRuntime", "poststart", "poststop"] {
            hooks.remove(hook);
        }
    }
    if let Some(process) = object.get_mut("process").and_then(Value::as_object_mut) {
        process_for_guest(process, terminal_size);
    }
    if let Some(linux) = object.get_mut("linux").and_then(Value::as_object_mut) {
        linux.remove("mountLabel");
        // The guest's network is the container's.
        if let Some(namespaces) = linux.get_mut("namespaces").and_then(Value::as_array_mut) {
            namespaces.retain(|namespace| namespace["type"] != "network");
        }
        if let Some(resources) = linux.get_mut("resources") {
            resources_for_guest(resources);
        }
    }
}

/// Of the block devices stay those that the container gets.
fn give(config: &mut Value, given: &[BlockDevice]) {
    let devices = config.pointer_mut("/linux/devices");
    let Some(devices) = devices.and_then(Value::as_array_mut) else {
        return;
    };
    let is_given = |device: &Value| {
        let number = (device["major"].as_u64(), device["minor"].as_u64());
        let same = |given: &BlockDevice| (Some(given.major.into()), Some(given.minor.into()));
        given.iter().any(|given| same(given) == number)
    };
    devices.retain(|device| device["type"] != "b" || is_given(device));
}

/// Limits as the guest's agent gets them, in a configuration or anew: the processors and nodes of
/// memory are the host's, and what is confined to them there is the machine.
pub(crate) fn resources_for_guest(resources: &mut Value) {
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        cpu.remove("cpus");
        cpu.remove("mems");
    }
}

/// A process as the guest's agent gets it.
pub(crate) fn process_for_guest(
    process: &mut Map<String, Value>,
    terminal_size: Option<(u16, u16)>,
) {
    // Profiles of the host's security modules, which the guest's kernel does not have: the
    // virtual machine stands in their place.
    process.remove("apparmorProfile");
    process.remove("selinuxLabel");
    if let Some((width, height)) = terminal_size {
        process.insert(
            "consoleSize".to_owned(),
            json!({"height": height, "width": width}),
        );
    }
}

/// The namespaces that a member joins by paths of the host are its sandbox's in the guest.
fn join(config: &mut Value, sandbox: &ContainerId) {
    let namespaces = config["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        let kind = namespace["type"].as_str().unwrap_or_default().to_owned();
        let joined = namespace["path"]
            .as_str()
            .is_some_and(|path| !path.is_empty());
        if joined {
            let id = sandbox.as_str();
            namespace["path"] = json!(Namespace::Container { id, kind: &kind }.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(mut config: Value) -> Value {
        rewrite(&mut config, &places(), None);
        config
    }

    fn places() -> Places {
        Places {
            root: "/run/bulkhead/shared/0/rootfs".to_owned(),
            ..Places::default()
        }
    }

    #[test]
    fn the_root_becomes_the_guests_and_keeps_its_other_properties() {
        let config = rewritten(json!({"root": {"path": "rootfs", "readonly": true}}));
        assert_eq!(
            config,
            json!({"root": {"path": "/run/bulkhead/shared/0/rootfs", "readonly": true}})
        );
    }

    #[test]
    fn the_container_has_the_guests_network() {
        let config = rewritten(json!({
            "root": {},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}]}
        }));
        assert_eq!(config["linux"]["namespaces"], json!([{"type": "pid"}]));
    }

    #[test]
    fn what_is_unknown_stays() {
        let config = rewritten(json!({"root": {}, "novelty": {"x": [1, 2.5, "y"]}}));
        assert_eq!(config["novelty"], json!({"x": [1, 2.5, "y"]}));
    }

    #[test]
    fn profiles_and_hooks_of_the_host_are_taken_out() {
        let config = rewritten(json!({
            "root": {},
            "hooks": {"prestart": [], "createContainer": []},
            "process": {"apparmorProfile": "p", "selinuxLabel": "l", "cwd": "/"},
            "linux": {"mountLabel": "l"}
        }));
        assert_eq!(
            config,
            json!({
                "root": {"path": places().root},
                "hooks": {"createContainer": []},
                "process": {"cwd": "/"},
                "linux": {}
            })
        );
    }

    #[test]
    fn processors_of_the_host_are_none_of_the_guest() {
        let config = rewritten(json!({
            "root": {},
            "linux": {"resources": {"cpu": {"cpus": "2-3", "mems": "1", "shares": 5}, "pids": {}}}
        }));
        assert_eq!(
            config["linux"]["resources"],
            json!({"cpu": {"shares": 5}, "pids": {}})
        );
    }

    #[test]
    fn volumes_have_the_guests_paths() {
        let mut config = json!({"root": {}, "mounts": [{"source": "proc"}, {"source": "/srv"}]});
        let places = Places {
            volumes: vec![(1, "/run/bulkhead/shared/1/volume".to_owned())],
            ..places()
        };
        rewrite(&mut config, &places, None);
        let expected = json!([{"source": "proc"}, {"source": "/run/bulkhead/shared/1/volume"}]);
        assert_eq!(config["mounts"], expected);
    }

    #[test]
    fn an_image_file_is_no_loop_device_in_the_guest() {
        let mut config = json!({"root": {}, "mounts": [
            {"type": "ext4", "source": "/i.img", "options": ["loop", "ro"]}]});
        let places = Places {
            volumes: vec![(0, "/run/bulkhead/disks/9".to_owned())],
            root_read_only: true,
            ..places()
        };
        rewrite(&mut config, &places, None);
        assert_eq!(config["mounts"][0]["options"], json!(["ro"]));
        assert_eq!(config["root"]["readonly"], json!(true));
    }

    #[test]
    fn disks_of_the_host_that_the_container_does_not_get_are_left_out() {
        let device = |kind, major, minor| json!({"type": kind, "path": "/dev/x", "major": major, "minor": minor});
        let mut config = json!({"linux": {"devices": [
            device("b", 7, 0), device("b", 8, 0), device("c", 8, 0)]}});
        let given = BlockDevice {
            major: 7,
            minor: 0,
            read_only: true,
        };
        give(&mut config, &[given]);
        let left = json!([device("b", 7, 0), device("c", 8, 0)]);
        assert_eq!(config["linux"]["devices"], left);
    }

    #[test]
    fn a_member_joins_its_sandbox_in_the_guest() {
        let mut config = json!({"linux": {"namespaces": [
            {"type": "ipc", "path": "/proc/77/ns/ipc"}, {"type": "pid"}
        ]}});
        join(&mut config, &ContainerId::parse("pause").expect("a name"));
        let expected = json!([
            {"type": "ipc", "path": "/run/bulkhead/containers/pause/ns/ipc"}, {"type": "pid"}
        ]);
        assert_eq!(config["linux"]["namespaces"], expected);
    }

    #[test]
    fn a_terminals_size_reaches_the_process() {
        let mut config = json!({"root": {}, "process": {"terminal": true}});
        rewrite(&mut config, &places(), Some((120, 40)));
        assert_eq!(
            config["process"]["consoleSize"],
            json!({"width": 120, "height": 40})
        );
    }
}
