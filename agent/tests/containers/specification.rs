//! Properties of the specification that other stories do not come across.
#![expect(clippy::unwrap_used, reason = "a failure is what a test tells")]

use protocol::{Namespace, agent as message};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::guest::{Guest, failure, process, spec, stay};

stories! {
    a_process_is_scheduled_as_configured,
    an_exec_runs_on_its_cpus,
    the_machine_may_be_called_a_32_bit_one,
    a_tmpfs_can_begin_with_what_it_covers,
    a_mount_can_be_changed_by_a_later_one,
    recursive_options_reach_what_is_mounted_below,
    the_ids_of_a_bind_are_mapped,
    layers_can_be_mounted_as_a_volume,
    a_device_file_of_layers_is_of_no_use,
    an_option_that_nothing_has_is_refused,
    clocks_run_with_their_offsets,
    hooks_run_in_their_places_with_the_state,
    a_hook_that_fails_fails_the_call,
    a_container_with_its_own_users_shares_the_pods_namespaces,
    a_container_joins_the_users_of_another,
    a_container_joins_the_users_of_the_placeholder,
    a_filter_can_end_trap_and_test_arguments,
    what_a_filter_cannot_do_in_a_machine_is_refused,
    the_domain_name_is_set,
    a_root_can_share_its_mounts,
    a_device_node_can_be_a_pipe,
    a_keyring_is_the_containers_own,
}

async fn output(guest: &Guest, spec: &Value) -> String {
    let output = guest.run(spec).await;
    assert_eq!(
        (output.status, output.stderr.as_str()),
        (0, ""),
        "{output:?}"
    );
    output.stdout
}

fn sh(command: &str) -> Value {
    spec(&["sh", "-c", command])
}

async fn a_process_is_scheduled_as_configured(guest: &Guest) {
    let mut spec = sh("cut -d' ' -f19,41 /proc/self/stat; ionice -p $$");
    spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
    spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 3});
    assert_eq!(output(guest, &spec).await, "5 3\nbest-effort: prio 3\n");
    let mut spec = sh("cut -d' ' -f40,41 /proc/self/stat");
    spec["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 7});
    assert_eq!(output(guest, &spec).await, "7 1\n");
    spec["process"]["scheduler"] = json!({"policy": "SCHED_ISO"});
    let (code, text) = failure(guest.run_with(&spec, b"").await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        text.starts_with("process.scheduler.policy is \"SCHED_ISO\""),
        "{text}"
    );
}

async fn an_exec_runs_on_its_cpus(guest: &Guest) {
    stay(guest, &spec(&["sleep", "1000"])).await;
    let mut process = process(&["grep", "Cpus_allowed_list", "/proc/self/status"]);
    process["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
    let output = guest.exec("c", "e", &process).await.unwrap();
    assert_eq!(output.stdout, "Cpus_allowed_list:\t0\n");
    process["execCPUAffinity"] = json!({"final": "0-x"});
    let (_, text) = failure(guest.exec("c", "f", &process).await);
    assert!(
        text.starts_with("process.execCPUAffinity.final is \"0-x\""),
        "{text}"
    );
}

async fn the_machine_may_be_called_a_32_bit_one(guest: &Guest) {
    let mut spec = sh("uname -m; sleep 1000");
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    stay(guest, &spec).await;
    assert_eq!(guest.sh_in("c", "uname -m").await, "i686\n");
}

async fn a_tmpfs_can_begin_with_what_it_covers(guest: &Guest) {
    let mut spec = sh(
        "cat /etc/passwd | wc -l; readlink /etc/sub/link; stat -c '%a %u' /etc/sub; \
                       echo x > /etc/new; grep -c ' /etc tmpfs' /proc/self/mounts",
    );
    std::fs::create_dir(guest.root().join("etc/sub")).unwrap();
    std::os::unix::fs::symlink("/nowhere", guest.root().join("etc/sub/link")).unwrap();
    std::os::unix::fs::chown(guest.root().join("etc/sub"), Some(33), None).unwrap();
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m"]
    }));
    assert_eq!(output(guest, &spec).await, "2\n/nowhere\n755 33\n1\n");
    assert!(!guest.root().join("etc/new").exists());
}

async fn a_mount_can_be_changed_by_a_later_one(guest: &Guest) {
    let volume = tempfile::tempdir().unwrap();
    let mut spec = sh("touch /a/x /b/x; df -k /a | tail -1 | tr -s ' ' | cut -d' ' -f2");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.extend([
        json!({"destination": "/a", "type": "tmpfs", "source": "tmpfs", "options": ["size=4m"]}),
        json!({"destination": "/a", "type": "tmpfs", "options": ["remount", "ro", "size=2m"]}),
        json!({"destination": "/b", "type": "bind", "source": volume.path(), "options": ["bind"]}),
        json!({"destination": "/b", "options": ["bind", "remount", "ro"]}),
    ]);
    let output = guest.run(&spec).await;
    assert_eq!(output.stdout, "2048\n", "{output:?}");
    assert_eq!(
        output.stderr.matches("Read-only file system").count(),
        2,
        "{output:?}"
    );
}

async fn recursive_options_reach_what_is_mounted_below(guest: &Guest) {
    // The guest's own /dev has another file system mounted below.
    let mut spec = sh(
        "grep ' /v' /proc/self/mounts | cut -d' ' -f4 | cut -d, -f1,2 | sort -u; \
                       test $(grep -c ' /v' /proc/self/mounts) -gt 1 && echo several",
    );
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/v", "type": "bind", "source": "/dev", "options": ["rbind", "rro", "rnosuid"]
    }));
    assert_eq!(output(guest, &spec).await, "ro,nosuid\nseveral\n");
}

async fn the_ids_of_a_bind_are_mapped(guest: &Guest) {
    // Of the file systems of this machine tmpfs has id-mapped mounts for certain.
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::write(volume.path().join("file"), "").unwrap();
    let mut spec = sh("stat -c '%u %g' /v/file");
    let ids = |id: u32| json!([{"containerID": 0, "hostID": id, "size": 10}]);
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/v", "type": "bind", "source": volume.path(), "options": ["bind", "idmap"],
        "uidMappings": ids(5000), "gidMappings": ids(6000)
    }));
    assert_eq!(output(guest, &spec).await, "5000 6000\n");
}

async fn layers_can_be_mounted_as_a_volume(guest: &Guest) {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut lower = Vec::new();
    for name in ["top", "middle", "bottom"] {
        // Longer than the kernel reads at once.
        let path = directory.path().join(name).join("x".repeat(100));
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join(name), name).unwrap();
        std::fs::write(path.join("all"), name).unwrap();
        lower.push(path.to_str().unwrap().to_owned());
    }
    let mut spec = sh("cat /v/all; ls /v | tr '\\n' ' '");
    let lower = format!("lowerdir={}", lower.join(":"));
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/v", "type": "overlay", "source": "overlay", "options": [lower, "ro"]
    }));
    assert_eq!(output(guest, &spec).await, "topall bottom middle top ");
}

async fn a_device_file_of_layers_is_of_no_use(guest: &Guest) {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let layer = |name| directory.path().join(name);
    for name in ["top", "bottom"] {
        std::fs::create_dir(layer(name)).unwrap();
    }
    let mut mknod = std::process::Command::new("mknod");
    mknod
        .arg(layer("bottom").join("null"))
        .args(["c", "1", "3"]);
    assert!(mknod.status().unwrap().success());
    let lower = format!(
        "lowerdir={}:{}",
        layer("top").display(),
        layer("bottom").display()
    );
    let mut spec = sh("cat /v/null 2>&1; cat /dev/null && echo own");
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/v", "type": "overlay", "source": "overlay", "options": [lower]
    }));
    assert_eq!(
        output(guest, &spec).await,
        "cat: can't open '/v/null': Permission denied\nown\n"
    );
}

async fn an_option_that_nothing_has_is_refused(guest: &Guest) {
    for (kind, options, named) in [
        ("bind", json!(["bind", "size=1m"]), "size"),
        ("bind", json!(["bind", "tmpcopyup"]), "tmpcopyup"),
        ("tmpfs", json!(["idmap"]), "idmap"),
        ("tmpfs", json!(["copy-symlink"]), "copy-symlink"),
    ] {
        let mut spec = sh("true");
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .push(json!({"destination": "/v", "type": kind, "source": "/tmp", "options": options}));
        let (_, text) = failure(guest.run_with(&spec, b"").await);
        let expected = format!("the option \"{named}\" of the mount on /v is not supported");
        assert_eq!(text, expected);
    }
    let mut spec = sh("true");
    spec["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/v", "type": "tmpfs", "source": "tmpfs", "options": ["wings"]}),
    );
    let (_, text) = failure(guest.run_with(&spec, b"").await);
    assert!(text.starts_with("cannot mount tmpfs on /v"), "{text}");
}

async fn clocks_run_with_their_offsets(guest: &Guest) {
    let mut spec = sh("sleep 1000");
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] =
        json!({"boottime": {"secs": 500_000_000}, "monotonic": {"secs": 7}});
    stay(guest, &spec).await;
    // An exec has the clocks of the container.
    let uptime = guest.sh_in("c", "cut -d. -f1 /proc/uptime").await;
    assert!(
        uptime.trim().parse::<u64>().unwrap() > 500_000_000,
        "{uptime}"
    );
    let mut other = sh("sleep 1000");
    other["linux"]["namespaces"].as_array_mut().unwrap().push(
        json!({"type": "time", "path": Namespace::Container {id: "c", kind: "time"}.to_string()}),
    );
    guest.stay_as("d", &other).await;
    let same = "readlink /proc/self/ns/time";
    assert_eq!(guest.sh_in("c", same).await, guest.sh_in("d", same).await);
}

async fn hooks_run_in_their_places_with_the_state(guest: &Guest) {
    let told = tempfile::tempdir().unwrap();
    let file = told.path().join("state");
    let mut spec = sh("cat /tmp/hook; test -e /tmp/made && echo before");
    spec["annotations"] = json!({"a/b": "c"});
    let create = format!(
        "cat > {}; touch /run/bulkhead/root/tmp/made; hostname >&2",
        file.display()
    );
    spec["hooks"] = json!({
        "createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", create], "env": ["PATH=/bin:/usr/bin"]}],
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo $A $(cat | grep -c created) > /tmp/hook"],
                            "env": ["A=start", "PATH=/bin"], "timeout": 10}],
    });
    assert_eq!(output(guest, &spec).await, "start 1\nbefore\n");
    let state: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(
        state,
        json!({"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 1, "bundle": "",
               "annotations": {"a/b": "c"}})
    );
}

async fn a_hook_that_fails_fails_the_call(guest: &Guest) {
    let hook =
        |command: &str| json!([{"path": "/bin/sh", "args": ["sh", "-c", command], "timeout": 1}]);
    for (kind, command, expected) in [
        (
            "createContainer",
            "echo no >&2; exit 2",
            "hooks.createContainer[0] /bin/sh failed with exit status: 2: no",
        ),
        (
            "startContainer",
            "while :; do :; done",
            "hooks.startContainer[0] /bin/sh did not end within 1 s",
        ),
    ] {
        let mut spec = sh("true");
        spec["hooks"][kind] = hook(command);
        let (_, text) = failure(guest.run_with(&spec, b"").await);
        assert_eq!(text, expected);
    }
    let mut spec = sh("true");
    spec["hooks"]["createContainer"] = json!([{"path": "/usr/libexec/of-the-host"}]);
    let (code, text) = failure(guest.run_with(&spec, b"").await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        text.starts_with("hooks.createContainer[0].path is not supported"),
        "{text}"
    );
}

/// Gives the configuration's container users of its own.
fn with_users(mut spec: Value) -> Value {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    spec["linux"]["uidMappings"] = ids.clone();
    spec["linux"]["gidMappings"] = ids;
    spec
}

fn join(spec: &mut Value, kind: &str, namespace: Namespace<'_>) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != *kind);
    namespaces.push(json!({"type": kind, "path": namespace.to_string()}));
}

async fn a_container_with_its_own_users_shares_the_pods_namespaces(guest: &Guest) {
    guest.own_root_by(100_000);
    let mut spec = with_users(sh("sleep 1000"));
    spec["hostname"] = Value::Null;
    for kind in ["ipc", "uts", "network"] {
        join(&mut spec, kind, Namespace::Pod(kind));
    }
    // A volume whose directory only the guest's root may enter.
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::write(volume.path().join("file"), "data").unwrap();
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/v", "type": "bind", "source": volume.path(), "options": ["bind", "idmap"]
    }));
    guest.stay_as("c", &spec).await;
    assert_eq!(
        guest
            .sh_in(
                "c",
                "cat /v/file; stat -c %u /v/file; ls -d /sys/class/net /dev/mqueue"
            )
            .await,
        "data0\n/dev/mqueue\n/sys/class/net\n"
    );
}

async fn a_container_joins_the_users_of_another(guest: &Guest) {
    guest.own_root_by(100_000);
    guest
        .stay_as("a", &with_users(spec(&["sleep", "1000"])))
        .await;
    let mut spec = spec(&["sleep", "1000"]);
    spec["hostname"] = Value::Null;
    for kind in ["user", "ipc", "uts", "network", "pid"] {
        join(&mut spec, kind, Namespace::Container { id: "a", kind });
    }
    guest.stay_as("b", &spec).await;
    let command = "for n in user ipc uts net pid; do readlink /proc/self/ns/$n; done; id -u";
    assert_eq!(
        guest.sh_in("a", command).await,
        guest.sh_in("b", command).await
    );
    assert_eq!(guest.sh_in("b", "pidof sleep | wc -w").await, "2\n");
    guest.signal("b", 9, false).await.unwrap();
    assert_eq!(guest.wait("b", "").await.unwrap().exit_status, 137);
    let mut foreign = sh("true");
    foreign["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user", "path": "/proc/1/ns/user"}));
    let (_, text) = failure(guest.run_with(&foreign, b"").await);
    assert!(
        text.contains("/proc/1/ns/user is no user namespace of a container"),
        "{text}"
    );
}

async fn a_container_joins_the_users_of_the_placeholder(guest: &Guest) {
    guest.own_root_by(100_000);
    let pause = with_users(json!({"ociVersion": "1.0.2", "linux": {"namespaces": []}}));
    guest.placeholder("pod", &pause).await.unwrap();
    let mut spec = spec(&["sleep", "1000"]);
    join(
        &mut spec,
        "user",
        Namespace::Container {
            id: "pod",
            kind: "user",
        },
    );
    guest.stay_as("a", &spec).await;
    guest.stay_as("b", &spec).await;
    let command = "tr -s ' ' < /proc/self/uid_map; id -u";
    assert_eq!(guest.sh_in("a", command).await, " 0 100000 1000\n0\n");
    let same = "readlink /proc/self/ns/user";
    assert_eq!(guest.sh_in("a", same).await, guest.sh_in("b", same).await);
}

async fn a_filter_can_end_trap_and_test_arguments(guest: &Guest) {
    let with = |rules: Value, command: &str| {
        let mut spec = sh(command);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"], "syscalls": rules,
        });
        spec
    };
    for (action, status) in [
        ("SCMP_ACT_KILL_PROCESS", 128 + 31),
        ("SCMP_ACT_KILL", 128 + 31),
        ("SCMP_ACT_TRAP", 128 + 31),
    ] {
        let spec = with(
            json!([{"names": ["mkdir"], "action": action}]),
            "mkdir /tmp/x",
        );
        assert_eq!(guest.run(&spec).await.status, status, "{action}");
    }
    let rules = json!([
        {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28,
         "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]},
        {"names": ["mkdir"], "action": "SCMP_ACT_LOG"},
        {"names": ["getppid"], "action": "SCMP_ACT_TRACE"},
    ]);
    let output = guest
        .run(&with(
            rules,
            "mkdir /tmp/y; kill -12 $$; kill -10 $$; echo $?",
        ))
        .await;
    assert!(
        output.stderr.contains("No space left on device"),
        "{output:?}"
    );
    assert_eq!(output.stdout, "1\n");
}

async fn what_a_filter_cannot_do_in_a_machine_is_refused(guest: &Guest) {
    for (seccomp, start) in [
        (
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "linux.seccomp: the action \"SCMP_ACT_NOTIFY\" is not supported",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}),
            "linux.seccomp: the flag",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"}),
            "linux.seccomp.listenerPath is not supported",
        ),
    ] {
        let mut spec = sh("true");
        spec["linux"]["seccomp"] = seccomp;
        let (code, text) = failure(guest.run_with(&spec, b"").await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.starts_with(start), "{text}");
    }
}

async fn the_domain_name_is_set(guest: &Guest) {
    let mut spec = sh("cat /proc/sys/kernel/domainname");
    spec["domainname"] = "example.org".into();
    assert_eq!(output(guest, &spec).await, "example.org\n");
}

async fn a_root_can_share_its_mounts(guest: &Guest) {
    let mut spec = sh("cut -d' ' -f5,7 /proc/self/mountinfo | grep -c '^/ shared:'");
    spec["linux"]["rootfsPropagation"] = "shared".into();
    assert_eq!(output(guest, &spec).await, "1\n");
    spec["linux"]["rootfsPropagation"] = "sideways".into();
    let (_, text) = failure(guest.run_with(&spec, b"").await);
    assert!(
        text.starts_with("linux.rootfsPropagation is \"sideways\""),
        "{text}"
    );
}

async fn a_device_node_can_be_a_pipe(guest: &Guest) {
    let mut spec = sh("test -p /dev/pipe && stat -c '%a %u %g' /dev/pipe");
    spec["linux"]["devices"] =
        json!([{"type": "p", "path": "/dev/pipe", "fileMode": 0o640, "uid": 7, "gid": 8}]);
    assert_eq!(output(guest, &spec).await, "640 7 8\n");
}

async fn a_keyring_is_the_containers_own(guest: &Guest) {
    // The kernel shows each process the keys that it possesses or may view.
    let mut spec = sh("grep -c _ses /proc/keys");
    spec["linux"]["maskedPaths"] = json!([]);
    let none = message::Streams::new();
    guest.create_with("c", &spec, none).await.unwrap();
    guest.start_process("c", "").await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 0);
}
