//! Networks that a client made by Debian's CNI plug-ins before it calls the runtime: a bridge with
//! IPv4, IPv6 and jumbo frames, a published port, a macvlan; with loss, and with an end under load.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use shim::cni::{Attached, Network, Plugins, Port};
use system_tests::{
    container::Bundle,
    host::{curl, rules, sh},
    scratch,
};

/// Enough for a busy lab machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A namespace that is attached to networks as a client of the runtime does it.
struct Pod {
    name: &'static str,
    attached: Vec<Attached>,
}

impl Pod {
    /// With `eth0` at a bridge, IPv4 and IPv6, jumbo frames, and a port of the host; `eth1` is a
    /// macvlan. The loopback's plug-in is called, too.
    fn new(name: &'static str, port: &str) -> Result<Self> {
        sh(&format!(
            "ip netns add {name}; ip link add bhparent type dummy; ip link set bhparent up; \
             ip link add link bhparent name bhpeer type macvlan mode bridge; \
             ip addr add 10.99.1.1/24 dev bhpeer; ip link set bhpeer up"
        ))?;
        let mut pod = Self {
            name,
            attached: Vec::new(),
        };
        let leases = "/run/bhcni-leases";
        let bridge = json!([
            {
                "type": "bridge", "bridge": "bhbridge", "isGateway": true, "ipMasq": true,
                "hairpinMode": true, "mtu": 9000,
                "ipam": {
                    "type": "host-local", "dataDir": leases,
                    "ranges": [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
            {"type": "firewall"},
        ]);
        let macvlan = json!([{
            "type": "macvlan", "master": "bhparent", "mode": "bridge",
            "ipam": {"type": "host-local", "dataDir": leases,
                "ranges": [[{"subnet": "10.99.1.0/24", "rangeStart": "10.99.1.10"}]]},
        }]);
        let networks = [
            ("bhlo", "lo", json!([{"type": "loopback"}]), Vec::new()),
            ("bhnet", "eth0", bridge, Port::parse(port)?),
            ("bhmac", "eth1", macvlan, Vec::new()),
        ];
        let path = format!("/run/netns/{name}");
        for (network, interface, plugins, ports) in networks {
            let value = json!({"name": network, "cniVersion": "1.0.0", "plugins": plugins});
            let network: Network = serde_json::from_value(value)?;
            let place = (name, Path::new(&path));
            let attached = Attached::new(network, place, interface.to_owned());
            let mut attached = attached.with(ports, Plugins::default());
            let made = block_on(attached.add())?;
            pod.attached.push(attached);
            made?;
        }
        Ok(pod)
    }

    /// Detaches it as the client does, while the namespace is there.
    fn detach(&mut self) -> Result<()> {
        while let Some(attached) = self.attached.pop() {
            block_on(attached.remove())??;
        }
        Ok(())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.detach();
        let _ = sh(&format!("ip netns del {}", self.name));
        let _ = sh("ip link del bhparent; ip link del bhbridge");
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> Result<T> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    Ok(runtime.enable_all().build()?.block_on(work))
}

/// A process that ends with the test.
struct Background(Child);

impl Background {
    fn start(command: &mut Command) -> Result<Self> {
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self(quiet.spawn().context("cannot run it")?))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// As many connections, one after the other, each with a request and its answer.
fn short_connections(address: &str, count: usize) -> Result<Duration> {
    let begin = Instant::now();
    for number in 0..count {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /small HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.ends_with("small\n"), "connection {number}: {answer}");
    }
    Ok(begin.elapsed())
}

#[test]
fn a_container_in_a_namespace_of_cni_plug_ins_has_their_networks() -> Result<()> {
    let mut pod = Pod::new("bhcni1", "8090:80")?;
    let bundle = Bundle::new(&["/bin/sh", "-c", "/bin/busybox sh /serve 2>&1"])?;
    let root = bundle.rootfs();
    fs::write(
        root.join("serve"),
        "B=/bin/busybox; $B cat /sys/class/net/eth0/mtu; $B ip -o addr | $B grep -c 'scope global'; \
         $B ping -c 1 -W 9 10.99.0.1  | $B grep -q ' 0% packet loss' && echo four; \
         $B ping -c 1 -W 9 fd99::1  | $B grep -q ' 0% packet loss' && echo six; \
         $B ping -c 1 -W 9 -s 8900 10.99.0.1  | $B grep -q ' 0% packet loss' && echo jumbo; \
         $B ping -c 1 -W 9 10.99.1.1  | $B grep -q ' 0% packet loss' && echo macvlan; \
         $B ping -c 1 -W 9 127.0.0.1  | $B grep -q ' 0% packet loss' && echo loopback; \
         DIG @10.99.0.1 +short +time=9 example.test; DIG @fd99::1 +short +tcp example.test AAAA; \
         $B httpd -p '[::]:80' -h /www; trap 'exit 7' TERM; echo serving; $B sleep 200 & wait"
            .replace(
                "DIG",
                &scratch::program("/usr/bin/dig", &root.join("dig"))?.command("/dig"),
            ),
    )?;
    fs::create_dir(root.join("www"))?;
    fs::write(root.join("www/small"), "small\n")?;
    fs::copy(scratch::noise(4 << 20)?.path(), root.join("www/large"))?;
    bundle.edit(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut();
        for namespace in namespaces.into_iter().flatten() {
            if namespace["type"] == "network" {
                namespace["path"] = json!("/run/netns/bhcni1");
            }
        }
        // Debian's busybox pings with it only.
        for kind in ["bounding", "effective", "permitted"] {
            let own = config["process"]["capabilities"][kind].as_array_mut();
            own.into_iter()
                .for_each(|own| own.push(json!("CAP_NET_RAW")));
        }
    })?;
    // The bridge has its addresses since the first container came.
    let _resolver = Background::start(Command::new("dnsmasq").args([
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--user=root",
        "--pid-file=",
        "--bind-interfaces",
        "--interface=bhbridge",
        "--address=/example.test/192.0.2.7",
        "--address=/example.test/2001:db8::7",
    ]))?;

    let mut run = bundle.start(&[])?;
    let heard = run.lines_until("serving")?;
    let wanted = [
        "9000",
        "3",
        "four",
        "six",
        "jumbo",
        "macvlan",
        "loopback",
        "192.0.2.7",
        "2001:db8::7",
    ];
    assert_eq!(heard, wanted);
    let address = pod.attached[1].addresses()[0].0;
    let six = pod.attached[1].addresses()[1].0;
    let mac = pod.attached[2].addresses()[0].0;
    for url in [
        "http://127.0.0.1:8090/small".to_owned(),
        "http://10.99.0.1:8090/small".to_owned(),
        format!("http://{address}/small"),
        format!("http://[{six}]/small"),
        format!("http://{mac}/small"),
    ] {
        assert_eq!(curl(&url).with_context(|| url.clone())?, "small", "{url}");
    }
    let count = 200;
    let took = short_connections("127.0.0.1:8090", count)?;
    println!("{count} short connections through the published port took {took:?}");

    // Every twentieth packet is lost, in both directions.
    let veth = sh("ip -o link show master bhbridge | sed 's/^[0-9]*: \\([^@:]*\\).*/\\1/'")?;
    sh(&format!(
        "tc qdisc add dev {veth} root netem loss 5% delay 2ms"
    ))?;
    let sum = format!(
        "curl -gsS --noproxy '*' --max-time 110 http://{address}/large | md5sum; md5sum < {}/www/large",
        root.display()
    );
    let sums = sh(&sum)?;
    let sums: Vec<_> = sums.lines().collect();
    assert_eq!(sums[0], sums[1]);
    sh(&format!("tc qdisc del dev {veth} root"))?;

    // The end comes while packets fly; the client finds its namespace as it was.
    let load = format!("while :; do curl -gs --noproxy '*' http://{address}/large; done");
    let load = Background::start(Command::new("sh").args(["-c", &load]))?;
    std::thread::sleep(Duration::from_millis(500));
    run.signal(Signal::SIGTERM)?;
    let begin = Instant::now();
    assert_eq!(run.output()?.status.code(), Some(7));
    println!("the end under load took {:?}", begin.elapsed());
    bundle.nothing_is_left()?;
    drop(load);
    let links = sh("ip -n bhcni1 -o link; tc -n bhcni1 qdisc show dev eth0")?;
    assert!(
        !links.contains("bulkhead") && !links.contains("ingress"),
        "{links}"
    );
    pod.detach()?;
    assert_eq!(rules("8090")?, "");
    assert_eq!(rules(&address.to_string())?, "");
    Ok(())
}
