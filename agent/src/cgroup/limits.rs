//! The configuration's resources as writes to files of a cgroup.

use super::Error;
use crate::spec::{BlockIo, Cpu, Memory, Resources, Throttle, WeightDevice};

/// One write: the file and what is written.
pub(super) type Write = (String, String);

/// What has to be written for `resources`, in order.
pub(super) fn writes(resources: &Resources) -> Result<Vec<Write>, Error> {
    let mut writes = Vec::new();
    memory(&resources.memory, &mut writes)?;
    cpu(&resources.cpu, &mut writes)?;
    block_io(&resources.block_io, &mut writes)?;
    if let Some(limit) = resources.pids.limit.filter(|limit| *limit != 0) {
        writes.push(write("pids.max", maximum(limit)));
    }
    for page in &resources.hugepage_limits {
        let size = &page.page_size;
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(value(
                "hugepageLimits.pageSize",
                size,
                "it is a size such as 2MB",
            ));
        }
        writes.push((format!("hugetlb.{size}.max"), page.limit.to_string()));
        writes.push((format!("hugetlb.{size}.rsvd.max"), page.limit.to_string()));
    }
    for (file, text) in &resources.unified {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.".contains(&b);
        if !file.contains('.') || !file.bytes().all(plain) || file.contains("..") {
            return Err(value("unified", file, "it is no name of a cgroup's file"));
        }
        if file.starts_with("cgroup.") && !file.starts_with("cgroup.max.") {
            return Err(value(
                "unified",
                file,
                "the agent itself sets those of cgroup, but for cgroup.max.depth and cgroup.max.descendants",
            ));
        }
        writes.push((file.clone(), text.clone()));
    }
    Ok(writes)
}

fn memory(memory: &Memory, writes: &mut Vec<Write>) -> Result<(), Error> {
    let limit = memory.limit.filter(|limit| *limit != 0);
    if let Some(limit) = limit {
        writes.push(write("memory.max", maximum(limit)));
    }
    if let Some(reservation) = memory.reservation.filter(|n| *n != 0) {
        writes.push(write("memory.low", maximum(reservation)));
    }
    match memory.swap.filter(|swap| *swap != 0) {
        None => {}
        Some(-1) => writes.push(write("memory.swap.max", "max")),
        // The configuration counts memory and swap together, the kernel swap alone.
        Some(both) => match limit.filter(|limit| *limit > 0) {
            Some(limit) if both >= limit => {
                writes.push(write("memory.swap.max", (both - limit).to_string()));
            }
            _ => {
                return Err(value(
                    "memory.swap",
                    &both.to_string(),
                    "it needs a memory.limit that is not above it",
                ));
            }
        },
    }
    Ok(())
}

fn cpu(cpu: &Cpu, writes: &mut Vec<Write>) -> Result<(), Error> {
    if let Some(idle) = cpu.idle {
        writes.push(write("cpu.idle", idle.to_string()));
    }
    // The kernel takes no weight for who runs only when nothing else does.
    let shares = cpu
        .shares
        .filter(|shares| *shares != 0 && cpu.idle != Some(1));
    if let Some(shares) = shares {
        writes.push(write("cpu.weight", weight(shares).to_string()));
    }
    let period = cpu.period.filter(|period| *period != 0);
    let quota = cpu.quota.filter(|quota| *quota != 0);
    if cpu.burst.is_some() {
        // An earlier one might be above the new quota.
        writes.push(write("cpu.max.burst", "0"));
    }
    let maximum = maximum(quota.unwrap_or(-1));
    match (quota, period) {
        (None, None) => {}
        (_, Some(period)) => writes.push(write("cpu.max", format!("{maximum} {period}"))),
        // The kernel keeps the period that it has.
        (Some(_), None) => writes.push(write("cpu.max", maximum)),
    }
    if let Some(burst) = cpu.burst.filter(|burst| *burst != 0) {
        writes.push(write("cpu.max.burst", burst.to_string()));
    }
    for (file, list, field) in [
        ("cpuset.cpus", &cpu.cpus, "cpu.cpus"),
        ("cpuset.mems", &cpu.mems, "cpu.mems"),
    ] {
        if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
            if !list
                .bytes()
                .all(|b| b.is_ascii_digit() || b"-, ".contains(&b))
            {
                return Err(value(field, list, "it is a list such as 0-3,7"));
            }
            writes.push(write(file, list));
        }
    }
    Ok(())
}

fn block_io(io: &BlockIo, writes: &mut Vec<Write>) -> Result<(), Error> {
    if let Some(weight) = io.weight.filter(|weight| *weight != 0) {
        let weight = in_range(weight, "blockIO.weight")?;
        writes.push(write("io.weight", format!("default {}", io_weight(weight))));
    }
    for device in &io.weight_device {
        let WeightDevice {
            major,
            minor,
            weight,
            leaf_weight,
        } = device;
        if leaf_weight.is_some_and(|weight| weight != 0) {
            return Err(value(
                "blockIO.weightDevice.leafWeight",
                &leaf_weight.unwrap_or(0).to_string(),
                "cgroup v2 has no weights of leaves; leave it out",
            ));
        }
        if let Some(weight) = weight.filter(|weight| *weight != 0) {
            let weight = io_weight(in_range(weight, "blockIO.weightDevice.weight")?);
            writes.push(write("io.weight", format!("{major}:{minor} {weight}")));
        }
    }
    let limits: [(&str, &[Throttle]); 4] = [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ];
    for (key, throttles) in limits {
        for throttle in throttles {
            let Throttle { major, minor, rate } = throttle;
            let rate = if *rate == 0 {
                "max".to_owned()
            } else {
                rate.to_string()
            };
            writes.push(write("io.max", format!("{major}:{minor} {key}={rate}")));
        }
    }
    Ok(())
}

fn in_range(weight: u16, field: &str) -> Result<u16, Error> {
    if (10..=1000).contains(&weight) {
        Ok(weight)
    } else {
        Err(value(field, &weight.to_string(), "it is 10 to 1000"))
    }
}

fn write(file: &str, text: impl Into<String>) -> Write {
    (file.to_owned(), text.into())
}

fn value(field: &str, text: &str, reason: &'static str) -> Error {
    Error::Value {
        field: format!("linux.resources.{field}"),
        value: text.to_owned(),
        reason,
    }
}

/// A limit as the kernel reads it; below 0 is none.
fn maximum(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

/// cgroup v1's CPU shares, 2 to 262144, on v2's scale of weights, 1 to 10000: the line through
/// both ends, which other runtimes use too.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9_999 / 262_142
}

/// cgroup v1's I/O weight, 10 to 1000, on v2's scale, 1 to 10000.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight) - 10) * 9_999 / 990
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(json: &str) -> Result<Vec<Write>, Error> {
        writes(&serde_json::from_str(json).unwrap())
    }

    fn one(json: &str) -> Write {
        let mut writes = of(json).unwrap();
        assert_eq!(writes.len(), 1);
        writes.remove(0)
    }

    #[test]
    fn limits_become_the_kernels_files() {
        for (json, file, text) in [
            (r#"{"memory":{"limit":1048576}}"#, "memory.max", "1048576"),
            (r#"{"memory":{"limit":-1}}"#, "memory.max", "max"),
            (
                r#"{"cpu":{"quota":50000,"period":100000}}"#,
                "cpu.max",
                "50000 100000",
            ),
            (r#"{"cpu":{"period":20000}}"#, "cpu.max", "max 20000"),
            (r#"{"cpu":{"quota":20000}}"#, "cpu.max", "20000"),
            (r#"{"cpu":{"quota":-1}}"#, "cpu.max", "max"),
            (r#"{"cpu":{"shares":1024,"idle":1}}"#, "cpu.idle", "1"),
            (
                r#"{"blockIO":{"weightDevice":[{"major":254,"minor":0,"weight":1000}]}}"#,
                "io.weight",
                "254:0 10000",
            ),
            (r#"{"cpu":{"cpus":"0-1"}}"#, "cpuset.cpus", "0-1"),
            (r#"{"pids":{"limit":32}}"#, "pids.max", "32"),
            (r#"{"pids":{"limit":-1}}"#, "pids.max", "max"),
            (r#"{"blockIO":{"weight":10}}"#, "io.weight", "default 1"),
            (
                r#"{"blockIO":{"throttleReadBpsDevice":[{"major":254,"minor":0,"rate":9}]}}"#,
                "io.max",
                "254:0 rbps=9",
            ),
            (r#"{"unified":{"memory.high":"1G"}}"#, "memory.high", "1G"),
        ] {
            assert_eq!(one(json), write(file, text), "{json}");
        }
    }

    #[test]
    fn swap_is_what_goes_beyond_memory() {
        let writes = of(r#"{"memory":{"limit":100,"swap":150}}"#).unwrap();
        assert_eq!(writes[1], write("memory.swap.max", "50"));
        assert!(of(r#"{"memory":{"limit":100,"swap":50}}"#).is_err());
        assert!(of(r#"{"memory":{"swap":50}}"#).is_err());
    }

    #[test]
    fn a_burst_is_set_behind_the_quota_that_it_needs() {
        let writes = of(r#"{"cpu":{"quota":1000,"burst":500}}"#).unwrap();
        let expected = [
            write("cpu.max.burst", "0"),
            write("cpu.max", "1000"),
            write("cpu.max.burst", "500"),
        ];
        assert_eq!(writes, expected);
    }

    #[test]
    fn huge_pages_are_limited_in_use_and_in_reserve() {
        let writes = of(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":7}]}"#).unwrap();
        let expected = [
            write("hugetlb.2MB.max", "7"),
            write("hugetlb.2MB.rsvd.max", "7"),
        ];
        assert_eq!(writes, expected);
    }

    #[test]
    fn the_weight_of_a_leaf_is_refused() {
        let json = r#"{"blockIO":{"weightDevice":[{"major":1,"minor":0,"leafWeight":10}]}}"#;
        let text = of(json).unwrap_err().to_string();
        assert!(
            text.starts_with("linux.resources.blockIO.weightDevice.leafWeight is"),
            "{text}"
        );
    }

    #[test]
    fn the_ends_of_both_scales_of_weight_meet() {
        assert_eq!((weight(2), weight(262_144)), (1, 10_000));
        assert_eq!((io_weight(10), io_weight(1000)), (1, 10_000));
    }

    #[test]
    fn names_that_are_no_files_of_a_cgroup_are_refused() {
        for name in ["../x", "a/b.c", "memory", "memory..max", "cgroup.procs"] {
            assert!(
                of(&format!(r#"{{"unified":{{"{name}":"1"}}}}"#)).is_err(),
                "{name}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_write_leaves_the_cgroups_directory(name in ".*", size in ".*") {
            let resources = Resources {
                unified: [(name, String::new())].into(),
                hugepage_limits: crate::spec::List(vec![crate::spec::HugepageLimit {
                    page_size: size,
                    limit: 1,
                }]),
                ..Resources::default()
            };
            for (file, _) in writes(&resources).unwrap_or_default() {
                prop_assert!(!file.contains('/') && !file.contains(".."));
            }
        }
    }
}
