//! The guests that the network's figures are taken of, and their cable to the host.

use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use rootfs_builder::cpio;
use rootfs_builder::tree::{Node, Tree};
use system_tests::guest::{bin, share};
use vmm::config::{BootConfig, DeviceConfig, Mac, NetConfig, Rate, Resource, VmConfig};
use vmm::launch::{Launch, Process};

/// The guest's first process.
const INIT: &str = "#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b ip addr add 10.11.0.2/24 dev eth0
$b ip link set eth0 up
for stream in 0 1 2 3 4 5 6 7; do
$b nc -ll -p 1$stream -e /bin/swallow &
$b nc -ll -p 2$stream -e /bin/give &
done
$b nc -ll -p 7 -e /bin/busybox cat
";
const SWALLOW: &str = "#!/bin/busybox sh\nexec /bin/busybox dd of=/dev/null bs=64k 2>/dev/null\n";
const GIVE: &str =
    "#!/bin/busybox sh\nexec /bin/busybox dd if=/dev/zero bs=64k count=COUNT 2>/dev/null\n";

/// The port that sends back what it hears.
pub(super) const ECHO: u16 = 7;
/// The first of eight ports that swallow.
pub(super) const SWALLOWS: u16 = 10;
/// The first of eight ports that give.
pub(super) const GIVES: u16 = 20;

const TAP: &str = "bhbench0";
const HOST: &str = "10.11.0.1/24";
/// The guest's address.
pub(super) const GUEST: &str = "10.11.0.2";
const MAC: Mac = Mac([2, 0, 0, 0, 11, 2]);
const MEMORY_MIB: u64 = 128;

/// Who moves the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mover {
    /// The monitor.
    Monitor,
    /// The host's kernel.
    Vhost,
}

/// The host's end of the cable.
pub(super) struct Tap;

impl Tap {
    pub(super) fn new() -> Result<Self> {
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
        let tap = Self;
        ip(&["addr", "add", HOST, "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        Ok(tap)
    }

    /// How many packets it has carried, in both directions.
    pub(super) fn packets() -> Result<u64> {
        let count = |direction| -> Result<u64> {
            let path = format!("/sys/class/net/{TAP}/statistics/{direction}_packets");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            Ok(text.trim().parse()?)
        };
        Ok(count("rx")? + count("tx")?)
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

/// Boots the guest in a machine of ours.
pub(super) fn start_ours(initramfs: &Path, mover: Mover) -> Result<Process> {
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

/// Boots the guest in a machine of QEMU's.
pub(super) fn start_qemu(initramfs: &Path, mover: Mover) -> Result<Running> {
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
pub(super) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The guest's files; a stream of it has so many blocks of 64 KiB.
pub(super) fn initramfs(dir: &Path, blocks: usize) -> Result<PathBuf> {
    let mut tree = Tree::new();
    for name in ["bin", "dev", "proc"] {
        tree.add(name, Node::Directory { mode: 0o755 })?;
    }
    let file = |source: PathBuf| Node::File {
        mode: 0o755,
        source,
    };
    tree.add("bin/busybox", file("/bin/busybox".into()))?;
    let give = GIVE.replace("COUNT", &blocks.to_string());
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
