//! The guest's network beside QEMU's: the same kernel and guest behind a card of ours and of
//! QEMU's microvm, both moved by the monitor itself and both by the host's kernel (vhost).
//!
//! The guest answers on some ports: one sends back what it hears, one swallows, eight give.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rootfs_builder::cpio;
use rootfs_builder::tree::{Node, Tree};
use system_tests::guest::{bin, share};
use vmm::config::{BootConfig, DeviceConfig, Mac, NetConfig, Rate, Resource, VmConfig};
use vmm::launch::{Launch, Process};

use crate::RUNS;
use crate::exits::Exits;
use crate::report::Report;

/// The guest's first process.
const INIT: &str = "#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b ip addr add 10.11.0.2/24 dev eth0
$b ip link set eth0 up
$b nc -ll -p 9 -e /bin/swallow &
for port in 20 21 22 23 24 25 26 27; do $b nc -ll -p $port -e /bin/give & done
$b nc -ll -p 7 -e /bin/busybox cat
";
const SWALLOW: &str = "#!/bin/busybox sh\nexec /bin/busybox dd of=/dev/null bs=64k 2>/dev/null\n";
const GIVE: &str =
    "#!/bin/busybox sh\nexec /bin/busybox dd if=/dev/zero bs=64k count=COUNT 2>/dev/null\n";

const TAP: &str = "bhbench0";
const HOST: &str = "10.11.0.1/24";
const GUEST: &str = "10.11.0.2";
const MAC: Mac = Mac([2, 0, 0, 0, 11, 2]);
const MEMORY_MIB: u64 = 128;

/// Requests of one byte, one after the other.
const REQUESTS: usize = 1000;
/// Bytes of a stream.
const STREAM: usize = 16 << 20;

/// Who moves the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mover {
    /// The monitor.
    Monitor,
    /// The host's kernel.
    Vhost,
}

/// What one machine did.
#[derive(Debug, Default)]
struct Runs {
    requests_per_s: Vec<f64>,
    round_trip_us: Vec<f64>,
    exits_per_request: Vec<f64>,
    to_guest: Vec<f64>,
    from_guest: Vec<f64>,
    eight: Vec<f64>,
}

/// Takes [`RUNS`] of each, in turns.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let initramfs = initramfs(dir.path())?;
    for mover in [Mover::Monitor, Mover::Vhost] {
        let (mut ours, mut peer) = (Runs::default(), Runs::default());
        for _ in 0..RUNS {
            let tap = Tap::new()?;
            let machine = start_ours(&initramfs, mover)?;
            ours.take().with_context(|| format!("ours, {mover:?}"))?;
            drop(machine);
            drop(tap);
            let tap = Tap::new()?;
            let machine = start_qemu(&initramfs, mover)?;
            peer.take().with_context(|| format!("QEMU, {mover:?}"))?;
            drop(machine);
            drop(tap);
        }
        let (names, qemu) = match mover {
            Mover::Monitor => (
                [
                    "net.requests_per_s",
                    "net.round_trip",
                    "net.exits_per_request",
                    "net.to_guest",
                    "net.from_guest",
                    "net.from_guest_8",
                ],
                "qemu microvm",
            ),
            Mover::Vhost => (
                [
                    "net.vhost_requests_per_s",
                    "net.vhost_round_trip",
                    "net.vhost_exits_per_request",
                    "net.vhost_to_guest",
                    "net.vhost_from_guest",
                    "net.vhost_from_guest_8",
                ],
                "qemu + vhost",
            ),
        };
        let columns = [
            ("1/s", &ours.requests_per_s, &peer.requests_per_s),
            ("µs", &ours.round_trip_us, &peer.round_trip_us),
            ("exits", &ours.exits_per_request, &peer.exits_per_request),
            ("MiB/s", &ours.to_guest, &peer.to_guest),
            ("MiB/s", &ours.from_guest, &peer.from_guest),
            ("MiB/s", &ours.eight, &peer.eight),
        ];
        for (name, (unit, ours, peer)) in names.into_iter().zip(columns) {
            report.compare((name, unit), ours, (qemu, peer));
        }
    }
    Ok(())
}

impl Runs {
    /// Measures the guest that runs.
    fn take(&mut self) -> Result<()> {
        let mut echo = connect(7)?;
        echo.set_nodelay(true)?;
        let mut times = Vec::with_capacity(REQUESTS);
        let mut byte = [0];
        // the first ones warm the caches of both sides
        for request in 0..REQUESTS / 10 {
            echo.write_all(&[request as u8])?;
            echo.read_exact(&mut byte)?;
        }
        let exits = Exits::count()?;
        let start = Instant::now();
        for request in 0..REQUESTS {
            let sent = Instant::now();
            echo.write_all(&[request as u8])?;
            echo.read_exact(&mut byte)?;
            times.push(sent.elapsed());
            ensure!(byte == [request as u8], "the guest answers something else");
        }
        let time = start.elapsed();
        let exits = exits.read()?.total();
        drop(echo);
        times.sort();
        self.requests_per_s
            .push(REQUESTS as f64 / time.as_secs_f64());
        self.round_trip_us
            .push(times[REQUESTS / 2].as_secs_f64() * 1e6);
        self.exits_per_request.push(exits as f64 / REQUESTS as f64);
        self.to_guest.push(swallow()?);
        self.from_guest.push(give(1)?);
        self.eight.push(give(8)?);
        eprintln!("{self:?}");
        Ok(())
    }
}

/// How fast the guest takes a stream.
fn swallow() -> Result<f64> {
    let mut stream = connect(9)?;
    let block = vec![0x5a; 64 << 10];
    let start = Instant::now();
    for _ in 0..STREAM / block.len() {
        stream.write_all(&block)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // the guest's end comes when it has read everything
    stream.read_to_end(&mut Vec::new())?;
    Ok(mib_per_s(STREAM, start.elapsed()))
}

/// How fast the guest gives so many streams at once.
fn give(count: u16) -> Result<f64> {
    let share = STREAM / usize::from(count);
    let start = Instant::now();
    let readers: Vec<_> = (0..count)
        .map(|number| {
            thread::spawn(move || -> Result<usize> {
                let mut stream = connect(20 + number)?;
                let mut block = vec![0; 256 << 10];
                let mut total = 0;
                while total < share {
                    match stream.read(&mut block)? {
                        0 => break,
                        read => total += read,
                    }
                }
                Ok(total)
            })
        })
        .collect();
    let mut total = 0;
    for reader in readers {
        total += reader
            .join()
            .map_err(|_| anyhow::anyhow!("a reader failed"))??;
    }
    ensure!(total >= STREAM, "the guest gave {total} bytes");
    Ok(mib_per_s(total, start.elapsed()))
}

fn mib_per_s(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / time.as_secs_f64()
}

/// Connects as soon as the guest listens.
fn connect(port: u16) -> Result<TcpStream> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let address = format!("{GUEST}:{port}").parse()?;
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => {
                return Err(error).context("the guest does not answer");
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// The host's end of the cable.
struct Tap;

impl Tap {
    fn new() -> Result<Self> {
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
        let tap = Self;
        ip(&["addr", "add", HOST, "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // its monitor may not be gone yet, which does not matter to it
        let _ = ip(&["link", "del", TAP]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status()?;
    ensure!(status.success(), "ip {arguments:?} failed");
    Ok(())
}

fn start_ours(initramfs: &Path, mover: Mover) -> Result<Process> {
    let path = fs::canonicalize(bin("bulkhead-vmm")?)?;
    let program = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)?;
    let vhost = match mover {
        Mover::Monitor => Vec::new(),
        Mover::Vhost => vec![Resource::Path("/dev/vhost-net".into())],
    };
    let card = NetConfig {
        taps: vec![Resource::Path(format!("/sys/class/net/{TAP}").into())],
        vhost,
        mac: MAC,
        mtu: None,
        to_guest: Rate::default(),
        from_guest: Rate::default(),
    };
    let config = VmConfig {
        boot: BootConfig {
            kernel: Resource::Path(share("vmlinux")?),
            image: None,
            initrd: Some(Resource::Path(initramfs.to_owned())),
            cmdline: shim::sandbox::cmdline(),
        },
        cpus: 1,
        memory_mib: MEMORY_MIB,
        kvm: None,
        console_log: None,
        control: None,
        serial: None,
        devices: vec![DeviceConfig::Net(card)],
    };
    Ok(Launch::new(program.into()).spawn(&config)?)
}

fn start_qemu(initramfs: &Path, mover: Mover) -> Result<Running> {
    let vhost = match mover {
        Mover::Monitor => "off",
        Mover::Vhost => "on",
    };
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "microvm,acpi=off,rtc=on,pit=off,isa-serial=off"]);
    qemu.args(["-accel", "kvm", "-cpu", "host", "-nodefaults", "-no-reboot"]);
    qemu.args([
        "-m",
        &MEMORY_MIB.to_string(),
        "-no-user-config",
        "-display",
        "none",
    ]);
    qemu.args(["-global", "virtio-mmio.force-legacy=false", "-kernel"]);
    qemu.arg(share("vmlinux")?).arg("-initrd").arg(initramfs);
    qemu.args([
        "-append",
        "quiet console=ttynull 8250.nr_uarts=0 panic=-1 reboot=t",
    ]);
    qemu.args([
        "-netdev",
        &format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"),
    ]);
    qemu.args([
        "-device",
        &format!("virtio-net-device,netdev=net,mac={MAC}"),
    ]);
    let child = qemu.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    Ok(Running(child.context("cannot start QEMU")?))
}

/// A process that is killed and reaped when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn initramfs(dir: &Path) -> Result<PathBuf> {
    let mut tree = Tree::new();
    for name in ["bin", "dev", "proc"] {
        tree.add(name, Node::Directory { mode: 0o755 })?;
    }
    let file = |source: PathBuf| Node::File {
        mode: 0o755,
        source,
    };
    tree.add("bin/busybox", file("/bin/busybox".into()))?;
    let give = GIVE.replace("COUNT", &(STREAM / (64 << 10)).to_string());
    for (name, text) in [
        ("init", INIT),
        ("bin/swallow", SWALLOW),
        ("bin/give", give.as_str()),
    ] {
        let path = dir.join(name.replace('/', "-"));
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        tree.add(name, file(path))?;
    }
    let archive = dir.join("initramfs");
    cpio::write(&tree, &archive).context("cannot write the initramfs")?;
    Ok(archive)
}
