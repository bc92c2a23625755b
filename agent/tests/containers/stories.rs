//! What containers do, one sentence each.
#![expect(clippy::unwrap_used, reason = "a failure is what a test tells")]

use protocol::agent as message;
use serde_json::json;
use ttrpc::Code;

use crate::guest::{Guest, failure, process, spec, stay};

stories! {
    a_program_runs_and_its_output_and_status_come_back,
    a_signal_that_ends_it_is_128_and_its_number,
    standard_input_reaches_it_byte_by_byte,
    a_missing_program_is_not_found_when_its_container_is_made,
    a_file_that_is_no_program_is_refused,
    what_fails_on_the_way_is_told_with_its_cause,
    a_reader_that_is_slow_stops_the_writer_and_loses_nothing,
    a_user_without_rights_has_what_the_configuration_says,
    capabilities_and_limits_are_as_configured,
    a_process_with_a_terminal_sees_its_size_and_changes_of_it,
    a_read_only_root_and_sealed_paths_cannot_be_written,
    the_devices_that_every_container_has_are_there,
    a_volume_is_mounted_with_its_options_on_a_path_that_is_made,
    an_exec_joins_the_container,
    an_exec_can_have_a_terminal,
    a_filter_of_system_calls_holds,
    kernel_parameters_of_own_namespaces_are_set_and_others_refused,
    a_container_can_be_frozen_listed_counted_and_deleted_by_force,
    a_signal_reaches_every_process,
    closing_standard_input_ends_it_behind_what_was_sent,
    orphans_are_collected,
    an_id_is_unique_and_free_again_after_the_deletion,
    a_container_that_was_not_started_can_be_deleted,
    what_the_configuration_asks_beyond_the_agent_is_refused_by_name,
    a_request_for_nobody_is_answered_so,
    a_stream_that_nobody_opened_fails_the_request,
    a_real_time_signal_ends_a_process_and_is_told,
    a_block_root_that_is_not_there_is_told,
    a_device_is_used_only_as_the_rules_say,
    a_device_file_of_the_image_is_of_no_use,
    an_exec_that_can_make_device_files_is_held_to_the_rules,
    root_of_a_user_namespace_is_somebody_else_outside,
    the_agent_gives_a_sign_of_life_while_it_is_waited_for,
    the_agent_stays_small,
}

async fn a_program_runs_and_its_output_and_status_come_back(guest: &Guest) {
    let output = guest
        .sh("echo out; echo err >&2; hostname; echo $$; exit 7")
        .await;
    assert_eq!(output.stdout, "out\nweb-0\n1\n");
    assert_eq!(output.stderr, "err\n");
    assert_eq!(output.status, 7);
}

async fn a_signal_that_ends_it_is_128_and_its_number(guest: &Guest) {
    guest
        .create_with("c", &spec(&["sleep", "100"]), message::Streams::new())
        .await
        .unwrap();
    guest.start_process("c", "").await.unwrap();
    guest.signal("c", 9, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 137);
    assert_eq!(
        failure(guest.signal("c", 9, false).await).0,
        Code::FAILED_PRECONDITION
    );
}

async fn standard_input_reaches_it_byte_by_byte(guest: &Guest) {
    let input: Vec<u8> = (0..3_000_000_u32).map(|n| (n * 7 % 251) as u8).collect();
    let output = guest
        .run_with(&spec(&["sh", "-c", "wc -c; md5sum /dev/null"]), &input)
        .await
        .unwrap();
    assert_eq!(output.stdout.lines().next(), Some("3000000"));
}

async fn a_missing_program_is_not_found_when_its_container_is_made(guest: &Guest) {
    let streams = message::Streams::new();
    let made = guest.create_with("c", &spec(&["nope"]), streams).await;
    let (code, text) = failure(made);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(
        text.contains("exec: \"nope\": executable file not found in $PATH"),
        "{text}"
    );
}

async fn a_file_that_is_no_program_is_refused(guest: &Guest) {
    let (code, text) = failure(guest.run_with(&spec(&["/bin/script"]), b"").await);
    assert_eq!(code, Code::PERMISSION_DENIED);
    assert!(text.contains("permission denied"), "{text}");
}

async fn what_fails_on_the_way_is_told_with_its_cause(guest: &Guest) {
    let mut spec = spec(&["sh"]);
    spec["process"]["cwd"] = "/etc/passwd/x".into();
    let (code, text) = failure(guest.run_with(&spec, b"").await);
    assert_eq!(code, Code::INTERNAL);
    assert_eq!(
        text,
        "cannot make the working directory /etc/passwd/x: not a directory"
    );
}

async fn a_reader_that_is_slow_stops_the_writer_and_loses_nothing(guest: &Guest) {
    use tokio::io::AsyncReadExt;
    let (stdout, mut host) = guest.stream().await;
    let mut streams = message::Streams::new();
    streams.stdout = stdout;
    let command = "dd if=/dev/zero bs=64k count=320 2>/dev/null; echo end";
    guest
        .create_with("c", &spec(&["sh", "-c", command]), streams)
        .await
        .unwrap();
    guest.start_process("c", "").await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let before = guest.agent_rss_kib().await;
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes.len(), 320 * 65536 + 4);
    assert!(bytes.ends_with(b"\0end\n"));
    let after = guest.agent_rss_kib().await;
    assert!(after < before + 1024, "{before} KiB grew to {after}");
}

async fn a_user_without_rights_has_what_the_configuration_says(guest: &Guest) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "id -u; id -G; umask; echo $HOME; pwd; echo again > /dev/stdout",
    ]);
    spec["process"]["user"] =
        json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 0o27});
    spec["process"]["cwd"] = "/home/web/new".into();
    let output = guest.run(&spec).await;
    assert_eq!(
        output.stdout,
        "1000\n1000 5 6\n0027\n/home/web\n/home/web/new\nagain\n"
    );
    assert_eq!(output.status, 0, "{}", output.stderr);
}

async fn capabilities_and_limits_are_as_configured(guest: &Guest) {
    let command = "grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status; ulimit -n; cat /proc/self/oom_score_adj";
    let mut spec = spec(&["sh", "-c", command]);
    spec["process"]["oomScoreAdj"] = 500.into();
    spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"],
        "effective": ["CAP_NET_BIND_SERVICE"],
        "permitted": ["CAP_NET_BIND_SERVICE"],
        "inheritable": ["CAP_NET_BIND_SERVICE"],
        "ambient": ["CAP_NET_BIND_SERVICE"]
    });
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let output = guest.run(&spec).await;
    for line in [
        "CapInh:\t0000000000000400",
        "CapPrm:\t0000000000000400",
        "CapEff:\t0000000000000400",
        "CapBnd:\t0000000000000401",
        "CapAmb:\t0000000000000400",
        "NoNewPrivs:\t1",
        "Seccomp:\t0",
        "900",
        "500",
    ] {
        assert!(
            output.stdout.lines().any(|have| have == line),
            "{line} in {output:?}"
        );
    }
}

async fn a_process_with_a_terminal_sees_its_size_and_changes_of_it(guest: &Guest) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (stdin, mut host_in) = guest.stream().await;
    let (stdout, mut host_out) = guest.stream().await;
    let mut streams = message::Streams::new();
    (streams.stdin, streams.stdout) = (stdin, stdout);
    let command = "tty; stty size; read line; stty size; echo got $line; test -c /dev/console && echo console";
    let mut spec = spec(&["sh", "-c", command]);
    spec["process"]["terminal"] = true.into();
    spec["process"]["consoleSize"] = json!({"width": 100, "height": 30});
    guest.create_with("c", &spec, streams).await.unwrap();
    guest.start_process("c", "").await.unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("30 100") {
        host_out.read_buf(&mut seen).await.unwrap();
    }
    guest.resize("c", 120, 40).await.unwrap();
    host_in.write_all(b"hello\n").await.unwrap();
    host_out.read_to_end(&mut seen).await.unwrap();
    let text = String::from_utf8_lossy(&seen).replace("\r\n", "\n");
    assert_eq!(
        text,
        "/dev/pts/0\n30 100\nhello\n40 120\ngot hello\nconsole\n"
    );
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 0);
    assert_eq!(
        failure(guest.resize("c", 70_000, 1).await).0,
        Code::INVALID_ARGUMENT
    );
}

async fn a_read_only_root_and_sealed_paths_cannot_be_written(guest: &Guest) {
    let command = "touch /x; echo 1 > /proc/sys/kernel/msgmax; cat /proc/kcore | wc -c; ls /sys/firmware; \
                   touch /dev/shm/x && echo shm; grep ' / ' /proc/self/mounts | grep -c 'ro,'";
    let mut spec = spec(&["sh", "-c", command]);
    spec["root"]["readonly"] = true.into();
    let output = guest.run(&spec).await;
    assert_eq!(output.stdout, "0\nshm\n1\n", "{}", output.stderr);
    assert_eq!(
        output.stderr.matches("Read-only file system").count(),
        2,
        "{}",
        output.stderr
    );
    assert!(!guest.root().join("x").exists());
}

async fn the_devices_that_every_container_has_are_there(guest: &Guest) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "cd /dev; stat -c '%n %F %t:%T %a' null zero full random urandom tty fuse; \
                                       for link in fd ptmx stdout; do readlink $link; done; echo x > null; head -c 2 zero | wc -c",
    ]);
    spec["linux"]["devices"] =
        json!([{"type": "c", "path": "/dev/fuse", "major": 10, "minor": 229, "fileMode": 0o600}]);
    let output = guest.run(&spec).await;
    let device = "character special file";
    assert_eq!(
        output.stdout,
        format!(
            "null {device} 1:3 666\nzero {device} 1:5 666\nfull {device} 1:7 666\n\
             random {device} 1:8 666\nurandom {device} 1:9 666\ntty {device} 5:0 666\n\
             fuse {device} a:e5 600\n/proc/self/fd\npts/ptmx\n/proc/self/fd/1\n2\n"
        )
    );
}

async fn a_volume_is_mounted_with_its_options_on_a_path_that_is_made(guest: &Guest) {
    let volume = tempfile::tempdir().unwrap();
    std::fs::write(volume.path().join("file"), "data\n").unwrap();
    std::os::unix::fs::symlink("../run/resolv.conf", guest.root().join("etc/resolv.conf")).unwrap();
    let source = volume.path().to_str().unwrap();
    let mut spec = spec(&[
        "sh",
        "-c",
        "cat /a/b/c/file /etc/resolv.conf; touch /a/b/c/x; grep /a/b/c /proc/self/mounts; touch /a/tmp/x; df -k /a/tmp | tail -1",
    ]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/a/b/c", "type": "bind", "source": source,
                       "options": ["rbind", "ro", "nosuid", "nodev", "noexec", "noatime"]}),
    );
    mounts.push(json!({"destination": "/etc/resolv.conf", "type": "none",
                       "source": volume.path().join("file"), "options": ["bind", "rprivate"]}));
    mounts.push(json!({"destination": "/a/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=8m", "mode=700"]}));
    let output = guest.run(&spec).await;
    assert!(output.stdout.starts_with("data\ndata\n"), "{output:?}");
    assert!(
        output.stdout.contains("ro,nosuid,nodev,noexec,noatime"),
        "{output:?}"
    );
    assert!(output.stdout.contains("8192"), "{output:?}");
    assert!(
        output.stderr.contains("/a/b/c/x: Read-only file system"),
        "{output:?}"
    );
    assert!(
        guest.root().join("run/resolv.conf").exists(),
        "the link led to a path inside"
    );
    let mut bad = crate::guest::spec(&["true"]);
    bad["mounts"] = json!([{"destination": "/x", "type": "bind", "source": "/nowhere/at/all"}]);
    let (_, text) = failure(guest.run_with(&bad, b"").await);
    assert_eq!(
        text,
        "cannot mount /nowhere/at/all on /x: no such file or directory"
    );
}

async fn an_exec_joins_the_container(guest: &Guest) {
    stay(guest, &spec(&["sh", "-c", "sleep 1000; true"])).await;
    let command = "hostname; cat /proc/1/comm; grep ^0: /proc/self/cgroup; ls / | head -1; exit 3";
    let output = guest
        .exec("c", "e", &process(&["sh", "-c", command]))
        .await
        .unwrap();
    assert_eq!(output.stdout, "web-0\nsh\n0::/\nbin\n", "{}", output.stderr);
    assert_eq!(output.status, 3);
    let (code, text) = failure(guest.exec("c", "e", &process(&["nope"])).await);
    assert_eq!(code, Code::NOT_FOUND, "{text}");
    // Its name is free again, until another has it.
    let idle = process(&["true"]);
    guest.make_exec("c", "e", &idle).await.unwrap();
    let again = failure(guest.make_exec("c", "e", &idle).await);
    assert_eq!(again.0, Code::ALREADY_EXISTS, "{}", again.1);
    guest.signal("c", 9, false).await.unwrap();
    guest.wait("c", "").await.unwrap();
    let (code, text) = failure(guest.exec("c", "f", &process(&["true"])).await);
    assert_eq!(
        (code, text.as_str()),
        (Code::FAILED_PRECONDITION, "container c is not running")
    );
}

async fn an_exec_can_have_a_terminal(guest: &Guest) {
    stay(guest, &spec(&["sleep", "1000"])).await;
    let mut process = process(&["sh", "-c", "tty; stty size"]);
    process["terminal"] = true.into();
    process["consoleSize"] = json!({"width": 80, "height": 25});
    let output = guest.exec("c", "e", &process).await.unwrap();
    assert_eq!(output.stdout, "/dev/pts/0\r\n25 80\r\n");
}

async fn a_filter_of_system_calls_holds(guest: &Guest) {
    for no_new_privileges in [true, false] {
        let mut spec = spec(&[
            "sh",
            "-c",
            "mkdir /tmp/x; grep -E '^Seccomp:|CapEff' /proc/self/status; id -u",
        ]);
        spec["process"]["noNewPrivileges"] = no_new_privileges.into();
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({});
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]
        });
        let output = guest.run(&spec).await;
        assert_eq!(
            output.stderr,
            "mkdir: can't create directory '/tmp/x': No space left on device\n"
        );
        assert_eq!(
            output.stdout,
            "CapEff:\t0000000000000000\nSeccomp:\t2\n1000\n"
        );
    }
}

async fn kernel_parameters_of_own_namespaces_are_set_and_others_refused(guest: &Guest) {
    let mut spec = spec(&[
        "cat",
        "/proc/sys/kernel/msgmax",
        "/proc/sys/net/ipv4/ip_forward",
    ]);
    spec["linux"]["sysctl"] = json!({"kernel.msgmax": "9000", "net.ipv4.ip_forward": "1"});
    let output = guest.run(&spec).await;
    assert_eq!(output.stdout, "9000\n1\n", "{}", output.stderr);
    spec["linux"]["sysctl"] = json!({"kernel.panic": "9"});
    let (_, text) = failure(guest.run_with(&spec, b"").await);
    assert!(
        text.starts_with("linux.sysctl: kernel.panic is not of a namespace"),
        "{text}"
    );
}

async fn a_container_can_be_frozen_listed_counted_and_deleted_by_force(guest: &Guest) {
    stay(
        guest,
        &spec(&["sh", "-c", "sleep 1000 & sleep 1000 & wait"]),
    )
    .await;
    while guest.pids("c").await.len() < 3 {
        tokio::task::yield_now().await;
    }
    guest.pause("c", true).await.unwrap();
    guest.pause("c", false).await.unwrap();
    let mut request = message::ContainerStatsRequest::new();
    request.container_id = "c".into();
    let context = ttrpc::context::with_timeout(30_000_000_000);
    let stats = guest
        .client()
        .container_stats(context, &request)
        .await
        .unwrap();
    assert!(stats.cpu_usage_us > 0);
    let (code, text) = failure(guest.delete("c", "", false).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    guest.delete("c", "", true).await.unwrap();
    assert_eq!(failure(guest.wait("c", "").await).0, Code::NOT_FOUND);
}

async fn a_signal_reaches_every_process(guest: &Guest) {
    let command = "trap 'exit 9' TERM; sleep 1000 & wait $!; echo";
    stay(guest, &spec(&["sh", "-c", command])).await;
    while guest.pids("c").await.len() < 2 {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    guest.signal("c", 15, true).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 9);
    assert_eq!(
        failure(guest.signal("c", 65, false).await).0,
        Code::INVALID_ARGUMENT
    );
}

async fn closing_standard_input_ends_it_behind_what_was_sent(guest: &Guest) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (stdin, mut host_in) = guest.stream().await;
    let (stdout, mut host_out) = guest.stream().await;
    let mut streams = message::Streams::new();
    (streams.stdin, streams.stdout) = (stdin, stdout);
    guest
        .create_with("c", &spec(&["cat"]), streams)
        .await
        .unwrap();
    guest.start_process("c", "").await.unwrap();
    host_in.write_all(&[b'x'; 200_000]).await.unwrap();
    let mut request = message::CloseStdinRequest::new();
    request.container_id = "c".into();
    let context = ttrpc::context::with_timeout(30_000_000_000);
    guest.client().close_stdin(context, &request).await.unwrap();
    let mut bytes = Vec::new();
    host_out.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes.len(), 200_000);
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 0);
}

async fn orphans_are_collected(guest: &Guest) {
    let mut spec = spec(&["sh", "-c", "(sleep 0.1 &) ; (sleep 0.1 &)"]);
    // Without a pid namespace of its own, its orphans come to the agent, and die with it.
    spec["linux"]["namespaces"] =
        json!([{"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"}]);
    spec["linux"]["readonlyPaths"] = json!([]);
    let output = guest.run(&spec).await;
    assert_eq!(output.status, 0);
    let none_left = async {
        while guest.zombies() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(5), none_left)
        .await
        .unwrap();
}

async fn an_id_is_unique_and_free_again_after_the_deletion(guest: &Guest) {
    stay(guest, &spec(&["sleep", "1000"])).await;
    let (code, text) = failure(
        guest
            .create_with("c", &spec(&["true"]), message::Streams::new())
            .await,
    );
    assert_eq!(code, Code::ALREADY_EXISTS, "{text}");
    guest.delete("c", "", true).await.unwrap();
    assert_eq!(guest.sh("echo again").await.stdout, "again\n");
}

async fn a_container_that_was_not_started_can_be_deleted(guest: &Guest) {
    guest
        .create_with("c", &spec(&["true"]), message::Streams::new())
        .await
        .unwrap();
    guest.delete("c", "", false).await.unwrap();
    assert_eq!(
        failure(guest.start_process("c", "").await).0,
        Code::NOT_FOUND
    );
}

async fn what_the_configuration_asks_beyond_the_agent_is_refused_by_name(guest: &Guest) {
    for (at, value, expected) in [
        (
            "/linux/namespaces/0/type",
            json!("space"),
            "linux.namespaces: the type \"space\"",
        ),
        (
            "/linux/namespaces/0/type",
            json!("user"),
            "linux.uidMappings and linux.gidMappings must each map",
        ),
        ("/linux/cgroupsPath", json!("/../x"), "linux.cgroupsPath is"),
        ("/process/args", json!([]), "process.args is missing"),
        (
            "/process/rlimits/0/type",
            json!("RLIMIT_X"),
            "process.rlimits.type is \"RLIMIT_X\"",
        ),
        (
            "/mounts/0/options",
            json!(["tmpcopyup"]),
            "the option \"tmpcopyup\" of the mount on /proc",
        ),
        ("/ociVersion", json!("3.0"), "ociVersion \"3.0\""),
    ] {
        let mut spec = spec(&["true"]);
        match spec.pointer_mut(at) {
            Some(place) => *place = value,
            None => spec["mounts"][0]["options"] = value,
        }
        let (code, text) = failure(guest.run_with(&spec, b"").await);
        assert!(text.starts_with(expected), "{text}");
        assert!(
            matches!(code, Code::INVALID_ARGUMENT | Code::INTERNAL),
            "{text}"
        );
    }
}

async fn a_request_for_nobody_is_answered_so(guest: &Guest) {
    assert_eq!(
        failure(guest.wait("nobody", "").await),
        (Code::NOT_FOUND, "there is no container nobody".into())
    );
    assert_eq!(
        failure(guest.wait("a/b", "").await).0,
        Code::INVALID_ARGUMENT
    );
    stay(guest, &spec(&["sleep", "1000"])).await;
    let (code, text) = failure(guest.wait("c", "nobody").await);
    assert_eq!(
        (code, text.as_str()),
        (Code::NOT_FOUND, "container c has no exec nobody")
    );
}

async fn a_stream_that_nobody_opened_fails_the_request(guest: &Guest) {
    let mut streams = message::Streams::new();
    streams.stdout = 0xdead_beef;
    let (code, text) = failure(guest.create_with("c", &spec(&["true"]), streams).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(
        text.starts_with("the host opened no stream 0xdeadbeef within 10 s"),
        "{text}"
    );
}

async fn a_real_time_signal_ends_a_process_and_is_told(guest: &Guest) {
    stay(
        guest,
        &spec(&[
            "sh",
            "-c",
            "kill -40 $$; sleep 1; sh -c 'kill -40 $$'; exit $?",
        ]),
    )
    .await;
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 128 + 40);
}

async fn a_block_root_that_is_not_there_is_told(guest: &Guest) {
    let mut request = message::CreateContainerRequest::new();
    request.container_id = "c".into();
    request.spec = spec(&["true"]).to_string().into_bytes();
    let block = request.root.mut_or_insert_default().mut_block();
    (block.device, block.filesystem, block.overlay) = ("/dev/nowhere".into(), "ext4".into(), true);
    let context = ttrpc::context::with_timeout(30_000_000_000);
    let (_, text) = failure(guest.client().create_container(context, &request).await);
    assert!(
        text.starts_with("cannot mount ext4 of /dev/nowhere on /"),
        "{text}"
    );
}

async fn the_agent_gives_a_sign_of_life_while_it_is_waited_for(guest: &Guest) {
    guest
        .create_with("c", &spec(&["sleep", "100"]), message::Streams::new())
        .await
        .unwrap();
    guest.start_process("c", "").await.unwrap();
    tokio::select! {
        biased;
        ended = guest.wait("c", "") => panic!("{ended:?}"),
        () = guest.ping() => {}
    }
    guest.signal("c", 9, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 137);
}

async fn the_agent_stays_small(guest: &Guest) {
    for _ in 0..20 {
        guest.sh("true").await;
    }
    let before = guest.agent_rss_kib().await;
    for _ in 0..60 {
        guest.sh("true").await;
    }
    let after = guest.agent_rss_kib().await;
    assert!(after <= before + 256, "{before} KiB grew to {after}");
    // The end of the last one's streams is the agent's own to see.
    let began = std::time::Instant::now();
    while guest.open_files() != guest.open_files_at_start && began.elapsed().as_secs() < 5 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(guest.open_files(), guest.open_files_at_start);
}

async fn a_device_is_used_only_as_the_rules_say(guest: &Guest) {
    // The kernel's log: a device that no container has unless a rule gives it.
    let command = "mknod /dev/kmsg c 1 11 && dd if=/dev/kmsg bs=8k count=1 of=/dev/null; echo > /dev/null && echo null";
    let mut spec = spec(&["sh", "-c", command]);
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] =
            json!(["CAP_MKNOD", "CAP_SYSLOG", "CAP_DAC_OVERRIDE"]);
    }
    spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
    let output = guest.run(&spec).await;
    assert_eq!(output.stdout, "null\n");
    assert!(
        output
            .stderr
            .contains("can't open '/dev/kmsg': Operation not permitted"),
        "{output:?}"
    );
    spec["linux"]["resources"]["devices"] = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rm"},
    ]);
    let output = guest.run(&spec).await;
    assert!(
        output.stderr.contains("1+0 records in") || output.stderr.contains("0+1 records in"),
        "{output:?}"
    );
}

/// The kernel's log, by a device file that whoever made the image put there.
fn put_kmsg(guest: &Guest) {
    let made = std::process::Command::new("mknod")
        .arg(guest.root().join("kmsg"))
        .args(["c", "1", "11"])
        .status();
    assert!(made.unwrap().success());
}

async fn a_device_file_of_the_image_is_of_no_use(guest: &Guest) {
    put_kmsg(guest);
    let output = guest
        .sh("dd if=/kmsg bs=8k count=1 of=/dev/null; echo > /dev/null && echo null")
        .await;
    assert_eq!(output.stdout, "null\n");
    assert!(
        output
            .stderr
            .contains("can't open '/kmsg': Permission denied"),
        "{output:?}"
    );
}

async fn an_exec_that_can_make_device_files_is_held_to_the_rules(guest: &Guest) {
    stay(guest, &spec(&["sleep", "1000"])).await;
    let mut process = process(&[
        "sh",
        "-c",
        "mknod /dev/k c 1 11; dd if=/dev/k bs=8k count=1 of=/dev/null",
    ]);
    for set in ["bounding", "effective", "permitted"] {
        process["capabilities"][set] = json!(["CAP_MKNOD", "CAP_SYSLOG"]);
    }
    let output = guest.exec("c", "e", &process).await.unwrap();
    assert!(
        output
            .stderr
            .contains("can't open '/dev/k': Operation not permitted"),
        "{output:?}"
    );
}

async fn root_of_a_user_namespace_is_somebody_else_outside(guest: &Guest) {
    let command = "id -u; cat /proc/self/uid_map | tr -s ' '; echo x > /dev/null && echo null; \
                   echo again > /dev/stdout; mount | grep -c ' /proc '; sleep 1000";
    let mut spec = spec(&["sh", "-c", command]);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    let (stdout, host) = guest.stream().await;
    let mut streams = message::Streams::new();
    streams.stdout = stdout;
    guest.own_root_by(100_000);
    guest.create_with("c", &spec, streams).await.unwrap();
    guest.start_process("c", "").await.unwrap();
    let mut lines = tokio::io::BufReader::new(host);
    let mut text = String::new();
    for _ in 0..5 {
        use tokio::io::AsyncBufReadExt;
        lines.read_line(&mut text).await.unwrap();
    }
    assert_eq!(text, "0\n 0 100000 1000\nnull\nagain\n1\n");
    let command = "id -u; touch /tmp/mine; hostname";
    let output = guest
        .exec("c", "e", &process(&["sh", "-c", command]))
        .await
        .unwrap();
    assert_eq!(output.stdout, "0\nweb-0\n", "{output:?}");
    let mut other = process(&["true"]);
    other["user"] = json!({"uid": 5000, "gid": 0});
    let (code, text) = failure(guest.exec("c", "f", &other).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    use std::os::unix::fs::MetadataExt;
    let mine = std::fs::metadata(guest.root().join("tmp/mine")).unwrap();
    assert_eq!(mine.uid(), 100_000);
}
