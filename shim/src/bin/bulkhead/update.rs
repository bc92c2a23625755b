//! `bulkhead update`: changes the limits of a container.

use std::{fs, io, path::Path};

use anyhow::{Context as _, bail};
use serde_json::{Map, Value, json};
use shim::{id::ContainerId, oci::Request};

use super::{
    cli::{Global, UpdateArgs},
    home,
};

/// Changes them.
pub(crate) fn update(global: &Global, args: &UpdateArgs) -> anyhow::Result<u8> {
    let id = ContainerId::parse(&args.id)?;
    for (flag, value) in [
        ("--l3-cache-schema", &args.l3_cache_schema),
        ("--mem-bw-schema", &args.mem_bw_schema),
    ] {
        if value.as_deref().is_some_and(|value| !value.is_empty()) {
            bail!("{flag} is not supported: a guest has no share of caches to give; leave it out");
        }
    }
    let resources = match &args.resources {
        Some(path) => read(path)?,
        None => from_flags(args),
    };
    let request = Request::Update {
        id: id.to_string(),
        resources,
    };
    home(global)?.ask(&id, &request)?;
    Ok(0)
}

fn read(path: &Path) -> anyhow::Result<Value> {
    let text = match path == Path::new("-") {
        true => io::read_to_string(io::stdin()).context("cannot read standard input")?,
        false => {
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?
        }
    };
    let mut resources: Value = serde_json::from_str(&text)
        .with_context(|| format!("{} is no description of limits", path.display()))?;
    drop_zeroes(&mut resources);
    Ok(resources)
}

/// Other runtimes take 0 and "" for what is not to be changed, and tools send all of them.
fn drop_zeroes(value: &mut Value) {
    if let Some(object) = value.as_object_mut() {
        object.values_mut().for_each(drop_zeroes);
        object.retain(|_, value| {
            let nothing = value.is_null()
                || value == &json!(0)
                || value == &json!("")
                || value.as_object().is_some_and(Map::is_empty);
            !nothing
        });
    }
}

fn from_flags(args: &UpdateArgs) -> Value {
    let mut resources = json!({
        "memory": {
            "limit": args.memory.map(|limit| limit.0),
            "reservation": args.memory_reservation.map(|limit| limit.0),
            "swap": args.memory_swap.map(|limit| limit.0),
        },
        "cpu": {
            "shares": args.cpu_share,
            "quota": args.cpu_quota,
            "period": args.cpu_period,
            "burst": args.cpu_burst,
            "idle": args.cpu_idle,
            "realtimeRuntime": args.cpu_rt_runtime,
            "realtimePeriod": args.cpu_rt_period,
            "cpus": args.cpuset_cpus,
            "mems": args.cpuset_mems,
        },
        "pids": {"limit": args.pids_limit},
        "blockIO": {"weight": args.blkio_weight},
    });
    drop_zeroes(&mut resources);
    resources
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_zero_or_empty_stays_as_it_is() {
        let mut resources = json!({
            "memory": {"limit": 1 << 20, "swap": 0},
            "cpu": {"shares": 0, "cpus": ""},
            "pids": {"limit": -1}
        });
        drop_zeroes(&mut resources);
        let expected = json!({"memory": {"limit": 1 << 20}, "pids": {"limit": -1}});
        assert_eq!(resources, expected);
    }
}
