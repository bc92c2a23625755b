//! What a container is in its pod, by the annotations of containerd's CRI
//! plugin, of CRI-O and of podman.

use oci_spec::runtime::Spec;

use super::Error;
use crate::id::ContainerId;

/// The annotations that say what a container is, and of which sandbox.
const KEYS: [(&str, &str); 2] = [
    (
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
    ),
    (
        "io.kubernetes.cri-o.ContainerType",
        "io.kubernetes.cri-o.SandboxID",
    ),
];

/// What a container is in its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The first of a pod, or alone: nothing says which.
    First,
    /// It stands for the pod and runs nothing of its own.
    Sandbox,
    /// It belongs to the pod of another.
    Member {
        /// The other.
        sandbox: ContainerId,
    },
}

impl Role {
    /// What the annotations of `spec` say.
    pub(super) fn of(spec: &Spec) -> Result<Self, Error> {
        let Some(annotations) = spec.annotations() else {
            return Ok(Self::First);
        };
        for (kind, sandbox) in KEYS {
            match annotations.get(kind).map(String::as_str) {
                Some("sandbox") => return Ok(Self::Sandbox),
                Some("container") => {
                    let name = annotations.get(sandbox).map_or("", String::as_str);
                    let sandbox = ContainerId::parse(name).map_err(|source| Error::Sandbox {
                        key: sandbox,
                        source,
                    })?;
                    return Ok(Self::Member { sandbox });
                }
                _ => {}
            }
        }
        Ok(Self::First)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn role(annotations: Value) -> Result<Role, Error> {
        let spec = json!({"ociVersion": "1.0.2", "annotations": annotations});
        Role::of(&serde_json::from_value(spec).expect("a spec"))
    }

    #[test]
    fn containers_without_annotations_are_the_first_of_their_pod() {
        let role = role(json!({"io.container.manager": "libpod"})).expect("read");
        assert_eq!(role, Role::First);
    }

    #[test]
    fn the_annotations_of_each_client_are_known() {
        let cri = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "abc"
        });
        let podman = json!({
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": "abc"
        });
        for annotations in [cri, podman] {
            let sandbox = ContainerId::parse("abc").expect("a name");
            assert_eq!(role(annotations).expect("read"), Role::Member { sandbox });
        }
        let sandbox = json!({"io.kubernetes.cri.container-type": "sandbox"});
        assert_eq!(role(sandbox).expect("read"), Role::Sandbox);
    }

    #[test]
    fn a_member_of_no_sandbox_is_refused_by_the_annotations_name() {
        let annotations = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "../x"
        });
        let error = role(annotations).expect_err("refused").to_string();
        assert!(error.contains("io.kubernetes.cri.sandbox-id"), "{error}");
    }
}
