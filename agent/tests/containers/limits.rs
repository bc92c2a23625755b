//! Limits and counters, which need the controllers of cgroup v2: this machine
//! may have given them to version 1.
#![expect(clippy::unwrap_used, reason = "a failure is what a test tells")]

use protocol::agent as message;
use serde_json::json;
use ttrpc::Code;

use crate::guest::{Guest, failure, spec, stay};

stories! {
    limits_are_told_to_the_kernel_and_in_the_counters,
    limits_are_set_anew_all_or_none,
    a_container_that_runs_out_of_memory_is_an_event,
    a_limit_below_what_is_in_use_can_be_refused,
}

/// Whether this machine's hierarchy of version 2 has the controllers of memory, CPU and processes.
pub(crate) fn can_run() -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let hierarchy = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"));
    let controllers = hierarchy.and_then(|fields| {
        std::fs::read_to_string(format!("{}/cgroup.controllers", fields[1])).ok()
    });
    controllers.is_some_and(|text| {
        ["memory", "cpu", "pids"]
            .iter()
            .all(|wanted| text.split_whitespace().any(|have| have == *wanted))
    })
}

async fn limits_are_told_to_the_kernel_and_in_the_counters(guest: &Guest) {
    let mut spec = spec(&["sleep", "1000"]);
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 67_108_864, "reservation": 33_554_432, "swap": 134_217_728},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
        "pids": {"limit": 40},
        "unified": {"memory.high": "50331648"},
    });
    stay(guest, &spec).await;
    let files =
        "cd /sys/fs/cgroup; cat memory.max memory.low cpu.max cpu.weight pids.max memory.high";
    assert_eq!(
        guest.sh_in("c", files).await,
        "67108864\n33554432\n50000 100000\n20\n40\n50331648\n"
    );
    let stats = guest.stats("c").await;
    assert_eq!((stats.memory_max_bytes, stats.pids_max), (67_108_864, 40));
    assert!(stats.memory_current_bytes > 0 && stats.memory_current_bytes < 67_108_864);
    assert_eq!(stats.pids_current, 1);
    for name in [
        "anon",
        "file",
        "slab",
        "pgfault",
        "inactive_anon",
        "unevictable",
    ] {
        assert!(stats.memory_stat.contains_key(name), "{name}");
    }
    assert_eq!(stats.memory_events.get("oom_kill"), Some(&0));
    assert!(stats.cpu_usage_us > 0 && stats.cpu_usage_us >= stats.cpu_user_us);
}

async fn limits_are_set_anew_all_or_none(guest: &Guest) {
    let mut spec = spec(&["sleep", "1000"]);
    let devices = json!([{"allow": false, "access": "rwm"}]);
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 67_108_864},
        "cpu": {"quota": 50_000, "period": 100_000},
        "pids": {"limit": 40},
        "devices": devices,
    });
    stay(guest, &spec).await;
    let resources = json!({
        "memory": {"limit": 100_663_296}, "cpu": {"quota": 70_000}, "pids": {"limit": 50},
        "devices": devices,
    });
    guest.update("c", &resources).await.unwrap();
    let files = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max";
    let updated = "100663296\n70000 100000\n50\n";
    assert_eq!(guest.sh_in("c", files).await, updated);
    let bad = json!({"memory": {"limit": 50_331_648}, "unified": {"pids.max": "many"}});
    let (_, text) = failure(guest.update("c", &bad).await);
    assert!(
        text.starts_with("cannot set pids.max to \"many\""),
        "{text}"
    );
    assert_eq!(
        guest.sh_in("c", files).await,
        updated,
        "nothing of it stays"
    );
    guest
        .update("c", &json!({"cpu": {"period": 50_000}}))
        .await
        .unwrap();
    assert_eq!(
        guest.sh_in("c", "cat /sys/fs/cgroup/cpu.max").await,
        "70000 50000\n"
    );
    for (resources, start) in [
        (
            json!({"devices": [{"allow": true}]}),
            "linux.resources.devices differs",
        ),
        (
            json!({"rdma": {"mlx5": {}}}),
            "linux.resources.rdma is not supported",
        ),
        (
            json!({"memory": {"swappiness": 9}}),
            "linux.resources.memory.swappiness is not",
        ),
    ] {
        let (code, text) = failure(guest.update("c", &resources).await);
        assert!(text.starts_with(start), "{text}");
        assert_eq!(code, Code::INVALID_ARGUMENT);
    }
}

async fn a_container_that_runs_out_of_memory_is_an_event(guest: &Guest) {
    let mut spec = spec(&["sh", "-c", "tail /dev/zero; sleep 1000"]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 16_777_216, "swap": 16_777_216}});
    stay(guest, &spec).await;
    let events = guest.next_events(0).await;
    assert_eq!((events.events.len(), events.lost), (1, 0));
    assert_eq!(events.events[0].container_id, "c");
    assert!(events.events[0].at_ns > 0);
    let Some(message::event::What::OutOfMemory(oom)) = &events.events[0].what else {
        panic!("{events:?}");
    };
    assert_eq!(oom.kills, 1);
    assert!(guest.state("c", "").await.unwrap().oom_killed);
    guest.signal("c", 9, false).await.unwrap();
    assert!(guest.wait("c", "").await.unwrap().oom_killed);
}

async fn a_limit_below_what_is_in_use_can_be_refused(guest: &Guest) {
    stay(guest, &spec(&["sleep", "1000"])).await;
    let used = "dd if=/dev/zero of=/dev/shm/file bs=1M count=32 2>/dev/null; echo";
    guest.sh_in("c", used).await;
    let resources = json!({"memory": {"limit": 8_388_608, "checkBeforeUpdate": true}});
    let (code, text) = failure(guest.update("c", &resources).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(
        text.starts_with("linux.resources.memory.limit is 8388608, and"),
        "{text}"
    );
    assert_eq!(
        guest.sh_in("c", "cat /sys/fs/cgroup/memory.max").await,
        "max\n"
    );
}
