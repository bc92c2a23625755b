//! The network, hooks and host cgroup of a containerd task, made by the test as plug-ins make them.

use std::{
    fs,
    io::{self, Read, Write},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shim::network::Namespace;
use system_tests::{
    client::{
        command::{Done, run},
        containerd::{Containerd, Programs},
        images::BUSYBOX,
        leftovers::Leftovers,
        until,
    },
    container::Bundle,
};

const RUNTIME: &str = "io.containerd.bulkhead.v2";

/// What docker does in its own hook: a card for the namespace of the process that it is told of.
const HOOK: &str = r#"#!/bin/sh -e
pid=$(sed 's/.*"pid":\([0-9]*\).*/\1/')
ip link add bhhook0 type veth peer name eth0 netns $pid
ip addr add 10.9.1.1/24 dev bhhook0
ip link set bhhook0 up
nsenter -t $pid -n ip addr add 10.9.1.2/24 dev eth0
nsenter -t $pid -n ip link set eth0 up
"#;

/// A network namespace with a veth, removed when dropped.
struct Netns(&'static str);

impl Netns {
    fn new(name: &'static str) -> Result<Self> {
        shell(&format!("ip netns add {name}"))?;
        let netns = Self(name);
        shell(&format!(
            "ip link add bhtask0 type veth peer name eth0 netns {name} &&
             ip addr add 10.9.0.1/24 dev bhtask0 && ip link set bhtask0 up &&
             ip -n {name} addr add 10.9.0.2/24 dev eth0 && ip -n {name} link set eth0 up &&
             ip -n {name} link set lo up"
        ))?;
        Ok(netns)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = shell(&format!("ip netns del {}", self.0));
    }
}

fn shell(script: &str) -> Result<String> {
    let done = run(Command::new("sh").args(["-c", script]))?;
    ensure!(done.status == 0, "{script}: {}", done.stderr);
    Ok(done.stdout)
}

/// What a server at `address` sends of its file.
fn get(address: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"GET /passwd HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn task(containerd: &Containerd, flags: &[&str], rest: &[&str]) -> Result<Done> {
    let all = [&["run", "--runtime", RUNTIME], flags, rest].concat();
    containerd.ctr(&all)
}

#[test]
fn a_task_has_the_network_the_hooks_and_the_cgroup_of_its_configuration() -> Result<()> {
    told_with(Programs::Debian)
}

#[test]
fn containerd_2_gives_a_task_the_same() -> Result<()> {
    told_with(Programs::Testing)
}

fn told_with(programs: Programs) -> Result<()> {
    let containerd = Containerd::start_from(programs)?;
    containerd.import("default", &[BUSYBOX])?;
    // The first one mounts the directory of all, for good.
    drop(Netns::new("bhfirst")?);
    let before = Leftovers::now()?;
    let told = joined(&containerd)
        .and_then(|()| hooked(&containerd))
        .and_then(|()| refused(&containerd));
    told.with_context(|| containerd.logs())?;
    before.are_all().with_context(|| containerd.logs())
}

fn joined(containerd: &Containerd) -> Result<()> {
    let netns = Netns::new("bhtask")?;
    let flags = [
        "-d",
        "--memory-limit",
        "134217728",
        "--with-ns",
        "network:/run/netns/bhtask",
    ];
    let serve = "httpd -p 127.0.0.1:81 -h /etc; exec httpd -f -p 80 -h /etc";
    task(containerd, &flags, &[BUSYBOX, "t1", "sh", "-c", serve])?.ends_with(0)?;

    until("the container's server", || {
        Ok(get("10.9.0.2:80").is_ok_and(|text| text.contains("root:")))
    })?;
    let inside = Namespace::open(fs::File::open("/run/netns/bhtask")?.into())?;
    let local = inside.run(|| get("127.0.0.1:81"))?;
    assert!(local.contains("root:"), "{local}");

    let list = containerd.ctr(&["tasks", "ls"])?;
    let pid = list.text()?.lines().nth(1).context("no task")?;
    let pid = pid.split_whitespace().nth(1).context("no pid")?;
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    assert_eq!(cgroup.trim(), "0::/default/t1/vmm");
    let limit = fs::read_to_string("/sys/fs/cgroup/default/t1/memory.max")?;
    assert_eq!(limit.trim(), (256 << 20).to_string());

    containerd.ctr(&["tasks", "rm", "-f", "t1"])?;
    containerd.ctr(&["containers", "rm", "t1"])?.ends_with(0)?;
    // Whoever made the namespace finds it as it was.
    until("the tap's end", || {
        let links = shell(&format!("ip -n {} -o link", netns.0))?;
        Ok(links.contains("eth0") && !links.contains("bulkhead"))
    })
}

fn hooked(containerd: &Containerd) -> Result<()> {
    let show = "busybox ip -o addr; busybox ping -c 1 -W 5 10.9.1.1";
    let bundle = Bundle::new(&["sh", "-c", show])?;
    let hook = bundle.path().join("hook");
    fs::write(&hook, HOOK)?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let stopped = bundle.path().join("stopped");
    bundle.edit(|config| {
        config["root"]["path"] = json!(bundle.rootfs());
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_NET_RAW"]);
        }
        let path = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"];
        let write = format!("cat > {}", stopped.display());
        config["hooks"] = json!({
            "prestart": [{"path": hook, "env": path}],
            "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", write], "env": path}]
        });
    })?;
    let config = bundle.path().join("config.json");
    let config = config.to_str().context("a path")?;
    let done = task(containerd, &["--rm", "--config", config], &["t2"])?;
    done.ends_with(0)?;
    assert!(done.stdout.contains("inet 10.9.1.2/24"), "{}", done.stdout);
    assert!(
        done.stdout.contains("1 packets received"),
        "{}",
        done.stdout
    );
    assert!(fs::read_to_string(&stopped)?.contains("\"status\":\"stopped\""));
    until("the card's end", || {
        Ok(!Path::new("/sys/class/net/bhhook0").exists())
    })
}

fn refused(containerd: &Containerd) -> Result<()> {
    let own = ["--rm", "--with-ns", "network:/proc/1/ns/net"];
    for (flags, words) in [
        (&["--rm", "--net-host"][..], "the host's network"),
        (&own[..], "the host's own"),
    ] {
        task(containerd, flags, &[BUSYBOX, "t3", "true"])?.tells(words)?;
        containerd.ctr(&["containers", "rm", "t3"])?;
    }
    Ok(())
}
