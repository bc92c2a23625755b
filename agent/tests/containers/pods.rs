//! What the containers of a pod share, and what stands for the pod itself.
#![expect(clippy::unwrap_used, reason = "a failure is what a test tells")]

use protocol::{Namespace, agent as message, agent::LifeState};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::guest::{Guest, cgroup_of, failure, process, spec, stay};

stories! {
    a_placeholder_stands_for_the_pod_without_a_process,
    containers_share_the_pods_ipc_uts_and_shm,
    containers_that_share_the_pods_pids_see_each_other,
    the_pods_pids_end_with_its_placeholder,
    a_container_joins_the_namespaces_of_another,
    a_namespace_of_nobody_is_refused,
    a_process_that_waits_for_its_start_is_ended_by_signals,
    the_states_of_a_life_are_told,
    a_wait_may_come_before_the_start,
    processes_are_told_with_their_arguments,
    nothing_starts_in_a_paused_container,
    requests_may_come_twice_at_once,
    a_root_of_layers_takes_writes_in_memory,
}

/// A configuration whose namespaces of `kinds` are the pod's.
fn sharing(args: &[&str], kinds: &[&str]) -> Value {
    let mut spec = spec(args);
    for kind in kinds {
        join(&mut spec, kind, &Namespace::Pod(kind));
    }
    spec
}

fn join(spec: &mut Value, kind: &str, namespace: &Namespace<'_>) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != *kind);
    namespaces.push(json!({"type": kind, "path": namespace.to_string()}));
}

fn pause() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "hostname": "the-pod",
        "process": {"args": ["/pause"], "cwd": "/"},
        "linux": {
            "cgroupsPath": cgroup_of("pause"),
            "sysctl": {"kernel.msgmax": "9000"},
        }
    })
}

async fn a_placeholder_stands_for_the_pod_without_a_process(guest: &Guest) {
    assert_eq!(guest.placeholder("pod", &pause()).await.unwrap(), 0);
    assert!(guest.pids("pod").await.is_empty());
    assert_eq!(guest.stats("pod").await.pids_current, 0);
    let state = guest.state("pod", "").await.unwrap();
    assert_eq!(state.state, LifeState::LIFE_STATE_RUNNING.into());
    let (code, text) = failure(guest.exec("pod", "e", &process(&["true"])).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    let (code, _) = failure(guest.delete("pod", "", false).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    guest.signal("pod", 10, false).await.unwrap();
    let (status, ended) = tokio::join!(guest.wait("pod", ""), guest.signal("pod", 15, false));
    ended.unwrap();
    assert_eq!(status.unwrap().exit_status, 0);
    guest.delete("pod", "", false).await.unwrap();
    guest.placeholder("pod", &pause()).await.unwrap();
    guest.signal("pod", 9, true).await.unwrap();
    assert_eq!(guest.wait("pod", "").await.unwrap().exit_status, 137);
    guest.delete("pod", "", false).await.unwrap();
}

async fn containers_share_the_pods_ipc_uts_and_shm(guest: &Guest) {
    guest.placeholder("pod", &pause()).await.unwrap();
    let mut spec = sharing(&["sleep", "1000"], &["ipc", "uts", "network"]);
    spec["hostname"] = Value::Null;
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| mount["destination"] != "/dev/shm" && mount["destination"] != "/sys");
    mounts.push(
        json!({"destination": "/dev/shm", "type": "bind", "source": protocol::POD_SHM,
                       "options": ["rbind", "rw"]}),
    );
    guest.stay_as("a", &spec).await;
    guest.stay_as("b", &spec).await;
    assert_eq!(guest.sh_in("a", "hostname").await, "the-pod\n");
    assert_eq!(
        guest.sh_in("b", "cat /proc/sys/kernel/msgmax").await,
        "9000\n"
    );
    let namespaces = "for n in ipc uts net; do readlink /proc/self/ns/$n; done";
    assert_eq!(
        guest.sh_in("a", namespaces).await,
        guest.sh_in("b", namespaces).await
    );
    guest.sh_in("a", "echo shared > /dev/shm/file").await;
    assert_eq!(
        guest
            .sh_in(
                "b",
                "cat /dev/shm/file; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2"
            )
            .await,
        "shared\n65536\n"
    );
    assert_eq!(guest.sh_in("b", "pidof sleep | wc -w").await, "1\n");
}

async fn containers_that_share_the_pods_pids_see_each_other(guest: &Guest) {
    guest.placeholder("pod", &pause()).await.unwrap();
    guest
        .stay_as("a", &sharing(&["sleep", "1001"], &["pid"]))
        .await;
    guest
        .stay_as("b", &sharing(&["sleep", "1002"], &["pid"]))
        .await;
    let seen = guest
        .sh_in("a", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        .await;
    assert!(
        seen.contains("sleep 1001") && seen.contains("sleep 1002"),
        "{seen}"
    );
    // An orphan's end is collected by the first process, which does nothing else.
    let orphan = "zombies() { cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '; }; \
                  (sh -c 'sleep 0.1' &); sleep 0.5; i=0; \
                  while [ $(zombies) != 0 ] && [ $((i += 1)) -lt 50 ]; do sleep 0.1; done; \
                  zombies || true";
    assert_eq!(guest.sh_in("b", orphan).await, "0\n");
    assert_eq!(
        guest
            .sh_in("b", "kill -9 1; kill -15 1; test -d /proc/1 && echo stays")
            .await,
        "stays\n"
    );
    let details = guest.details("a").await;
    assert_eq!(details.len(), 1);
    assert!(details[0].container_pid > 1);
    guest.delete("a", "", true).await.unwrap();
    assert_eq!(
        guest.state("b", "").await.unwrap().state,
        LifeState::LIFE_STATE_RUNNING.into()
    );
}

async fn the_pods_pids_end_with_its_placeholder(guest: &Guest) {
    guest.placeholder("pod", &pause()).await.unwrap();
    guest
        .stay_as("a", &sharing(&["sleep", "1001"], &["pid"]))
        .await;
    guest.signal("pod", 9, false).await.unwrap();
    assert_eq!(guest.wait("a", "").await.unwrap().exit_status, 137);
    guest.delete("a", "", false).await.unwrap();
    guest.delete("pod", "", false).await.unwrap();
    guest
        .stay_as("a", &sharing(&["sleep", "1001"], &["pid"]))
        .await;
}

async fn a_container_joins_the_namespaces_of_another(guest: &Guest) {
    guest.stay_as("a", &spec(&["sleep", "1000"])).await;
    let mut spec = spec(&["sleep", "2000"]);
    spec["hostname"] = Value::Null;
    for kind in ["ipc", "uts", "network", "pid", "cgroup"] {
        join(&mut spec, kind, &Namespace::Container { id: "a", kind });
    }
    guest.stay_as("b", &spec).await;
    let namespaces =
        "for n in ipc uts net pid cgroup; do readlink /proc/self/ns/$n; done; hostname";
    assert_eq!(
        guest.sh_in("a", namespaces).await,
        guest.sh_in("b", namespaces).await
    );
    assert_eq!(guest.sh_in("a", "pidof sleep | wc -w").await, "2\n");
    guest.signal("a", 9, false).await.unwrap();
    assert_eq!(
        guest.wait("b", "").await.unwrap().exit_status,
        137,
        "its first process has ended"
    );
}

async fn a_namespace_of_nobody_is_refused(guest: &Guest) {
    let refused = async |kind: &str, namespace: Namespace<'_>| {
        let mut spec = spec(&["true"]);
        join(&mut spec, kind, &namespace);
        failure(guest.run_with(&spec, b"").await)
    };
    let (code, text) = refused(
        "ipc",
        Namespace::Container {
            id: "nobody",
            kind: "ipc",
        },
    )
    .await;
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        text.contains("there is no running container nobody"),
        "{text}"
    );
    let (_, text) = refused("cgroup", Namespace::Pod("cgroup")).await;
    assert!(
        text.contains("is no namespace of the type \"cgroup\""),
        "{text}"
    );
    let (_, text) = refused("uts", Namespace::Pod("ipc")).await;
    assert!(
        text.contains("is no namespace of the type \"uts\""),
        "{text}"
    );
}

async fn a_process_that_waits_for_its_start_is_ended_by_signals(guest: &Guest) {
    let spec = spec(&["true"]);
    guest
        .create_with("c", &spec, message::Streams::new())
        .await
        .unwrap();
    guest.signal("c", 28, false).await.unwrap();
    assert_eq!(
        guest.state("c", "").await.unwrap().state,
        LifeState::LIFE_STATE_CREATED.into()
    );
    guest.signal("c", 15, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 143);
    let (code, text) = failure(guest.start_process("c", "").await);
    assert_eq!(
        (code, text.as_str()),
        (
            Code::FAILED_PRECONDITION,
            "the process has ended with status 143"
        )
    );
    guest.delete("c", "", false).await.unwrap();
}

async fn the_states_of_a_life_are_told(guest: &Guest) {
    let life = async || {
        guest
            .state("c", "")
            .await
            .unwrap()
            .state
            .enum_value()
            .unwrap()
    };
    let spec = spec(&["sleep", "1000"]);
    let made = guest.create_with("c", &spec, message::Streams::new());
    let pid = made.await.unwrap();
    assert_eq!(life().await, LifeState::LIFE_STATE_CREATED);
    guest.start_process("c", "").await.unwrap();
    assert_eq!(life().await, LifeState::LIFE_STATE_RUNNING);
    for _ in 0..2 {
        guest.pause("c", true).await.unwrap();
        assert_eq!(life().await, LifeState::LIFE_STATE_PAUSED);
    }
    guest.pause("c", false).await.unwrap();
    guest.signal("c", 9, true).await.unwrap();
    guest.wait("c", "").await.unwrap();
    let state = guest.state("c", "").await.unwrap();
    assert_eq!(state.state, LifeState::LIFE_STATE_STOPPED.into());
    assert_eq!((state.pid, state.exit_status), (pid, 137));
    assert!(state.exited_at_ns > 0 && !state.oom_killed);
}

async fn a_wait_may_come_before_the_start(guest: &Guest) {
    stay(guest, &spec(&["sleep", "1000"])).await;
    let mut request = message::ExecProcessRequest::new();
    request.container_id = "c".into();
    request.exec_id = "e".into();
    request.process = process(&["sh", "-c", "exit 4"]).to_string().into_bytes();
    let context = ttrpc::context::with_timeout(30_000_000_000);
    guest
        .client()
        .exec_process(context, &request)
        .await
        .unwrap();
    let (status, ()) = tokio::join!(guest.wait("c", "e"), async {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        guest.start_process("c", "e").await.unwrap();
    });
    assert_eq!(status.unwrap().exit_status, 4);
}

async fn processes_are_told_with_their_arguments(guest: &Guest) {
    let mut spec = spec(&["sh", "-c", "sleep 1000 & wait"]);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 100});
    stay(guest, &spec).await;
    // It has forked, executed the other program, and that one sleeps.
    let began = std::time::Instant::now();
    let details = loop {
        let details = guest.details("c").await;
        let sleeps =
            |of: &message::ProcessDetails| of.arguments.starts_with(b"sleep") && of.state == "S";
        if details.get(1).is_some_and(sleeps) || began.elapsed().as_secs() > 5 {
            break details;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    assert_eq!(details[0].arguments, b"sh\0-c\0sleep 1000 & wait\0");
    assert_eq!(
        (details[0].container_pid, details[0].uid, details[0].gid),
        (1, 1000, 100)
    );
    assert_eq!(details[1].parent_pid, details[0].pid);
    assert_eq!(
        (details[1].arguments.as_slice(), details[1].state.as_str()),
        (&b"sleep\x001000\0"[..], "S")
    );
}

async fn nothing_starts_in_a_paused_container(guest: &Guest) {
    stay(guest, &spec(&["sleep", "1000"])).await;
    guest.pause("c", true).await.unwrap();
    let (code, text) = failure(guest.exec("c", "e", &process(&["true"])).await);
    assert_eq!(
        (code, text.as_str()),
        (
            Code::FAILED_PRECONDITION,
            "container c is paused; resume it first"
        )
    );
    guest.delete("c", "", true).await.unwrap();
}

async fn requests_may_come_twice_at_once(guest: &Guest) {
    stay(guest, &spec(&["sleep", "1000"])).await;
    let (one, two) = tokio::join!(guest.pause("c", true), guest.pause("c", true));
    one.and(two).unwrap();
    let (one, two) = tokio::join!(guest.signal("c", 9, true), guest.signal("c", 9, true));
    one.and(two).unwrap();
    let (one, two) = tokio::join!(guest.delete("c", "", true), guest.delete("c", "", true));
    one.unwrap();
    // The second was in time, or came when the container was gone.
    assert!(two.is_ok() || failure(two).0 == Code::NOT_FOUND);
    let spec = spec(&["true"]);
    let (one, two) = tokio::join!(
        guest.create_with("c", &spec, message::Streams::new()),
        guest.create_with("c", &spec, message::Streams::new())
    );
    assert!(one.is_ok() != two.is_ok());
    guest.start_process("c", "").await.unwrap();
    guest.wait("c", "").await.unwrap();
}

async fn a_root_of_layers_takes_writes_in_memory(guest: &Guest) {
    let above = tempfile::tempdir().unwrap();
    std::fs::create_dir(above.path().join("etc")).unwrap();
    std::fs::write(above.path().join("etc/passwd"), "above\n").unwrap();
    let mut request = message::CreateContainerRequest::new();
    request.container_id = "c".into();
    request.spec = spec(&["sleep", "1000"]).to_string().into_bytes();
    let root = request.root.mut_or_insert_default().mut_layers();
    root.upper_bytes = 4 << 20;
    for source in [above.path(), &guest.root()] {
        let mut layer = message::Layer::new();
        layer.source = source.to_str().unwrap().into();
        root.layers.push(layer);
    }
    let context = ttrpc::context::with_timeout(30_000_000_000);
    guest
        .client()
        .create_container(context, &request)
        .await
        .unwrap();
    guest.start_process("c", "").await.unwrap();
    let command = "cat /etc/passwd; echo new > /etc/passwd; \
                   dd if=/dev/zero of=/big bs=1M count=8 2>/dev/null || echo full; ls /bin/sh";
    assert_eq!(guest.sh_in("c", command).await, "above\nfull\n/bin/sh\n");
    assert_eq!(
        std::fs::read_to_string(above.path().join("etc/passwd")).unwrap(),
        "above\n"
    );
}
