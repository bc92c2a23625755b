//! A guest's network cards: real traffic over a tap, moved by the VMM and by the host's kernel.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::stat::{Mode, fchmod, fstat},
};
use system_tests::guest::{Guest, Plan};
use vmm::{
    config::{Bucket, DeviceConfig, Mac, NetConfig, Rate, Resource},
    virtio::{Link, net::tap},
};

/// What is sent each way.
const BYTES: usize = 8 << 20;

/// A persistent tap of the host, removed when dropped. The host is at 10.9.N.1 and fd09:N::1.
struct Tap {
    name: String,
    number: u8,
}

impl Tap {
    fn new(number: u8, mtu: u32, flags: &[&str]) -> Result<Self> {
        let name = format!("bhtap{number}");
        let add = [
            &["tuntap", "add", "dev", &name, "mode", "tap", "vnet_hdr"],
            flags,
        ]
        .concat();
        ip(&add)?;
        let tap = Self { name, number };
        ip(&["link", "set", &tap.name, "mtu", &mtu.to_string(), "up"])?;
        ip(&[
            "addr",
            "add",
            &format!("10.9.{number}.1/24"),
            "dev",
            &tap.name,
        ])?;
        let v6 = format!("fd09:{number}::1/64");
        ip(&["-6", "addr", "add", &v6, "dev", &tap.name, "nodad"])?;
        Ok(tap)
    }

    fn queue(&self) -> Resource {
        Resource::Path(format!("/sys/class/net/{}", self.name).into())
    }

    /// Gives the guest's card its addresses.
    fn configure(&self, guest: &mut Guest, card: &str) -> Result<()> {
        let number = self.number;
        guest.sh(&format!(
            "echo 0 > /proc/sys/net/ipv6/conf/{card}/accept_dad; ip addr add 10.9.{number}.2/24 dev {card} && ip link set {card} up && \
             ip -6 addr add fd09:{number}::2/64 dev {card}"
        ))?;
        Ok(())
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("cannot run ip")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments:?}: {error}");
    Ok(())
}

fn card(taps: Vec<Resource>, number: u8) -> NetConfig {
    NetConfig {
        taps,
        vhost: Vec::new(),
        mac: Mac([2, 0, 0, 0, 9, number]),
        mtu: None,
        to_guest: Rate::default(),
        from_guest: Rate::default(),
    }
}

fn guest(cpus: u8, card: NetConfig) -> Result<Guest> {
    Guest::start(Plan {
        cpus,
        devices: vec![DeviceConfig::Net(card)],
        ..Plan::default()
    })
}

/// Bytes that show where they were.
fn pattern() -> Vec<u8> {
    (0..BYTES as u32 / 4)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect()
}

/// Sends a stream to the guest and has it sent back; the kernels check each checksum.
fn streams_arrive(guest: &mut Guest, tap: &Tap) -> Result<()> {
    let number = tap.number;
    guest.sh("nc -l -p 5000 > /tmp/received &")?;
    let mut stream = connect(&format!("[fd09:{number}::2]:5000"))?;
    let start = Instant::now();
    stream.write_all(&pattern())?;
    drop(stream);
    guest.sh("wait")?;
    eprintln!("to the guest: {:?} for {BYTES} bytes", start.elapsed());

    let listener = TcpListener::bind((format!("10.9.{number}.1"), 0))?;
    let port = listener.local_addr()?.port();
    let reader = thread::spawn(move || -> Result<Vec<u8>> {
        let (mut stream, _) = listener.accept()?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    let start = Instant::now();
    guest.sh(&format!("nc 10.9.{number}.1 {port} < /tmp/received"))?;
    let Ok(bytes) = reader.join() else {
        anyhow::bail!("the reader failed");
    };
    eprintln!("from the guest: {:?}", start.elapsed());
    assert!(bytes? == pattern(), "the stream came back changed");
    Ok(())
}

fn connect(address: &str) -> Result<TcpStream> {
    let address: SocketAddr = address.parse()?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

#[test]
fn packets_pass_both_ways_and_whole() -> Result<()> {
    let tap = Tap::new(1, 1500, &[])?;
    let mut guest = guest(1, card(vec![tap.queue()], 1))?;
    guest.sh("mkdir -p /tmp")?;
    assert_eq!(
        guest.sh("cat /sys/class/net/eth0/address")?,
        "02:00:00:00:09:01\n"
    );
    tap.configure(&mut guest, "eth0")?;

    guest.sh("ping -c 2 -W 5 10.9.1.1 && ping -c 2 -W 5 fd09:1::1")?;
    guest.sh("ping -c 2 -W 5 -s 20000 10.9.1.1")?;
    streams_arrive(&mut guest, &tap)?;

    let counters = guest.control()?.counters()?;
    let net = counters.devices.iter().find(|device| device.kind == "net");
    let net = net.context("no network card is counted")?;
    let counted = &net.counted;
    assert_eq!(counted.dropped, 0);
    // many bytes go with each packet, and few packets need a kick or an interrupt
    let bytes = counted.bytes_to_guest + counted.bytes_from_guest;
    eprintln!(
        "bytes for each packet: {}, {counted:?}",
        bytes / counted.requests
    );
    assert!(bytes / counted.requests > 4000);

    // The cable is pulled out and put in again.
    let slot = net.slot;
    let carrier = "for i in 1 2 3 4 5; do [ $(cat /sys/class/net/eth0/carrier) = WANTED ] && \
                   break; sleep 1; done; cat /sys/class/net/eth0/carrier";
    for (link, wanted) in [(Link::Down, "0"), (Link::Up, "1")] {
        guest.control()?.set_link(slot, link)?;
        let seen = guest.sh(&carrier.replace("WANTED", wanted))?;
        assert_eq!(seen.trim(), wanted);
    }
    guest.sh("ping -c 1 -W 5 10.9.1.1")?;

    // A second card comes while the guest runs.
    let (name, queues) = tap::open("bhtap9", 1)?;
    ip(&["addr", "add", "10.9.9.1/24", "dev", &name])?;
    ip(&["link", "set", &name, "up"])?;
    let fds: Vec<_> = queues.iter().map(|fd| fd.as_fd()).collect();
    let second = DeviceConfig::Net(card(vec![Resource::Fd(0)], 9));
    guest.control()?.add_device(second, &fds)?;
    drop(queues);
    guest.sh(
        "echo 1 > /sys/bus/pci/rescan; ip addr add 10.9.9.2/24 dev eth1; ip link set eth1 up",
    )?;
    guest.sh("ping -c 2 -W 5 10.9.9.1")?;
    Ok(())
}

#[test]
fn the_hosts_kernel_moves_packets_in_several_queues() -> Result<()> {
    let tap = Tap::new(2, 9000, &["multi_queue"])?;
    let mut config = card(vec![tap.queue(), tap.queue()], 2);
    let vhost = Resource::Path("/dev/vhost-net".into());
    config.vhost = vec![vhost.clone(), vhost];
    config.mtu = Some(9000);
    let mut guest = guest(2, config)?;
    guest.sh("mkdir -p /tmp")?;
    assert_eq!(guest.sh("cat /sys/class/net/eth0/mtu")?, "9000\n");
    guest.sh("[ -d /sys/class/net/eth0/queues/rx-1 ]")?;
    tap.configure(&mut guest, "eth0")?;
    // a whole jumbo packet, unfragmented
    guest.sh("ping -c 2 -W 5 -s 8900 10.9.2.1")?;
    streams_arrive(&mut guest, &tap)?;
    let counters = guest.control()?.counters()?;
    let net = counters.devices.iter().find(|device| device.kind == "net");
    let counted = &net.context("no network card is counted")?.counted;
    assert_eq!(
        (counted.bytes_to_guest, counted.bytes_from_guest),
        (0, 0),
        "the VMM moves none"
    );
    Ok(())
}

#[test]
fn a_limited_card_is_as_fast_as_its_limit() -> Result<()> {
    let tap = Tap::new(3, 1500, &["multi_queue"])?;
    let mut config = card(vec![tap.queue(), tap.queue()], 3);
    let bytes = Some(Bucket {
        per_second: 1 << 20,
        burst: 64 << 10,
    });
    config.from_guest = Rate {
        bytes,
        packets: None,
    };
    let mut guest = guest(2, config)?;
    tap.configure(&mut guest, "eth0")?;
    let listener = TcpListener::bind("10.9.3.1:0")?;
    let port = listener.local_addr()?.port();
    // Not from `accept` on: on a busy machine that may come when much is there already.
    let start = Instant::now();
    let reader = thread::spawn(move || -> Result<(usize, Duration)> {
        let (mut stream, _) = listener.accept()?;
        let mut bytes = Vec::new();
        let count = stream.read_to_end(&mut bytes)?;
        Ok((count, start.elapsed()))
    });
    guest.sh(&format!(
        "dd if=/dev/zero bs=64k count=48 2>/dev/null | nc 10.9.3.1 {port}"
    ))?;
    let Ok(read) = reader.join() else {
        anyhow::bail!("the reader failed");
    };
    let (count, time) = read?;
    assert_eq!(count, 3 << 20);
    assert!(time > Duration::from_millis(2500), "{time:?}");
    Ok(())
}

#[test]
fn by_a_tap_the_mode_of_its_device_cannot_be_changed() -> Result<()> {
    let (_, queues) = tap::open("bhmode%d", 2)?;
    for queue in queues {
        let mode = Mode::from_bits_truncate(fstat(&queue)?.st_mode);
        assert_eq!(fchmod(&queue, mode), Err(Errno::EROFS));
    }
    Ok(())
}
