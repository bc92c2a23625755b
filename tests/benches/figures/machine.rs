//! A virtual machine of ours, started as the shim starts it, with the full set of devices.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use protocol::{Hello, READY_PORT};
use system_tests::guest::{bin, share};
use tempfile::TempDir;
use vmm::config::{BootConfig, DeviceConfig, GuestPort, VmConfig};
use vmm::launch::{Launch, Process};

/// Memory of every machine that is measured, in MiB.
pub(crate) const MEMORY_MIB: u64 = 256;

/// A monitor of ours that was started, and how to hear its agent.
pub(crate) struct Machine {
    _process: Process,
    ready: UnixStream,
    started: Instant,
    _dir: TempDir,
}

impl Machine {
    /// Starts `bulkhead-vmm` with vsock, a shared directory, a disk, entropy, balloon and console.
    pub(crate) fn start() -> Result<Self> {
        let dir = tempfile::tempdir_in("/dev/shm")?;
        let disk = dir.path().join("disk");
        File::create(&disk)?.set_len(64 << 20)?;
        let listener = UnixListener::bind(dir.path().join("vsock"))?;
        let (ready, theirs) = UnixStream::pair()?;
        ready.set_read_timeout(Some(Duration::from_secs(60)))?;

        let path = fs::canonicalize(bin("bulkhead-vmm")?)?;
        let mut launch = Launch::new(
            File::options()
                .read(true)
                .custom_flags(libc::O_PATH)
                .open(path)?
                .into(),
        );
        let devices = vec![
            DeviceConfig::Vsock {
                cid: 3,
                listener: launch.pass(listener.into()),
                guest_ports: vec![GuestPort {
                    port: READY_PORT,
                    socket: launch.pass(theirs.into()),
                }],
            },
            DeviceConfig::Fs {
                tag: "root".to_owned(),
                directory: launch.pass(open(dir.path())?),
                read_only: true,
            },
            DeviceConfig::Blk {
                disk: launch.pass(File::options().read(true).write(true).open(&disk)?.into()),
                read_only: false,
                serial: String::new(),
            },
            DeviceConfig::Rng {
                source: launch.pass(open(Path::new("/dev/urandom"))?),
            },
            DeviceConfig::Balloon { inflate_mib: 0 },
            DeviceConfig::Console {
                output: launch.pass(File::create("/dev/null")?.into()),
                input: None,
            },
        ];
        let config = VmConfig {
            boot: BootConfig {
                kernel: launch.pass(open(&share("vmlinux")?)?),
                image: Some(launch.pass(open(&share("guest.img")?)?)),
                initrd: None,
                cmdline: shim::sandbox::cmdline(),
            },
            cpus: 1,
            memory_mib: MEMORY_MIB,
            kvm: None,
            console_log: None,
            control: None,
            serial: None,
            devices,
        };
        let started = Instant::now();
        let process = launch.spawn(&config).context("cannot start bulkhead-vmm")?;
        Ok(Self {
            _process: process,
            ready,
            started,
            _dir: dir,
        })
    }

    /// Waits for the agent's first words; returns the time from start to them.
    pub(crate) fn agent(&mut self) -> Result<Duration> {
        hello(&mut self.ready).context("no word from the agent")?;
        Ok(self.started.elapsed())
    }
}

/// Reads an agent's first words.
pub(crate) fn hello(mut from: impl Read) -> Result<Hello> {
    let mut bytes = [0; Hello::LEN];
    from.read_exact(&mut bytes)?;
    Hello::from_bytes(&bytes).map_err(anyhow::Error::msg)
}

fn open(path: &Path) -> Result<OwnedFd> {
    Ok(File::open(path)
        .with_context(|| format!("cannot open {}", path.display()))?
        .into())
}
