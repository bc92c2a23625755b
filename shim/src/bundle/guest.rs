//! The configuration as the guest's agent gets it: what the host does is taken
//! out, paths become the guest's.

use std::path::Path;

use oci_spec::runtime::Mount;
use serde_json::{Value, json};

use super::Bundle;
use crate::sandbox::GUEST_ROOT;

/// `config.json`, rewritten for the guest.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestSpec(Value);

impl Bundle {
    /// The configuration for the guest. `terminal_size` is the terminal's columns and rows.
    pub fn for_guest(&self, terminal_size: Option<(u16, u16)>) -> GuestSpec {
        let mut config = self.config.clone();
        rewrite(&mut config, terminal_size);
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
fn rewrite(config: &mut Value, terminal_size: Option<(u16, u16)>) {
    config["root"]["path"] = json!(GUEST_ROOT);
    let Some(object) = config.as_object_mut() else {
        return;
    };
    // They run on the host.
    object.remove("hooks");
    if let Some(process) = object.get_mut("process").and_then(Value::as_object_mut) {
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
    if let Some(linux) = object.get_mut("linux").and_then(Value::as_object_mut) {
        linux.remove("mountLabel");
        // The guest's network is the container's.
        if let Some(namespaces) = linux.get_mut("namespaces").and_then(Value::as_array_mut) {
            namespaces.retain(|namespace| namespace["type"] != "network");
        }
    }
}

/// Whether a mount takes a file or directory of the host.
pub(super) fn is_host_bind(mount: &Mount) -> bool {
    let by_type = mount.typ().as_deref() == Some("bind");
    let options = mount.options().as_deref().unwrap_or_default();
    let by_option = options
        .iter()
        .any(|option| option == "bind" || option == "rbind");
    let source = mount.source().as_deref();
    (by_type || by_option) && source.is_some_and(Path::is_absolute)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(mut config: Value) -> Value {
        rewrite(&mut config, None);
        config
    }

    #[test]
    fn the_root_becomes_the_guests_and_keeps_its_other_properties() {
        let config = rewritten(json!({"root": {"path": "rootfs", "readonly": true}}));
        assert_eq!(
            config,
            json!({"root": {"path": "/run/bulkhead/root", "readonly": true}})
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
            "hooks": {"prestart": []},
            "process": {"apparmorProfile": "p", "selinuxLabel": "l", "cwd": "/"},
            "linux": {"mountLabel": "l"}
        }));
        assert_eq!(
            config,
            json!({"root": {"path": GUEST_ROOT}, "process": {"cwd": "/"}, "linux": {}})
        );
    }

    #[test]
    fn a_terminals_size_reaches_the_process() {
        let mut config = json!({"root": {}, "process": {"terminal": true}});
        rewrite(&mut config, Some((120, 40)));
        assert_eq!(
            config["process"]["consoleSize"],
            json!({"width": 120, "height": 40})
        );
    }
}
