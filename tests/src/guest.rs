//! A guest whose shell the test types into: busybox on the project's kernel,
//! started by `vmm::launch` as the shim starts it.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::ExitStatus,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use rootfs_builder::{
    cpio,
    tree::{Node, Tree},
};
use vmm::{
    config::{BootConfig, DeviceConfig, Resource, VmConfig},
    control::Client,
    launch::{Launch, Process},
};

/// Enough for a busy lab machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads commands from the console and answers there, each answer ended by a line of its own.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec <>/dev/hvc0 >&0 2>&1
stty raw -echo
echo ready
while read -r line; do
    eval \"$line\"
    echo \"end $?\"
done
";

/// What a guest is started with.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Processors.
    pub cpus: u8,
    /// Memory.
    pub memory_mib: u64,
    /// Devices beside the console; their resources may be paths.
    pub devices: Vec<DeviceConfig>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory_mib: 128,
            devices: Vec::new(),
        }
    }
}

/// A running guest and its VMM.
pub struct Guest {
    vmm: Process,
    input: File,
    output: BufReader<File>,
    control: PathBuf,
    /// Holds the socket and the initramfs.
    _directory: tempfile::TempDir,
}

impl Guest {
    /// Starts it and waits until its shell answers.
    ///
    /// # Errors
    /// When a part is missing or the shell does not answer.
    pub fn start(plan: Plan) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let initramfs = directory.path().join("initramfs");
        write_initramfs(directory.path(), &initramfs)?;
        let control = directory.path().join("control.sock");

        let mut launch = Launch::new(open(&bin("bulkhead-vmm")?, OFlag::O_PATH)?);
        let (input_reader, input) = pipe2(OFlag::O_CLOEXEC)?;
        let (output, output_writer) = pipe2(OFlag::O_CLOEXEC)?;
        let console = DeviceConfig::Console {
            output: launch.pass(output_writer),
            input: Some(launch.pass(input_reader)),
        };
        let config = VmConfig {
            boot: BootConfig {
                kernel: Resource::Path(share("vmlinux")?),
                initrd: Some(Resource::Path(initramfs)),
                image: None,
                cmdline: "quiet panic=-1".to_owned(),
            },
            cpus: plan.cpus,
            memory_mib: plan.memory_mib,
            kvm: None,
            console_log: None,
            control: Some(launch.pass(UnixListener::bind(&control)?.into())),
            serial: None,
            devices: [vec![console], plan.devices].concat(),
        };
        let mut guest = Self {
            vmm: launch.spawn(&config)?,
            input: input.into(),
            output: BufReader::new(output.into()),
            control,
            _directory: directory,
        };
        let first = guest.line()?;
        ensure!(
            first == "ready",
            "the guest's first line is {first:?}, not \"ready\""
        );
        Ok(guest)
    }

    /// Lets the guest's shell run `command`, one line, and returns what it printed, which is
    /// whole lines.
    ///
    /// # Errors
    /// When it fails or the guest does not answer.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.sh_within(PATIENCE, command)
    }

    /// As [`Guest::sh`], for a command that may be silent for as long as `patience`.
    ///
    /// # Errors
    /// As [`Guest::sh`].
    pub fn sh_within(&mut self, patience: Duration, command: &str) -> Result<String> {
        self.tell(command)?;
        let mut printed = String::new();
        loop {
            let line = self
                .line_within(patience)
                .with_context(|| command.to_owned())?;
            if let Some(status) = line.strip_prefix("end ") {
                ensure!(
                    status == "0",
                    "{command:?} failed with {status}: {printed:?}"
                );
                return Ok(printed);
            }
            printed.push_str(&line);
            printed.push('\n');
        }
    }

    /// Types a line without waiting for an answer.
    ///
    /// # Errors
    /// When the VMM is gone.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        Ok(self.input.write_all(format!("{command}\n").as_bytes())?)
    }

    /// Whether the guest prints something within `patience`.
    ///
    /// # Errors
    /// When the kernel refuses to tell.
    pub fn prints_within(&mut self, patience: Duration) -> Result<bool> {
        if !self.output.buffer().is_empty() {
            return Ok(true);
        }
        let timeout = PollTimeout::try_from(patience)?;
        let mut fds = [PollFd::new(
            self.output.get_ref().as_fd(),
            PollFlags::POLLIN,
        )];
        Ok(poll(&mut fds, timeout)? > 0)
    }

    fn line(&mut self) -> Result<String> {
        self.line_within(PATIENCE)
    }

    fn line_within(&mut self, patience: Duration) -> Result<String> {
        let mut line = Vec::new();
        loop {
            ensure!(
                self.prints_within(patience)?,
                "the guest says nothing; it last said {:?}",
                String::from_utf8_lossy(&line)
            );
            // At the end of the pipe the VMM is gone.
            let count = self.output.fill_buf()?.len();
            ensure!(
                count > 0,
                "the VMM closed the console: {:?}",
                self.vmm.wait()?
            );
            let mut byte = [0];
            std::io::Read::read_exact(&mut self.output, &mut byte)?;
            match byte {
                [b'\n'] => return Ok(String::from_utf8_lossy(&line).trim_end().to_owned()),
                [byte] => line.push(byte),
            }
        }
    }

    /// A connection to the VMM's control socket.
    ///
    /// # Errors
    /// When the VMM is gone.
    pub fn control(&self) -> Result<Client> {
        Ok(Client::new(UnixStream::connect(&self.control)?)?)
    }

    /// The VMM's process.
    pub fn vmm(&mut self) -> &mut Process {
        &mut self.vmm
    }

    /// Waits for the VMM's end.
    ///
    /// # Errors
    /// When it does not come.
    pub fn end(mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.vmm.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("the VMM does not end");
    }
}

fn write_initramfs(directory: &Path, archive: &Path) -> Result<()> {
    let init = directory.join("init");
    fs::write(&init, INIT)?;
    let mut tree = Tree::new();
    for name in ["bin", "dev", "mnt", "proc", "sys"] {
        tree.add(name, Node::Directory { mode: 0o755 })?;
    }
    let program = |source: &Path| Node::File {
        mode: 0o755,
        source: source.to_owned(),
    };
    tree.add("bin/busybox", program(Path::new("/bin/busybox")))?;
    tree.add("init", program(&init))?;
    cpio::write(&tree, archive).context("cannot write the initramfs; is busybox-static installed?")
}

/// A program as it was installed for the tests.
///
/// # Errors
/// When the tests were not started by `cargo xtask test`.
pub fn bin(name: &str) -> Result<PathBuf> {
    Ok(prefix()?.join("bin").join(name))
}

/// A file of the guest as it was installed for the tests.
///
/// # Errors
/// As [`bin`].
pub fn share(name: &str) -> Result<PathBuf> {
    Ok(prefix()?.join("share/bulkhead").join(name))
}

fn prefix() -> Result<PathBuf> {
    let prefix = std::env::var_os("BULKHEAD_PREFIX");
    prefix
        .map(PathBuf::from)
        .context("BULKHEAD_PREFIX is not set: run the system tests by `make test`")
}

fn open(path: &Path, flags: OFlag) -> Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    Ok(file.into())
}
