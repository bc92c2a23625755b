//! The guest itself: clock, entropy, name, CPUs, shared directories, devices.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Component, Path},
    sync::atomic::{AtomicBool, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};

use crate::{disks, log, sys};

/// Why the guest could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host speaks another version of the contract.
    #[error(
        "the host speaks protocol version {0}, this agent {ours}; use the guest image that came with the host's bulkhead",
        ours = protocol::VERSION
    )]
    Version(u32),
    /// A second time.
    #[error("the guest is configured already")]
    Again,
    /// More entropy than the kernel takes at once.
    #[error("{0} bytes of entropy are too many; send at most {max}", max = sys::MAX_ENTROPY)]
    Entropy(usize),
    /// A name that no host has.
    #[error("{0:?} is no host name; it has 1 to 64 letters, digits, dots and hyphens")]
    HostName(String),
    /// A mount point outside the place for them.
    #[error("the mount point {0:?} is not an absolute path below {SHARED_BELOW}, without . or ..")]
    MountPoint(String),
    /// A tag that virtio-fs cannot have.
    #[error("the tag {0:?} is none; virtio-fs has tags of 1 to 36 bytes")]
    Tag(String),
    /// Not the address of a PCI device.
    #[error("{0:?} is no PCI address such as 0000:00:05.0")]
    PciAddress(String),
    /// A disk that is to be left.
    #[error(transparent)]
    Disk(#[from] disks::Error),
    /// A step.
    #[error("cannot {doing}")]
    Step {
        /// What was being done.
        doing: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn doing(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let doing = doing.into();
    move |source| Error::Step { doing, source }
}

/// Shared directories are mounted below this one.
pub const SHARED_BELOW: &str = "/run/bulkhead";

/// What the host tells the guest before its first container.
#[derive(Debug, Default)]
pub struct Configuration {
    /// The version of the contract that the host speaks.
    pub version: u32,
    /// Nanoseconds since the epoch; 0 leaves the clock.
    pub time_ns: u64,
    /// Random bytes.
    pub entropy: Vec<u8>,
    /// The host name; empty leaves it.
    pub hostname: String,
    /// CPUs to have online; 0 leaves them.
    pub online_cpus: u32,
    /// Directories of the host.
    pub shared_directories: Vec<SharedDirectory>,
}

/// A directory of the host.
#[derive(Debug)]
pub struct SharedDirectory {
    /// The device's tag.
    pub tag: String,
    /// Where in the guest.
    pub mount_point: String,
    /// Whether the guest cannot write.
    pub read_only: bool,
}

/// The guest, which is configured once.
#[derive(Debug, Default)]
pub struct Guest {
    configured: AtomicBool,
}

impl Guest {
    /// Does what `configuration` asks for.
    ///
    /// # Errors
    /// When it is not the first, or a step fails.
    pub fn configure(&self, configuration: &Configuration) -> Result<(), Error> {
        if configuration.version != protocol::VERSION {
            return Err(Error::Version(configuration.version));
        }
        if self.configured.swap(true, Ordering::Relaxed) {
            return Err(Error::Again);
        }
        set_clock(configuration.time_ns)?;
        add_entropy(&configuration.entropy)?;
        set_hostname(&configuration.hostname)?;
        bring_online(configuration.online_cpus)?;
        configuration.shared_directories.iter().try_for_each(mount)
    }
}

/// Switches on the loopback interface, which containers have even where there is no other.
///
/// # Errors
/// The kernel's.
pub(crate) fn switch_loopback_on() -> Result<(), Error> {
    sys::loopback_up().map_err(doing("switch the loopback interface on"))
}

fn set_clock(time_ns: u64) -> Result<(), Error> {
    if time_ns == 0 {
        return Ok(());
    }
    let seconds = (time_ns / 1_000_000_000) as i64;
    let rest = (time_ns % 1_000_000_000) as i64;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, rest))
        .map_err(io::Error::from)
        .map_err(doing("set the clock"))
}

fn add_entropy(bytes: &[u8]) -> Result<(), Error> {
    if bytes.is_empty() {
        return Ok(());
    }
    if bytes.len() > sys::MAX_ENTROPY {
        return Err(Error::Entropy(bytes.len()));
    }
    File::open("/dev/urandom")
        .and_then(|pool| sys::add_entropy(pool.as_fd(), bytes))
        .map_err(doing("add the host's entropy"))
}

fn set_hostname(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Ok(());
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if name.len() > 64 || !name.bytes().all(plain) {
        return Err(Error::HostName(name.to_owned()));
    }
    nix::unistd::sethostname(name)
        .map_err(io::Error::from)
        .map_err(doing("set the host name"))
}

/// Brings CPUs online until `count` are, the first being so always.
fn bring_online(count: u32) -> Result<(), Error> {
    for number in 1..count {
        let switch = format!("/sys/devices/system/cpu/cpu{number}/online");
        let is_online = fs::read_to_string(&switch).is_ok_and(|text| text.trim() == "1");
        if !is_online {
            fs::write(&switch, "1").map_err(doing(format!("bring CPU {number} online")))?;
        }
    }
    Ok(())
}

fn mount(shared: &SharedDirectory) -> Result<(), Error> {
    let point = shared.mount_point.as_str();
    if !is_below(point, SHARED_BELOW) {
        return Err(Error::MountPoint(point.to_owned()));
    }
    if !(1..=36).contains(&shared.tag.len()) {
        return Err(Error::Tag(shared.tag.clone()));
    }
    let attr = if shared.read_only {
        libc::MOUNT_ATTR_RDONLY
    } else {
        0
    };
    let mount = || {
        fs::create_dir_all(point)?;
        let context = sys::FsContext::open("virtiofs")?;
        context.set("source", Some(&shared.tag))?;
        let tree = context.mount(attr)?;
        sys::move_mount(tree.as_fd(), File::open(point)?.as_fd())
    };
    mount().map_err(doing(format!(
        "mount the shared directory {:?} on {point}",
        shared.tag
    )))
}

/// Whether `path` is an absolute path, in its plainest form, below `directory`.
fn is_below(path: &str, directory: &str) -> bool {
    let plain = Path::new(path)
        .components()
        .skip(1)
        .all(|component| matches!(component, Component::Normal(_)));
    plain
        && !path.contains('\0')
        && Path::new(path)
            .strip_prefix(directory)
            .is_ok_and(|rest| rest.components().count() > 0)
}

/// Leaves the PCI devices `removed` or, if there are none, looks for new ones.
///
/// # Errors
/// When an address is none, a disk stays in use, or the bus cannot be told.
pub async fn rescan_devices(removed: &[String]) -> Result<(), Error> {
    if let Some(bad) = removed.iter().find(|address| !is_pci_address(address)) {
        return Err(Error::PciAddress(bad.clone()));
    }
    for address in removed {
        disks::release(address).await?;
        match fs::write(format!("/sys/bus/pci/devices/{address}/remove"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                log!("the PCI device {address} is gone already");
            }
            other => other.map_err(doing(format!("leave the PCI device {address}")))?,
        }
    }
    if !removed.is_empty() {
        // What the host has yet to take away would be found again.
        return Ok(());
    }
    fs::write("/sys/bus/pci/rescan", "1").map_err(doing("rescan the PCI bus"))
}

/// Whether `text` is a PCI address, domain:bus:device.function.
fn is_pci_address(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 12
        && bytes.iter().enumerate().all(|(at, byte)| match at {
            4 | 7 => *byte == b':',
            10 => *byte == b'.',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// The guest's memory, in KiB.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All that the kernel manages.
    pub total_kib: u64,
    /// Unused.
    pub free_kib: u64,
    /// To be had by new programs.
    pub available_kib: u64,
    /// The agent's own, resident.
    pub agent_rss_kib: u64,
}

/// Reads the guest's memory use and the agent's.
///
/// # Errors
/// When /proc cannot be read.
pub fn memory() -> Result<Memory, Error> {
    let read = |path| fs::read_to_string(path).map_err(doing(format!("read {path}")));
    let info = read("/proc/meminfo")?;
    let status = read("/proc/self/status")?;
    let field = |text: &str, name: &str| kib(text, name).unwrap_or(0);
    Ok(Memory {
        total_kib: field(&info, "MemTotal:"),
        free_kib: field(&info, "MemFree:"),
        available_kib: field(&info, "MemAvailable:"),
        agent_rss_kib: field(&status, "VmRSS:"),
    })
}

/// The number of KiB in the line that begins with `name`.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The time by the guest's clock, in nanoseconds since the epoch.
pub fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

/// The running kernel's release, as `uname -r` prints it.
pub fn kernel_release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| String::new(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn mount_points_lie_below_one_directory() {
        assert!(is_below("/run/bulkhead/share", SHARED_BELOW));
        for path in [
            "/run/bulkhead",
            "/run/bulkhead/../../etc",
            "/run/bulkheads/x",
            "run/bulkhead/x",
            "/etc",
            "",
        ] {
            assert!(!is_below(path, SHARED_BELOW), "{path}");
        }
    }

    #[test]
    fn a_pci_address_is_told_from_a_path() {
        assert!(is_pci_address("0000:00:05.0"));
        for text in [
            "",
            "0000:00:05",
            "../../../etc",
            "0000/00:05.0",
            "0000:00:05.00",
        ] {
            assert!(!is_pci_address(text), "{text}");
        }
    }

    #[test]
    fn lines_of_meminfo_are_read() {
        let text = "MemTotal:         239580 kB\nMemFree: 7 kB\n";
        assert_eq!(kib(text, "MemTotal:"), Some(239_580));
        assert_eq!(kib(text, "MemFree:"), Some(7));
        assert_eq!(kib(text, "SwapFree:"), None);
    }

    #[test]
    fn a_host_of_another_version_is_refused() {
        let error = Guest::default()
            .configure(&Configuration {
                version: 9,
                ..Configuration::default()
            })
            .unwrap_err();
        assert!(error.to_string().contains("protocol version 9"));
    }

    #[test]
    fn the_guest_is_configured_once() {
        let guest = Guest::default();
        let configuration = Configuration {
            version: protocol::VERSION,
            ..Configuration::default()
        };
        assert!(guest.configure(&configuration).is_ok());
        assert!(matches!(guest.configure(&configuration), Err(Error::Again)));
    }

    proptest! {
        #[test]
        fn a_mount_point_never_leads_elsewhere(path in "(/run/bulkhead)?(/|\\.|a){0,12}") {
            if is_below(&path, SHARED_BELOW) {
                prop_assert!(path.starts_with(SHARED_BELOW));
                prop_assert!(!path.split('/').any(|part| part == ".."));
            }
        }

        #[test]
        fn a_pci_address_is_one_file_name(text in ".{0,20}") {
            if is_pci_address(&text) {
                prop_assert!(!text.contains('/'));
            }
        }
    }
}
