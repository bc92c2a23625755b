//! How large a machine a container gets.
//!
//! ```text
//!             --memory, --cpus    limits                        neither
//!   memory    as said             limit + 64 MiB for the guest  256 MiB
//!   CPUs      as said             quota / period, rounded up;   1
//!                                 as many as cpu.cpus names, if
//!                                 they are fewer
//! ```
//!
//! The limits are config.json's, or those of the whole pod in the annotations of a container that
//! stands for one. Such a pod without limits has 1 GiB, or half of the host's memory if that is
//! less: what comes later must fit into it, and what is not used is given back. CPUs that are
//! promised to it, as shares, count like limits.
//!
//! A limit in config.json is also enforced in the guest, by the container's
//! cgroup there.

use std::collections::BTreeSet;

use oci_spec::runtime::{LinuxCpu, Spec};
use serde_json::Value;

use super::Role;
use crate::sandbox::{MAX_CPUS, MIN_MEMORY_MIB, Size};

/// Memory of a machine without any limit.
const DEFAULT_MEMORY_MIB: u64 = 256;

/// Memory of a pod's machine without any limit.
const POD_MEMORY_MIB: u64 = 1024;

/// The memory of all containers of a pod.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// The CPU time of all containers of a pod: of each period, or as shares.
const POD_CPU: [&str; 3] = [
    "io.kubernetes.cri.sandbox-cpu-quota",
    "io.kubernetes.cri.sandbox-cpu-period",
    "io.kubernetes.cri.sandbox-cpu-shares",
];

/// Microseconds of a period of CPU time: the kernel's own default.
const PERIOD: u64 = 100_000;

/// The shares of one CPU.
const CPU_SHARES: u64 = 1024;

/// Linux has no more processors.
const MAX_HOST_CPUS: usize = 8192;

/// What the guest's kernel and agent need besides the container.
const GUEST_MEMORY_MIB: u64 = 64;

/// What was asked for on the command line.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    /// Memory.
    pub memory_mib: Option<u64>,
    /// CPUs.
    pub cpus: Option<u64>,
}

/// Why a machine cannot have that size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Too little to boot.
    #[error(
        "{memory_mib} MiB of memory are too few: a guest needs at least {MIN_MEMORY_MIB} MiB; give more with --memory"
    )]
    TooLittle {
        /// How much.
        memory_mib: u64,
    },
    /// More than there is.
    #[error(
        "{memory_mib} MiB of memory are more than this host's {host_mib} MiB; give less with --memory"
    )]
    TooMuch {
        /// How much.
        memory_mib: u64,
        /// The host's.
        host_mib: u64,
    },
    /// Out of range.
    #[error("{cpus} CPUs are not possible: a guest has 1 to {MAX_CPUS}; choose with --cpus")]
    Cpus {
        /// How many.
        cpus: u64,
    },
    /// An annotation that is no number.
    #[error("the annotation {key} is {value:?}, which is no number")]
    Annotation {
        /// Which.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// A limit that is none.
    #[error(
        "linux.resources.memory.limit in config.json is {limit}; give a number of bytes above 0, or -1 for none"
    )]
    Limit {
        /// The limit.
        limit: i64,
    },
    /// A list of the host's processors that is none.
    #[error(
        "linux.resources.cpu.cpus in config.json is {list:?}; give processors of the host such as 0-3,7"
    )]
    Processors {
        /// The list.
        list: String,
    },
    /// A member of a pod that may use more than all of the pod has.
    #[error(
        "linux.resources.memory.limit in config.json is {limit_mib} MiB, and the machine of the pod has {memory_mib} MiB: give less, or give the pod itself a limit, which sizes its machine (linux.resources.memory.limit of its sandbox, or the annotation {POD_MEMORY})"
    )]
    AbovePod {
        /// The member's.
        limit_mib: u64,
        /// The machine's.
        memory_mib: u64,
    },
    /// A new limit that the machine cannot reach.
    #[error(
        "a memory limit of {limit_mib} MiB is more than the {memory_mib} MiB of the container's machine, which does not grow: give less, or make the container anew with that limit"
    )]
    AboveMachine {
        /// The limit.
        limit_mib: u64,
        /// The machine's memory.
        memory_mib: u64,
    },
}

/// The size of the machine for a container, on a host with `host_mib` of memory.
///
/// # Errors
/// When it is none that a machine can have on this host.
pub fn size(spec: &Spec, role: &Role, request: Request, host_mib: u64) -> Result<Size, Error> {
    let memory_mib = match request.memory_mib {
        Some(memory_mib) => memory_mib,
        None => match (limit_mib(spec)?, role) {
            (Some(mib), _) => mib.saturating_add(GUEST_MEMORY_MIB),
            (None, Role::Sandbox) => POD_MEMORY_MIB.min(host_mib / 2).max(DEFAULT_MEMORY_MIB),
            (None, Role::First | Role::Member { .. }) => DEFAULT_MEMORY_MIB,
        },
    };
    if memory_mib < MIN_MEMORY_MIB {
        return Err(Error::TooLittle { memory_mib });
    }
    if memory_mib > host_mib {
        return Err(Error::TooMuch {
            memory_mib,
            host_mib,
        });
    }
    let cpus = match request.cpus {
        Some(cpus) => cpus,
        // A container may be allowed more than a machine can have.
        None => cpus(spec)?.unwrap_or(1).min(u64::from(MAX_CPUS)),
    };
    match u8::try_from(cpus) {
        Ok(cpus @ 1..=MAX_CPUS) => Ok(Size { cpus, memory_mib }),
        _ => Err(Error::Cpus { cpus }),
    }
}

/// Refuses a member of a pod that may use more memory than the pod's machine has: the limit would
/// never be reached, and whoever relies on it would find other members killed.
///
/// # Errors
/// When it does not fit, or is no limit.
pub fn fits(spec: &Spec, role: &Role, memory_mib: u64) -> Result<(), Error> {
    match (role, limit_mib(spec)?) {
        (Role::Member { .. }, Some(limit_mib)) if limit_mib > memory_mib => Err(Error::AbovePod {
            limit_mib,
            memory_mib,
        }),
        _ => Ok(()),
    }
}

/// Refuses new limits of a container that are above the memory of its machine.
///
/// # Errors
/// When they are.
pub fn limit_fits(resources: &Value, memory_mib: u64) -> Result<(), Error> {
    let limit = resources.pointer("/memory/limit").and_then(Value::as_i64);
    // None, and what is not to be changed, are not above 0.
    let limit = limit.and_then(|limit| u64::try_from(limit).ok());
    match limit.map(|limit| limit.div_ceil(1 << 20)) {
        Some(limit_mib) if limit_mib > memory_mib => Err(Error::AboveMachine {
            limit_mib,
            memory_mib,
        }),
        _ => Ok(()),
    }
}

/// The memory that config.json or the pod's annotation allows.
fn limit_mib(spec: &Spec) -> Result<Option<u64>, Error> {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let limit = resources
        .and_then(|resources| resources.memory().as_ref())
        .and_then(|memory| memory.limit());
    match limit {
        None | Some(-1) => Ok(annotation(spec, POD_MEMORY)?.map(|bytes| bytes.div_ceil(1 << 20))),
        Some(limit) if limit > 0 => Ok(Some((limit as u64).div_ceil(1 << 20))),
        Some(limit) => Err(Error::Limit { limit }),
    }
}

/// The CPUs that are allowed or promised.
fn cpus(spec: &Spec) -> Result<Option<u64>, Error> {
    let named = named_cpus(spec)?;
    let allowed = match quota_cpus(spec) {
        Some(cpus) => Some(cpus),
        None => pod_cpus(spec)?,
    };
    Ok(match (allowed, named) {
        (Some(allowed), Some(named)) => Some(allowed.min(named)),
        (allowed, named) => allowed.or(named),
    })
}

/// The CPUs of all containers of a pod.
fn pod_cpus(spec: &Spec) -> Result<Option<u64>, Error> {
    let [quota, period, shares] = POD_CPU.map(|key| annotation(spec, key));
    Ok(match (quota?, shares?) {
        (Some(quota), _) => Some(quota.div_ceil(period?.unwrap_or(PERIOD))),
        (None, Some(shares)) => Some(shares.div_ceil(CPU_SHARES)),
        (None, None) => None,
    })
}

/// How many of the host's processors config.json names.
fn named_cpus(spec: &Spec) -> Result<Option<u64>, Error> {
    let list = cpu(spec).and_then(|cpu| cpu.cpus().as_deref());
    let Some(list) = list.filter(|list| !list.trim().is_empty()) else {
        return Ok(None);
    };
    let named = processors(list).ok_or_else(|| Error::Processors {
        list: list.chars().take(40).collect(),
    })?;
    Ok(Some(named.len() as u64))
}

/// The processors in a list such as `0-3,7`.
fn processors(list: &str) -> Option<BTreeSet<usize>> {
    let mut all = BTreeSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let number: usize = text.trim().parse().ok()?;
            (number < MAX_HOST_CPUS).then_some(number)
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

/// The number in an annotation; 0, or one below, is what clients write for none.
fn annotation(spec: &Spec, key: &'static str) -> Result<Option<u64>, Error> {
    let annotations = spec.annotations().as_ref();
    let Some(value) = annotations.and_then(|annotations| annotations.get(key)) else {
        return Ok(None);
    };
    let number: i64 = value.parse().map_err(|_| Error::Annotation {
        key,
        value: value.chars().take(40).collect(),
    })?;
    Ok(u64::try_from(number).ok().filter(|number| *number > 0))
}

fn cpu(spec: &Spec) -> Option<&LinuxCpu> {
    let resources = spec.linux().as_ref()?.resources().as_ref()?;
    resources.cpu().as_ref()
}

fn quota_cpus(spec: &Spec) -> Option<u64> {
    let cpu = cpu(spec)?;
    let quota = u64::try_from(cpu.quota()?)
        .ok()
        .filter(|quota| *quota > 0)?;
    let period = cpu.period().filter(|period| *period > 0);
    let period = period.unwrap_or(PERIOD);
    Some(quota.div_ceil(period))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(resources: serde_json::Value) -> Spec {
        let config = json!({"ociVersion": "1.0.2", "linux": {"resources": resources}});
        serde_json::from_value(config).expect("a spec")
    }

    fn of(resources: serde_json::Value, request: Request) -> Result<Size, Error> {
        size(&spec(resources), &Role::First, request, 4096)
    }

    fn pod(annotations: serde_json::Value, host_mib: u64) -> Result<(u8, u64), Error> {
        // What containerd writes for the process that does nothing.
        let resources = json!({"cpu": {"shares": 2}});
        let config = json!({
            "ociVersion": "1.0.2",
            "linux": {"resources": resources},
            "annotations": annotations
        });
        let spec = serde_json::from_value(config).expect("a spec");
        let size = size(&spec, &Role::Sandbox, Request::default(), host_mib)?;
        Ok((size.cpus, size.memory_mib))
    }

    #[test]
    fn a_pods_machine_has_the_size_that_its_annotations_say() {
        let annotations = |memory: &str, quota: &str, shares: &str| {
            json!({
                "io.kubernetes.cri.sandbox-memory": memory,
                "io.kubernetes.cri.sandbox-cpu-quota": quota,
                "io.kubernetes.cri.sandbox-cpu-period": "100000",
                "io.kubernetes.cri.sandbox-cpu-shares": shares
            })
        };
        let limited = annotations("629145600", "250000", "102");
        assert_eq!(pod(limited, 4096), Ok((3, 664)));
        let promised = annotations("0", "0", "2048");
        assert_eq!(pod(promised, 4096), Ok((2, 1024)));
        assert_eq!(pod(json!({}), 1000), Ok((1, 500)));
        let error = pod(annotations("much", "0", "0"), 4096).expect_err("refused");
        assert!(
            error.to_string().contains("sandbox-memory is \"much\""),
            "{error}"
        );
    }

    #[test]
    fn a_member_may_use_what_its_pods_machine_has_and_no_more() {
        let sandbox = crate::id::ContainerId::parse("infra").expect("a name");
        let member = Role::Member { sandbox };
        let limit = |mib: i64| spec(json!({"memory": {"limit": mib << 20}}));
        assert_eq!(fits(&limit(256), &member, 256), Ok(()));
        assert_eq!(fits(&spec(json!({})), &member, 256), Ok(()));
        let error = fits(&limit(257), &member, 256).expect_err("refused");
        let words = error.to_string();
        assert!(
            words.contains("is 257 MiB") && words.contains("has 256 MiB"),
            "{words}"
        );
        // The one whose machine it is has been asked already how large it is to be.
        assert_eq!(fits(&limit(257), &Role::First, 256), Ok(()));
    }

    #[test]
    fn a_new_limit_may_be_what_the_machine_has_and_no_more() {
        let limit = |bytes: i64| json!({"memory": {"limit": bytes}});
        let fit = [limit(256 << 20), limit(-1), limit(0), json!({})];
        for resources in fit {
            assert_eq!(limit_fits(&resources, 256), Ok(()), "{resources}");
        }
        let above = limit_fits(&limit((256 << 20) + 1), 256).expect_err("refused");
        let words = above.to_string();
        assert!(
            words.contains("257 MiB") && words.contains("256 MiB"),
            "{words}"
        );
        assert!(limit_fits(&limit(i64::MAX), 256).is_err());
    }

    #[test]
    fn without_limits_a_machine_has_the_documented_size() {
        let expected = Size {
            cpus: 1,
            memory_mib: 256,
        };
        assert_eq!(of(json!({}), Request::default()), Ok(expected));
    }

    #[test]
    fn limits_of_the_configuration_size_the_machine() {
        let limits = json!({
            "memory": {"limit": (512_i64 << 20) + 1},
            "cpu": {"quota": 150_000, "period": 100_000}
        });
        let expected = Size {
            cpus: 2,
            memory_mib: 513 + 64,
        };
        assert_eq!(of(limits, Request::default()), Ok(expected));
    }

    #[test]
    fn a_machine_has_as_many_processors_as_it_may_use_of_the_hosts() {
        let cpus = |cpu| of(json!({ "cpu": cpu }), Request::default()).map(|size| size.cpus);
        assert_eq!(cpus(json!({"cpus": "2"})), Ok(1));
        assert_eq!(cpus(json!({"cpus": "0-2, 7,1-3"})), Ok(5));
        assert_eq!(cpus(json!({"cpus": "0-8191"})), Ok(MAX_CPUS));
        assert_eq!(cpus(json!({"cpus": ""})), Ok(1));
        assert_eq!(cpus(json!({"cpus": "0-3", "quota": 200_000})), Ok(2));
        assert_eq!(cpus(json!({"cpus": "5", "quota": 200_000})), Ok(1));
        for list in ["a", "3-1", "1-", ",", "0-8192", "-1", "1:2"] {
            let refused = cpus(json!({"cpus": list}));
            let list = list.to_owned();
            assert_eq!(refused, Err(Error::Processors { list }));
        }
    }

    #[test]
    fn flags_come_before_the_configuration() {
        let request = Request {
            memory_mib: Some(100),
            cpus: Some(3),
        };
        let limits = json!({"memory": {"limit": 1_i64 << 30}, "cpu": {"quota": 100}});
        let expected = Size {
            cpus: 3,
            memory_mib: 100,
        };
        assert_eq!(of(limits, request), Ok(expected));
    }

    #[test]
    fn memory_of_0_or_above_the_hosts_is_refused_with_both_numbers() {
        let ask = |memory_mib| Request {
            memory_mib: Some(memory_mib),
            cpus: None,
        };
        assert_eq!(
            of(json!({}), ask(0)),
            Err(Error::TooLittle { memory_mib: 0 })
        );
        let error = of(json!({}), ask(5000)).expect_err("refused");
        assert!(error.to_string().contains("5000 MiB"), "{error}");
        assert!(error.to_string().contains("4096 MiB"), "{error}");
        let limit = json!({"memory": {"limit": 0}});
        assert_eq!(
            of(limit, Request::default()),
            Err(Error::Limit { limit: 0 })
        );
    }

    #[test]
    fn cpus_out_of_range_are_refused_and_quotas_are_cut() {
        for cpus in [0, 33, 1 << 40] {
            let request = Request {
                memory_mib: None,
                cpus: Some(cpus),
            };
            assert_eq!(of(json!({}), request), Err(Error::Cpus { cpus }));
        }
        let much = json!({"cpu": {"quota": 100_000_000}});
        assert_eq!(of(much, Request::default()).map(|size| size.cpus), Ok(32));
    }
}
