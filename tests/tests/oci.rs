//! The verbs of OCI runtimes on a real guest: one container from `create` to
//! `delete`, by the commands that engines give.

use std::{
    fs::{self, File},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use system_tests::{
    client::terminal::Terminal,
    container::{Bundle, pss_kib},
    scratch,
    verbs::{Container, eventually},
};

#[test]
fn a_container_goes_through_every_verb() -> Result<()> {
    let script = "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let web = Container::create(script, |_| {})?;
    assert_eq!(web.status()?, "created");
    assert_eq!(web.output()?, "");
    web.ok(&["start", "web"])?;
    eventually("its first word", || Ok(web.output()? == "up\n"))?;

    let exec = web.run(&[
        "exec",
        "-u",
        "5:6",
        "-e",
        "A=b",
        "web",
        "sh",
        "-c",
        "echo $A; exit 9",
    ])?;
    assert_eq!(
        (exec.status.code(), &exec.stdout[..]),
        (Some(9), &b"b\n"[..])
    );
    let missing = web.run(&["exec", "web", "nope"])?;
    assert_eq!(missing.status.code(), Some(127));
    let words = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(
        words.contains("executable file not found in $PATH"),
        "{words}"
    );

    // Engines leave out of such a file what is as usual.
    let file = web.bundle.path().join("process.json");
    let process = json!({"args": ["sh", "-c", "exit 6"], "cwd": "/", "env": ["PATH=/bin"]});
    fs::write(&file, process.to_string())?;
    let exec = web.run(&["exec", "--process", &file.to_string_lossy(), "web"])?;
    assert_eq!(exec.status.code(), Some(6), "{exec:?}");

    // It knows the size of its terminal from the first moment on.
    let exec = web.command(&["exec", "-t", "web", "sh", "-c", "stty size; exit 7"])?;
    let mut terminal = Terminal::start(exec, 30, 90)?;
    terminal.shows("30 90")?;
    let (status, shown) = terminal.end()?;
    assert_eq!(status, 7, "{shown}");

    let table = web.ok(&["ps", "web"])?;
    assert!(table.contains("trap 'exit 5' TERM"), "{table}");
    web.ok(&["pause", "web"])?;
    assert_eq!(web.status()?, "paused");
    web.ok(&["resume", "web"])?;
    assert_eq!(web.status()?, "running");
    web.ok(&["update", "--pids-limit", "77", "--memory", "100M", "web"])?;
    let stats: Value = serde_json::from_str(&web.ok(&["events", "--stats", "web"])?)?;
    assert_eq!(stats["data"]["pids"]["limit"], 77);
    assert_eq!(stats["data"]["memory"]["usage"]["limit"], 100 << 20);
    assert!(stats["data"]["cpu"]["usage"]["total"].as_u64() > Some(0));

    let (shim, relay) = (pss_kib(web.owner()?)?, pss_kib(web.pid)?);
    assert!(shim < 10 * 1024, "the pod's process takes {shim} KiB");
    assert!(relay < 1024, "the relay takes {relay} KiB");

    kill(web.pid, Signal::SIGTERM)?;
    assert_eq!(web.ended()?, 5);
    eventually("its end", || Ok(web.status()? == "stopped"))?;
    web.ok(&["delete", "web"])?;
    web.bundle.nothing_is_left()
}

#[test]
fn a_machine_that_dies_is_told_at_once_with_its_last_lines_and_leaves_nothing() -> Result<()> {
    let web = Container::create("sleep 1000", |_| {})?;
    web.ok(&["start", "web"])?;
    kill(web.vmm()?, Signal::SIGKILL)?;
    let begin = Instant::now();
    assert_eq!(web.ended()?, 137);
    println!("the machine's death was told after {:?}", begin.elapsed());
    ensure!(
        begin.elapsed() < Duration::from_secs(30),
        "{:?}",
        begin.elapsed()
    );
    eventually("its end", || Ok(web.status()? == "stopped"))?;
    let log = fs::read_to_string(web.state().join("log"))?;
    assert!(log.contains("the VMM was killed by signal 9"), "{log}");
    web.ok(&["delete", "web"])?;
    web.bundle.nothing_is_left()
}

#[test]
fn a_process_that_runs_out_of_memory_is_killed_and_told_of_by_events() -> Result<()> {
    let web = Container::create("sleep 1000", |config| {
        config["linux"]["resources"] = json!({"memory": {"limit": 32 << 20}});
    })?;
    web.ok(&["start", "web"])?;
    let file = web.bundle.path().join("events");
    let mut events = web
        .command(&["events", "--interval", "200ms", "web"])?
        .stdout(File::create(&file)?)
        .spawn()?;
    let told = |word: &str| Ok(fs::read_to_string(&file)?.contains(word));
    eventually("the first counters", || told("\"type\":\"stats\""))?;
    ensure!(!told("\"type\":\"oom\"")?, "told before it happened");
    let hungry = "busybox dd if=/dev/zero bs=1M count=64 2> /dev/null | busybox tail";
    let exec = web.run(&["exec", "web", "sh", "-c", hungry])?;
    ensure!(exec.status.code() == Some(137), "{exec:?}");
    eventually("the event", || told("\"type\":\"oom\""))?;
    assert_eq!(web.status()?, "running");
    web.ok(&["delete", "--force", "web"])?;
    eventually("the end of its events", || Ok(events.try_wait()?.is_some()))?;
    web.bundle.nothing_is_left()
}

#[test]
fn members_of_a_pod_share_its_machine_and_network_and_end_apart() -> Result<()> {
    let shared = scratch::directory()?;
    let volume = json!({"destination": "/v", "type": "bind", "source": shared.path(),
        "options": ["rbind"]});
    let mounts = |config: &mut Value| {
        if let Some(mounts) = config["mounts"].as_array_mut() {
            mounts.push(volume.clone());
        }
    };
    let script = "busybox mkfifo /v/pipe; read line < /v/pipe; \
         echo answered $line > /v/pipe; sleep 1000";
    let infra = Container::create(script, mounts)?;
    infra.ok(&["start", "web"])?;
    // What both mount is one file system to them: a pipe leads from one to the other.
    let script = "hostname; cat /sys/class/net/lo/flags; until [ -p /v/pipe ]; do sleep 0.1; done; \
         echo question > /v/pipe; cat /v/pipe; \
         sleep 1000";
    let app = Bundle::new(&["sh", "-c", script])?;
    std::os::unix::fs::symlink("busybox", app.rootfs().join("bin/hostname"))?;
    app.edit(|config| {
        mounts(config);
        config["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": "web"
        });
        let path = |kind: &str| format!("/proc/{}/ns/{kind}", infra.pid);
        config["linux"]["namespaces"] = json!([
            {"type": "network", "path": path("net")}, {"type": "ipc", "path": path("ipc")},
            {"type": "uts", "path": path("uts")}, {"type": "mount"}, {"type": "pid"}
        ]);
        config
            .as_object_mut()
            .map(|config| config.remove("hostname"));
    })?;
    let output = app.path().join("output");
    let file = File::create(&output)?;
    let bundle = app.path().to_string_lossy().into_owned();
    let run = infra
        .command(&["run", "--detach", "--bundle", &bundle, "app"])?
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()?;
    let said = || fs::read_to_string(&output);
    ensure!(run.success(), "{}", said()?);
    // The sandbox's, by `runc spec`; and a loopback that is up.
    let wanted = "runc\n0x9\nanswered question\n";
    eventually("its host name and volume", || Ok(said()? == wanted))
        .with_context(|| format!("{:?}; the sandbox: {:?}", said(), infra.output()))?;
    assert_eq!(infra.ok(&["list", "-q"])?, "app\nweb\n");
    infra.ok(&["delete", "--force", "web"])?;
    let state: Value = serde_json::from_str(&infra.ok(&["state", "app"])?)?;
    assert_eq!(state["status"], "running");
    infra.ok(&["delete", "--force", "app"])?;
    infra.bundle.nothing_is_left()
}
