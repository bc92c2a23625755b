//! A pod's network namespace, joined with a guest, and the same network set up by the agent.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use agent::network::Network as GuestNetwork;
use anyhow::{Context, Result, ensure};
use netlink::{Change, Socket};
use nix::sys::socket::{setsockopt, sockopt};
use protocol::agent::ConfigureNetworkRequest;
use shim::network::{Changes, Left, Loopback, Namespace, Network, Reason};
use system_tests::{
    client::until,
    guest::{Guest, Plan},
    verbs::{Container, eventually},
};
use vmm::config::DeviceConfig;

/// A namespace and what is made for it at the host, removed when dropped.
struct Pod(&'static str);

impl Pod {
    /// One with a veth and a macvlan, as network plug-ins make them.
    fn new(name: &'static str) -> Result<Self> {
        ip(&format!("netns add {name}"))?;
        let pod = Self(name);
        // a veth: the host is the router
        ip(&format!(
            "link add bhveth0 type veth peer name eth0 address 02:00:00:00:08:02 netns {name}"
        ))?;
        ip("addr add 10.8.0.1/24 dev bhveth0")?;
        ip("-6 addr add fd08::1/64 dev bhveth0 nodad")?;
        ip("link set bhveth0 mtu 1400 up")?;
        pod.ip("addr add 10.8.0.2/24 dev eth0")?;
        pod.ip("-6 addr add fd08::2/64 dev eth0 nodad")?;
        pod.ip("link set eth0 mtu 1400 up")?;
        pod.ip("link set lo up")?;
        pod.ip("route add default via 10.8.0.1")?;
        pod.ip("-6 route add default via fd08::1")?;
        pod.ip("route add 192.0.2.0/24 via 10.8.0.9 metric 7 mtu 1300")?;
        pod.ip("neigh add 10.8.0.9 lladdr 02:00:00:00:08:09 dev eth0 nud permanent")?;
        // a macvlan, and another one at the host to talk to
        ip("link add bhdummy0 type dummy")?;
        ip("link set bhdummy0 up")?;
        ip(&format!(
            "link add link bhdummy0 name net1 netns {name} type macvlan mode bridge"
        ))?;
        ip("link add link bhdummy0 name bhmac0 type macvlan mode bridge")?;
        ip("addr add 10.7.0.1/24 dev bhmac0")?;
        ip("link set bhmac0 up")?;
        pod.ip("addr add 10.7.0.2/24 dev net1")?;
        pod.ip("link set net1 up")?;
        Ok(pod)
    }

    fn ip(&self, arguments: &str) -> Result<String> {
        ip(&format!("-n {} {arguments}", self.0))
    }

    fn open(&self) -> Result<File> {
        Ok(File::open(format!("/run/netns/{}", self.0))?)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = ip(&format!("netns del {}", self.0));
        for link in [
            "bhmac0", "bhdummy0", "bhdummy2", "bhdummy3", "bhdummy4", "bhveth0", "bhveth1",
        ] {
            let _ = ip(&format!("link del {link}"));
        }
    }
}

fn ip(arguments: &str) -> Result<String> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &str) -> Result<String> {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn every_interface_of_a_pod_is_joined_with_its_guest() -> Result<()> {
    let pod = Pod::new("bhpod1")?;
    let mut network = Network::open(Some(pod.open()?.into()))?;
    let mut guest = Guest::start(Plan::default())?;

    let cards = network.join()?;
    let names: Vec<_> = cards.iter().map(|card| card.name.as_str()).collect();
    assert_eq!(names, ["eth0", "net1"]);
    for card in &cards {
        let (config, fds) = card.hot_plug();
        guest
            .control()?
            .add_device(DeviceConfig::Net(config), &fds)?;
    }
    guest.sh("echo 1 > /sys/bus/pci/rescan")?;
    assert_eq!(
        guest.sh("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu")?,
        "02:00:00:00:08:02\n1400\n"
    );
    guest.sh("echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad")?;
    guest.sh("ip addr add 10.8.0.2/24 dev eth0; ip addr add fd08::2/64 dev eth0")?;
    guest.sh("ip link set eth0 up; ip addr add 10.7.0.2/24 dev eth1; ip link set eth1 up")?;

    guest.sh("ping -c 1 -W 5 10.8.0.1 && ping -c 1 -W 5 fd08::1 && ping -c 1 -W 5 10.7.0.1")?;
    // who calls the pod reaches the guest and not the namespace
    guest.sh("(echo from the guest | nc -l -p 80) &")?;
    let mut answer = String::new();
    until("the guest's server", || {
        answer = run("timeout", "20 busybox nc -w 5 10.8.0.2 80").unwrap_or_default();
        Ok(!answer.is_empty())
    })?;
    assert_eq!(answer, "from the guest\n");

    // What comes later is found, and only that.
    assert!(network.join()?.is_empty());
    let peer = "link add bhveth1 type veth peer name eth7 netns bhpod1";
    ip(peer)?;
    let left = Left {
        name: "eth7".to_owned(),
        reason: Reason::Down,
    };
    assert_eq!(network.left()?, [left]);
    pod.ip("link set eth7 up")?;
    assert_eq!(network.join()?.len(), 1);

    // Nothing is left in the namespace.
    drop(network);
    let links = pod.ip("-o link")?;
    assert!(!links.contains("bulkhead"), "{links}");
    for link in ["eth0", "net1", "eth7"] {
        let filters = run("tc", &format!("-n bhpod1 qdisc show dev {link} ingress"))?;
        assert_eq!(filters, "", "{link}");
    }
    Ok(())
}

#[test]
fn the_agent_sets_up_what_the_host_has() -> Result<()> {
    let pod = Pod::new("bhpod2")?;
    let mut network = Network::open(Some(pod.open()?.into()))?;
    network.join()?;
    let request = network.request()?;

    // the guest's cards: the same addresses under other names, one of them in the way
    let guest = Namespace::fresh()?;
    guest.run(|| {
        let kernel = Socket::open()?;
        for (name, interface) in ["net1", "eth0"].iter().zip(&request.interfaces) {
            kernel.add_link(name, "dummy")?;
            let links = kernel.links()?;
            let link = links.iter().find(|link| link.name == *name);
            let mac = Change {
                mac: interface.mac.as_slice().try_into().ok(),
                ..Change::default()
            };
            kernel.change_link(link.map_or(0, |link| link.index), &mac)?;
        }
        Ok(())
    })?;
    configure(&guest, request.clone(), ConfigureNetworkRequest::default())?;
    // again, as when a further interface comes
    configure(&guest, request.clone(), request.clone())?;

    let ours = shown(&guest)?;
    let theirs = shown(network.namespace())?;
    assert_eq!(ours, theirs);
    assert_eq!(ours.len(), 9, "{ours:#?}");

    // What goes at the host goes in the guest, and what a program of the guest made stays.
    guest.run(|| {
        let kernel = Socket::open()?;
        let links = kernel.links()?;
        let link = links.iter().find(|link| link.name == "eth0");
        let mut own = kernel.addresses()?;
        own.retain(|one| link.is_some_and(|link| link.index == one.index) && one.scope == 0);
        let own = own.into_iter().find(|one| one.address.is_ipv4());
        let mut own = own.ok_or(io::ErrorKind::NotFound)?;
        own.address = [10, 8, 0, 77].into();
        own.prefix_len = 32;
        own.broadcast = None;
        kernel.add_address(&own)
    })?;
    pod.ip("addr add 10.7.1.2/24 dev net1")?;
    pod.ip("addr del 10.7.0.2/24 dev net1")?;
    pod.ip("route replace default via 10.8.0.9")?;
    pod.ip("route del 192.0.2.0/24")?;
    pod.ip("neigh del 10.8.0.9 dev eth0")?;
    pod.ip("-6 route del default")?;
    let next = network.request()?;
    assert_ne!(request, next);
    configure(&guest, next.clone(), request)?;
    let mut ours = shown(&guest)?;
    let own = ours
        .iter()
        .position(|line| line == "addr eth0 10.8.0.77/32");
    ours.remove(own.context("the guest's own address is gone")?);
    assert_eq!(ours, shown(network.namespace())?);
    let request = next;

    let mut missing = request.clone();
    missing.interfaces[0].mac[5] ^= 1;
    let error = configure(&guest, missing, request).unwrap_err();
    assert!(
        error.to_string().contains("there is no network card"),
        "{error:#}"
    );
    Ok(())
}

#[test]
fn the_pods_loopback_at_the_host_is_the_guests() -> Result<()> {
    let pod = Namespace::fresh()?;
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let forwarding = forward(pod.clone(), ended)?;

    for local in ["127.0.0.1", "::1"] {
        let address = serve(local.parse()?)?;
        first_attempt(|| {
            assert_eq!(ask(&pod, address, b"hello")?, b"hello");
            Ok(())
        })?;
        // many at a time, each with its own answer
        thread::scope(|scope| {
            let clients: Vec<_> = (0..40)
                .map(|number: u32| {
                    let pod = &pod;
                    scope.spawn(move || {
                        let text = number.to_string().repeat(5000).into_bytes();
                        Ok(ask(pod, address, &text)? == text)
                    })
                })
                .collect();
            for client in clients {
                let same: io::Result<bool> = client.join().unwrap_or(Ok(false));
                assert!(matches!(same, Ok(true)), "{same:?}");
            }
        });
        // nobody listens there
        let unused = TcpListener::bind((address.ip(), 0))?.local_addr()?;
        first_attempt(|| {
            let error = ask(&pod, unused, b"hello").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
            Ok(())
        })?;
    }

    // what is broken off in the guest does not end as if it were whole
    let breaker = TcpListener::bind("127.0.0.1:0")?;
    let address = breaker.local_addr()?;
    let breaking = thread::spawn(move || -> io::Result<()> {
        let (mut client, _) = breaker.accept()?;
        // Not before the connection stands at both ends, or it is one that was refused.
        client.read_to_end(&mut Vec::new())?;
        client.write_all(b"half of it")?;
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&client, sockopt::Linger, &linger)?;
        Ok(())
    });
    let error = ask(&pod, address, b"hello").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(matches!(breaking.join(), Ok(Ok(()))));

    let address = serve("127.0.0.1".parse()?)?;
    drop(end);
    assert!(forwarding.join().is_ok());
    let error = ask(&pod, address, b"hello").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    Ok(())
}

/// Leads connections to the pod's loopback on a thread with a runtime, until told to end. The
/// lab's own loopback stands for the guest's, and the agent's part runs here.
fn forward(
    pod: Namespace,
    ended: tokio::sync::oneshot::Receiver<()>,
) -> Result<thread::JoinHandle<()>> {
    let (tell, started) = std::sync::mpsc::channel();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let thread = thread::spawn(move || {
        runtime.block_on(async {
            let loopback = Loopback::start(&pod, || async {
                let (ours, theirs) = tokio::net::UnixStream::pair()?;
                tokio::spawn(agent::forward::answer(theirs));
                Ok(ours)
            });
            let running = loopback.map(|loopback| (loopback, tell.send(Ok(()))));
            match running {
                Ok(_running) => drop(ended.await),
                Err(error) => drop(tell.send(Err(error))),
            }
        });
    });
    started.recv()??;
    Ok(thread)
}

/// Listens at a free port and sends back what it hears.
fn serve(at: IpAddr) -> Result<SocketAddr> {
    let listener = TcpListener::bind((at, 0))?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut heard = Vec::new();
                client.read_to_end(&mut heard)?;
                client.write_all(&heard)
            });
        }
    });
    Ok(address)
}

/// That a client is answered at its first attempt: the second one comes after a second. A machine
/// that is busy with others may take as long, so one quick answer of several is enough.
fn first_attempt(mut ask: impl FnMut() -> Result<()>) -> Result<()> {
    let mut times = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        ask()?;
        times.push(start.elapsed());
        if start.elapsed() < Duration::from_millis(900) {
            return Ok(());
        }
    }
    anyhow::bail!("answered after {times:?}")
}

/// Says something in the namespace and returns the answer.
fn ask(pod: &Namespace, to: SocketAddr, what: &[u8]) -> io::Result<Vec<u8>> {
    pod.run(|| {
        let mut stream = TcpStream::connect(to)?;
        stream.write_all(what)?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    })
}

/// Does what the agent does, in the guest's stead, when it was told of `before` last.
fn configure(
    guest: &Namespace,
    request: ConfigureNetworkRequest,
    before: ConfigureNetworkRequest,
) -> Result<()> {
    let request = GuestNetwork::try_from(request)?;
    let before = GuestNetwork::try_from(before)?;
    let done = guest.run(move || Ok(request.configure(&before)))?;
    Ok(done?)
}

/// What a program in the namespace sees of its network, by names, without what is our own.
fn shown(namespace: &Namespace) -> Result<Vec<String>> {
    let (links, addresses, routes, neighbours) = namespace.run(|| {
        let kernel = Socket::open()?;
        let all = (
            kernel.links()?,
            kernel.addresses()?,
            kernel.routes()?,
            kernel.neighbours()?,
        );
        Ok(all)
    })?;
    let name = |index: u32| {
        let link = links.iter().find(|link| link.index == index);
        link.map_or("", |link| link.name.as_str())
    };
    let mut all = Vec::new();
    for link in &links {
        if ["eth0", "net1"].contains(&link.name.as_str()) {
            all.push(format!("link {} {:?} {}", link.name, link.mac, link.mtu));
        }
    }
    for one in addresses {
        // each kernel makes those of its links itself
        if one.scope == 0 {
            all.push(format!(
                "addr {} {}/{}",
                name(one.index),
                one.address,
                one.prefix_len
            ));
        }
    }
    for route in routes {
        if route.protocol == netlink::Route::OF_KERNEL {
            continue;
        }
        let hops: Vec<_> = route
            .hops
            .iter()
            .map(|hop| (name(hop.index), hop.gateway))
            .collect();
        all.push(format!(
            "route {}/{} {hops:?} {} {:?}",
            route.destination.address, route.destination.prefix_len, route.priority, route.mtu
        ));
    }
    for one in neighbours {
        all.push(format!(
            "neigh {} {} {:?}",
            name(one.index),
            one.address,
            one.mac
        ));
    }
    all.sort();
    Ok(all)
}

/// A ping by the guest, and a question to what it serves, between its address and that of the other
/// end, where `host` runs programs.
fn both_ways(guest: &mut Guest, host: &str, ours: &str, theirs: &str) -> Result<()> {
    guest.sh(&format!("ping -c 1 -W 5 {theirs}"))?;
    let ask = format!("{host}timeout 20 busybox nc -w 5 {ours} 80");
    let (program, arguments) = ask.split_once(' ').context("no command")?;
    eventually(&format!("an answer at {ours}"), || {
        Ok(run(program, arguments).is_ok_and(|answer| answer == "from the guest\n"))
    })
}

#[test]
fn ipvlans_taps_and_bridges_are_joined_and_what_cannot_be_is_refused() -> Result<()> {
    let pod = Pod::new("bhpod4")?;
    let mut network = Network::open(Some(pod.open()?.into()))?;
    let mut guest = Guest::start(Plan::default())?;
    let plug = |network: &mut Network, guest: &mut Guest, expected: &str| -> Result<String> {
        let cards = network.join()?;
        let names: Vec<_> = cards.iter().map(|card| card.name.as_str()).collect();
        assert_eq!(names, [expected]);
        let (config, fds) = cards[0].hot_plug();
        let mac = config.mac.to_string();
        let mut vmm = guest.control()?;
        vmm.add_device(DeviceConfig::Net(config), &fds)?;
        guest.sh("echo 1 > /sys/bus/pci/rescan")?;
        let find = format!(
            "for i in /sys/class/net/*; do grep -q {mac} $i/address && basename $i; done; true"
        );
        Ok(guest.sh(&find)?.trim().to_owned())
    };
    guest.sh("(while :; do echo from the guest | nc -l -p 80; done) &")?;
    // Those that every pod of this test has.
    drop(network.join()?);

    for (mode, third) in [("l2", 2), ("l3", 3)] {
        ip(&format!("link add bhdummy{third} type dummy"))?;
        ip(&format!("link set bhdummy{third} up"))?;
        let new = format!("link add link bhdummy{third} name");
        ip(&format!(
            "{new} ipv{third} netns bhpod4 type ipvlan mode {mode}"
        ))?;
        ip(&format!("{new} bhipv{third} type ipvlan mode {mode}"))?;
        ip(&format!("addr add 10.6.{third}.1/24 dev bhipv{third}"))?;
        ip(&format!("link set bhipv{third} up"))?;
        pod.ip(&format!("addr add 10.6.{third}.2/24 dev ipv{third}"))?;
        pod.ip(&format!("link set ipv{third} up"))?;
        let name = plug(&mut network, &mut guest, &format!("ipv{third}"))?;
        let arp = if mode == "l3" { "arp off" } else { "arp on" };
        guest.sh(&format!("ip link set {name} {arp}"))?;
        guest.sh(&format!("ip addr add 10.6.{third}.2/24 dev {name}"))?;
        guest.sh(&format!("ip link set {name} up"))?;
        let (ours, theirs) = (format!("10.6.{third}.2"), format!("10.6.{third}.1"));
        both_ways(&mut guest, "", &ours, &theirs).with_context(|| format!("ipvlan {mode}"))?;
    }
    // A second one of a master has its address again.
    ip("link add link bhdummy2 name ipv4 netns bhpod4 type ipvlan mode l2")?;
    pod.ip("link set ipv4 up")?;
    let error = format!("{:#}", anyhow::Error::from(network.join().unwrap_err()));
    assert!(
        error.contains("\"ipv4\"") && error.contains("another interface's"),
        "{error}"
    );
    pod.ip("link del ipv4")?;
    ip("link add bhdummy4 type dummy")?;
    ip("link add link bhdummy4 name ipv5 netns bhpod4 type ipvlan mode l3s")?;
    pod.ip("link set ipv5 up")?;
    let error = format!("{:#}", anyhow::Error::from(network.join().unwrap_err()));
    assert!(
        error.contains("\"ipv5\"") && error.contains("mode l3s"),
        "{error}"
    );
    pod.ip("link del ipv5")?;

    // The other end of a tap is the namespace's own.
    pod.ip("tuntap add dev tap0 mode tap vnet_hdr")?;
    pod.ip("addr add 10.6.4.1/24 dev tap0")?;
    pod.ip("link set tap0 up")?;
    let name = plug(&mut network, &mut guest, "tap0")?;
    guest.sh(&format!("ip addr add 10.6.4.2/24 dev {name}"))?;
    guest.sh(&format!("ip link set {name} up"))?;
    both_ways(&mut guest, "ip netns exec bhpod4 ", "10.6.4.2", "10.6.4.1").context("a tap")?;

    // A bridge is the guest's, and its port is the bridge's.
    ip("link add bhveth1 type veth peer name eth7 netns bhpod4")?;
    ip("addr add 10.6.5.1/24 dev bhveth1")?;
    ip("link set bhveth1 up")?;
    pod.ip("link add br0 type bridge")?;
    pod.ip("link set eth7 master br0 up")?;
    pod.ip("addr add 10.6.5.2/24 dev br0")?;
    pod.ip("link set br0 up")?;
    let name = plug(&mut network, &mut guest, "br0")?;
    let port = Left {
        name: "eth7".to_owned(),
        reason: Reason::Port,
    };
    assert_eq!(network.left()?, [port]);
    guest.sh(&format!("ip addr add 10.6.5.2/24 dev {name}"))?;
    guest.sh(&format!("ip link set {name} up"))?;
    both_ways(&mut guest, "", "10.6.5.2", "10.6.5.1").context("a bridge")?;
    pod.ip("tuntap add dev tap1 mode tap vnet_hdr")?;
    pod.ip("link set tap1 master br0 up")?;
    let error = format!("{:#}", anyhow::Error::from(network.join().unwrap_err()));
    assert!(
        error.contains("\"tap1\"") && error.contains("port of a bridge"),
        "{error}"
    );
    Ok(())
}

/// A container whose pod has the network namespace `name`, and that serves an echo at port 80.
fn serving(name: &str) -> Result<Container> {
    let path = format!("/run/netns/{name}");
    let serve = "while :; do busybox nc -l -p 80 -e cat; done";
    let container = Container::create(serve, |config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut();
        for one in namespaces.into_iter().flatten() {
            if one["type"] == "network" {
                one["path"] = path.clone().into();
            }
        }
    })?;
    container.ok(&["start", "web"])?;
    Ok(container)
}

/// What a command line prints in the container, whether it succeeds or not.
fn inside(container: &Container, script: &str) -> Result<String> {
    let output = container.run(&["exec", "web", "sh", "-c", script])?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Sends much to an echo, and gets all of it back.
fn echoes(address: &str) -> Result<()> {
    let address: SocketAddr = address.parse()?;
    let mut stream = None;
    eventually(&format!("a connection to {address}"), || {
        stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok();
        Ok(stream.is_some())
    })?;
    let mut stream = stream.context("no connection")?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let sent: Vec<u8> = (0..256 << 10).map(|at: u32| (at / 7) as u8).collect();
    let mut other = stream.try_clone()?;
    let text = sent.clone();
    let sending = thread::spawn(move || other.write_all(&text));
    let mut received = vec![0; sent.len()];
    stream.read_exact(&mut received)?;
    assert!(matches!(sending.join(), Ok(Ok(()))));
    assert!(sent == received, "not what was sent");
    Ok(())
}

#[test]
fn interfaces_come_and_go_while_a_pod_runs() -> Result<()> {
    let pod = Pod::new("bhpod3")?;
    let web = serving("bhpod3")?;
    echoes("10.8.0.2:80")?;

    // Twice, the second time into the place of the first.
    for last in ["7", "8"] {
        // As clients do: step by step, with another name at first.
        ip("link add bhveth1 type veth peer name bhnew netns bhpod3")?;
        pod.ip("link set bhnew name eth7")?;
        pod.ip(&format!("link set eth7 address 02:00:00:00:08:0{last}"))?;
        pod.ip("addr add 10.8.7.2/24 dev eth7")?;
        pod.ip("link set eth7 up")?;
        ip("addr add 10.8.7.1/24 dev bhveth1")?;
        ip("link set bhveth1 up")?;
        pod.ip("route add 192.0.2.128/25 via 10.8.7.1")?;
        eventually("the route by the new interface", || {
            let routes = inside(&web, "busybox ip route")?;
            Ok(routes.contains("192.0.2.128/25 via 10.8.7.1 dev eth7"))
        })?;
        echoes("10.8.7.2:80")?;
        echoes("10.8.0.2:80")?;

        // Its addresses change, and much else before the last of them.
        let changes: String = (0..500)
            .map(|_| "route add 198.51.100.0/24 dev eth7\nroute del 198.51.100.0/24\n")
            .collect();
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("changes");
        std::fs::write(&file, changes)?;
        pod.ip(&format!("-batch {}", file.display()))?;
        pod.ip("addr add 10.8.77.2/24 dev eth7")?;
        pod.ip("addr del 10.8.7.2/24 dev eth7")?;
        ip("addr add 10.8.77.1/24 dev bhveth1")?;
        eventually("the other address", || {
            let addresses = inside(&web, "busybox ip -o -4 addr show dev eth7")?;
            Ok(addresses.contains("10.8.77.2/24") && !addresses.contains("10.8.7.2/24"))
        })?;
        echoes("10.8.77.2:80")?;

        ip("link del bhveth1")?;
        eventually("the interface's end", || {
            let gone = "[ -e /sys/class/net/eth7 ] || echo gone";
            let taps = pod.ip("-o link")?.matches(": bulkhead").count();
            Ok(inside(&web, gone)? == "gone\n" && taps == 2)
        })?;
        echoes("10.8.0.2:80")?;
    }

    // One that was there when the machine was made goes from it as well, and no other.
    pod.ip("link del net1")?;
    eventually("the first interface's end", || {
        let gone = "[ -e /sys/class/net/net1 ] || echo gone";
        let taps = pod.ip("-o link")?.matches(": bulkhead").count();
        Ok(inside(&web, gone)? == "gone\n" && taps == 1)
    })?;
    echoes("10.8.0.2:80")?;

    // With the pod the watch has ended: what held the namespace does not any more.
    web.ok(&["kill", "web", "KILL"])?;
    eventually("its end", || Ok(web.status()? == "stopped"))?;
    web.ok(&["delete", "web"])?;
    ip("netns del bhpod3")?;
    eventually("the namespace's end", || {
        Ok(!Path::new("/sys/class/net/bhveth0").exists())
    })
}

#[test]
fn a_flood_of_changes_is_told_as_few() -> Result<()> {
    let namespace = Namespace::fresh()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let changes = Changes::open(&namespace)?;
        let told = async |within| tokio::time::timeout(within, changes.settled()).await;
        // The loopback was switched on before.
        assert!(told(Duration::from_millis(500)).await.is_err());
        let flood = || {
            namespace.run(|| {
                let kernel = Socket::open()?;
                kernel.add_link("flood0", "bridge")?;
                let links = kernel.links()?;
                let link = links.iter().find(|link| link.name == "flood0");
                let index = link.ok_or(io::ErrorKind::NotFound)?.index;
                for up in (0..4000).map(|count| count % 2 == 0) {
                    let up = Some(up);
                    let change = Change {
                        up,
                        ..Change::default()
                    };
                    kernel.change_link(index, &change)?;
                }
                kernel.delete_link(index)
            })
        };
        for _ in 0..2 {
            flood()?;
            told(Duration::from_secs(10)).await??;
            assert!(
                told(Duration::from_millis(500)).await.is_err(),
                "told twice"
            );
        }
        Ok(())
    })
}
