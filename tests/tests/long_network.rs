//! Ten thousand connections to a container, short ones, while packets are lost; and programs that people measure with
//! and serve by.

use std::{
    fs::{self, Permissions},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::Signal,
};
use serde_json::{Value, json};
use system_tests::{container::Bundle, host::sh, scratch};
use tempfile::TempDir;

const CONNECTIONS: usize = 10_000;

/// At a time.
const THREADS: usize = 4;

/// For one of them, on a busy lab machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A network namespace with a card whose other end is the host's.
struct Namespace;

impl Namespace {
    fn new() -> Result<Self> {
        let made = Self;
        sh(
            "ip netns add bhlong; ip link add bhlong0 type veth peer name eth0 netns bhlong; \
            ip addr add 10.98.0.1/24 dev bhlong0; ip addr add fd98::1/64 dev bhlong0 nodad; \
            ip link set bhlong0 up; ip -n bhlong link set lo up; \
            ip -n bhlong addr add 10.98.0.2/24 dev eth0; \
            ip -n bhlong addr add fd98::2/64 dev eth0 nodad; ip -n bhlong link set eth0 up",
        )?;
        Ok(made)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = sh("ip link del bhlong0; ip netns del bhlong");
    }
}

/// Lets a container have the namespace.
fn join(config: &mut Value) {
    let namespaces = config["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        if namespace["type"] == "network" {
            namespace["path"] = json!("/run/netns/bhlong");
        }
    }
}

/// One connection with a request and its answer.
fn ask(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /small HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.ends_with("small\n"), "{answer:?}");
    Ok(())
}

#[test]
fn ten_thousand_connections_are_answered_and_none_is_left() -> Result<()> {
    let _namespace = Namespace::new()?;
    let script = "/bin/busybox httpd -p '[::]:80' -h /www; trap 'exit 7' TERM; echo serving; \
         /bin/busybox sleep 3000 & wait";
    let bundle = Bundle::new(&["/bin/sh", "-c", script])?;
    fs::create_dir(bundle.rootfs().join("www"))?;
    fs::write(bundle.rootfs().join("www/small"), "small\n")?;
    bundle.edit(join)?;
    let mut run = bundle.start(&[])?;
    run.wait_for_line("serving")?;
    let addresses: [SocketAddr; 2] = ["10.98.0.2:80".parse()?, "[fd98::2]:80".parse()?];

    // The first half undisturbed, of the second half each hundredth packet is lost.
    for part in ["undisturbed", "with loss"] {
        if part == "with loss" {
            sh("tc qdisc add dev bhlong0 root netem loss 1%")?;
        }
        let begin = Instant::now();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    scope.spawn(move || {
                        let numbers = (0..CONNECTIONS / 2).filter(|n| n % THREADS == thread);
                        for number in numbers {
                            // Each thread takes both families in turn.
                            ask(addresses[number / THREADS % 2])
                                .with_context(|| format!("connection {number} {part}"))?;
                        }
                        anyhow::Ok(())
                    })
                })
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("panic"))?)
        })?;
        println!(
            "{} connections {part} took {:?}",
            CONNECTIONS / 2,
            begin.elapsed()
        );
    }
    let open = sh("ss -Htn state established '( dst 10.98.0.2 or dst [fd98::2] )' | wc -l")?;
    assert_eq!(open, "0");
    run.signal(Signal::SIGTERM)?;
    assert_eq!(run.output()?.status.code(), Some(7));
    bundle.nothing_is_left()
}

/// Debian's root file system with a layer of one's own, at a place.
struct Debian<'a> {
    at: &'a Path,
    _layer: TempDir,
}

impl<'a> Debian<'a> {
    fn mount(at: &'a Path) -> Result<Self> {
        let lower = std::env::var("BULKHEAD_DEBIAN")
            .context("BULKHEAD_DEBIAN is not set: run the long tests by `make test-long`")?;
        let layer = scratch::directory()?;
        let [upper, work] = ["upper", "work"].map(|name| layer.path().join(name));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        let (upper, work) = (upper.display(), work.display());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let kind = Some("overlay");
        mount(kind, at, kind, MsFlags::empty(), Some(options.as_str()))?;
        Ok(Self { at, _layer: layer })
    }

    /// What iperf3 tells of a run against a server.
    fn iperf3(&self, args: &[&str]) -> Result<Value> {
        let (root, args) = (self.at.display(), args.join(" "));
        // Its status is 1 for an error, which it tells in its report.
        let told = sh(&format!("chroot {root} iperf3 --json {args} || true"))?;
        let told: Value = serde_json::from_str(&told).with_context(|| told.clone())?;
        ensure!(told["error"].is_null(), "{args}: {}", told["error"]);
        Ok(told["end"].clone())
    }
}

impl Drop for Debian<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.at, MntFlags::MNT_DETACH);
    }
}

#[test]
fn iperf3_and_nginx_serve_from_a_container() -> Result<()> {
    let _namespace = Namespace::new()?;
    let script = "iperf3 --server >/dev/null & nginx -g 'daemon off;' & \
         for second in {1..300}; do \
             exec 3<>/dev/tcp/127.0.0.1/80 && exec 4<>/dev/tcp/::1/80 && break; sleep 1; \
         done 2>/dev/null; \
         [ -e /dev/fd/4 ] || exit 9; exec 3>&- 4>&-; trap 'exit 7' TERM; echo serving; sleep 3000 & wait $!";
    let bundle = Bundle::new(&["/bin/bash", "-c", script])?;
    let root = bundle.rootfs();
    let debian = Debian::mount(&root)?;
    let noise = scratch::noise(32 << 20)?;
    let large = root.join("var/www/html/large");
    fs::copy(noise.path(), &large)?;
    fs::set_permissions(&large, Permissions::from_mode(0o644))?;
    bundle.edit(join)?;
    bundle.edit(|config| {
        config["root"]["readonly"] = json!(false);
        config["process"]["env"] = json!(["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
        // nginx gives its directories and its workers to a user of its own.
        let own = ["CHOWN", "DAC_OVERRIDE", "SETGID", "SETUID"].map(|name| format!("CAP_{name}"));
        for kind in ["bounding", "effective", "permitted"] {
            let all = config["process"]["capabilities"][kind].as_array_mut();
            all.into_iter()
                .for_each(|all| all.extend(own.iter().map(|name| json!(name))));
        }
    })?;
    let mut run = bundle.start(&["--memory", "512m"])?;
    run.wait_for_line("serving")?;

    let sum = |text: &str| text.split(' ').next().unwrap_or_default().to_owned();
    let whole = sum(&sh(&format!("sha256sum {}", noise.path().display()))?);
    for host in ["10.98.0.2", "[fd98::2]"] {
        println!("nginx, by {host}");
        let place = scratch::directory()?;
        let got = place.path().join("large");
        let got = got.display();
        let load =
            format!("curl -gsSf --max-time 600 -o {got} http://{host}/large; sha256sum {got}");
        ensure!(sum(&sh(&load)?) == whole, "{host}: not what nginx has");
        // One connection, kept for all.
        let many = format!(
            "curl -sSf --max-time 600 -o /dev/null -w '%{{http_code}} %{{num_connects}}\\n' \
             'http://{host}/index.nginx-debian.html?[1-200]' | sort | uniq -c | tr -s ' '"
        );
        let told = sh(&many)?;
        let lines: Vec<_> = told.lines().map(str::trim).collect();
        assert_eq!(lines, ["199 200 0", "1 200 1"], "{host}");
    }

    for (name, args) in [
        ("one stream to it", &["-c", "10.98.0.2"][..]),
        ("one stream from it", &["-c", "10.98.0.2", "--reverse"]),
        ("eight to it", &["-c", "fd98::2", "-P", "8"]),
        ("eight from it", &["-c", "fd98::2", "-P", "8", "--reverse"]),
    ] {
        let told = debian.iperf3(&[args, &["--time", "3"]].concat())?;
        let rate = told["sum_received"]["bits_per_second"].as_f64();
        let rate = rate.with_context(|| format!("{name}: {told}"))?;
        println!("iperf3, {name}: {:.1} Mbit/s", rate / 1e6);
        ensure!(rate > 1e6, "{name}: {rate} bit/s");
    }
    let args = ["-c", "10.98.0.2", "--udp", "--bitrate", "2M", "--time", "3"];
    let told = debian.iperf3(&args)?;
    let lost = told["sum"]["lost_percent"].as_f64();
    let lost = lost.with_context(|| told.to_string())?;
    println!("iperf3, datagrams: {lost:.1} % lost");
    ensure!(lost < 50.0, "{lost} % of the datagrams are lost");

    run.signal(Signal::SIGTERM)?;
    assert_eq!(run.output()?.status.code(), Some(7));
    drop(debian);
    bundle.nothing_is_left()
}
