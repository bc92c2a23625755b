//! A containerd of a test's own, with images imported and the runtimes that its CRI socket offers.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use super::{command::run, images, store, until};
use crate::guest::bin;

/// The pods' network: a bridge on the host, and addresses from a range.
const NETWORK: &str = r#"{
    "cniVersion": "0.4.0",
    "name": "pods",
    "plugins": [{
        "type": "bridge",
        "bridge": "clients0",
        "isGateway": true,
        "ipMasq": false,
        "ipam": {
            "type": "host-local",
            "dataDir": "DIRECTORY/addresses",
            "ranges": [[{"subnet": "10.231.0.0/16"}]]
        }
    }]
}"#;

/// Whose containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Programs {
    /// The one of this Debian: 1.6.
    Debian,
    /// The one of Debian's testing suite, 2.x, which `xtask/fetch-containerd` gets.
    Testing,
}

/// A running containerd.
pub struct Containerd {
    daemon: Daemon,
    directory: TempDir,
    programs: Programs,
}

impl Containerd {
    /// Starts one, in a directory of its own.
    ///
    /// # Errors
    /// When it does not come to answer.
    pub fn start() -> Result<Self> {
        Self::start_from(Programs::Debian)
    }

    /// Starts one of these programs, in a directory of its own.
    ///
    /// # Errors
    /// When it does not come to answer.
    pub fn start_from(programs: Programs) -> Result<Self> {
        Self::start_with(programs, "")
    }

    /// Starts one of these programs, with lines of configuration besides its own, of plug-ins.
    ///
    /// # Errors
    /// When it does not come to answer.
    pub fn start_with(programs: Programs, plugins: &str) -> Result<Self> {
        ensure!(
            programs == Programs::Debian || std::env::var_os("BULKHEAD_CONTAINERD").is_some(),
            "BULKHEAD_CONTAINERD is not set: run the system tests by `make test`"
        );
        let directory = store()?;
        let path = directory.path();
        let config = path.join("config.toml");
        fs::write(&config, configuration(path) + plugins)?;
        scratch_disk(&path.join("empty.img"))?;
        fs::create_dir_all(path.join("cni"))?;
        let network = NETWORK.replace("DIRECTORY", &path.to_string_lossy());
        fs::write(path.join("cni/10-pods.conflist"), network)?;

        let daemon = programs.daemon(path)?;
        let mut containerd = Self {
            daemon,
            directory,
            programs,
        };
        containerd.answers()?;
        Ok(containerd)
    }

    /// Kills it, and leaves its containers to themselves.
    ///
    /// # Errors
    /// When it has ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.is_alive()?;
        self.daemon.child.kill()?;
        self.daemon.child.wait()?;
        Ok(())
    }

    /// Starts it again, where it was.
    ///
    /// # Errors
    /// When it does not come to answer.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon = self.programs.daemon(self.path())?;
        self.answers()
    }

    fn answers(&mut self) -> Result<()> {
        let answered = until("containerd's answer", || {
            self.daemon.is_alive()?;
            Ok(self.ctr(&["version"])?.status == 0)
        });
        answered.with_context(|| self.logs())
    }

    /// Imports images into a namespace.
    ///
    /// # Errors
    /// When it fails.
    pub fn import(&self, namespace: &str, images: &[&str]) -> Result<()> {
        let archive = images::archive(self.path(), images)?;
        let archive = archive.to_string_lossy();
        self.ctr(&["--namespace", namespace, "images", "import", &archive])?
            .text()?;
        Ok(())
    }

    /// Runs a command of ctr.
    ///
    /// # Errors
    /// When it does not end.
    pub fn ctr(&self, args: &[&str]) -> Result<super::command::Done> {
        run(&mut self.command(args))
    }

    /// A command of ctr, to be run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.programs.program("ctr"));
        command.arg("--address").arg(self.socket()).args(args);
        command
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.path().join("containerd.sock")
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The ends of its logs and of Bulkhead's.
    pub fn logs(&self) -> String {
        super::logs(&[self.path(), Path::new("/run/bulkhead")])
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.daemon.stop();
        let _ = run(Command::new("ip").args(["link", "delete", "clients0"]));
        unmount_below(self.path());
    }
}

impl Programs {
    fn daemon(self, directory: &Path) -> Result<Daemon> {
        let mut command = Command::new(self.program("containerd"));
        command
            .arg("--config")
            .arg(directory.join("config.toml"))
            .env("PATH", search_path()?)
            // Its dmsetup waits for no udev, which nobody runs where the tests do.
            .env("DM_DISABLE_UDEV", "1");
        Daemon::start(command, &directory.join("containerd.log"))
    }

    fn program(self, name: &str) -> PathBuf {
        match self {
            Self::Debian => name.into(),
            Self::Testing => {
                let directory = std::env::var_os("BULKHEAD_CONTAINERD").unwrap_or_default();
                Path::new(&directory).join(name)
            }
        }
    }
}

/// Unmounts what lies below a directory, the deepest first.
pub(super) fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let mut places: Vec<_> = places
        .filter(|place| Path::new(place).starts_with(directory))
        .collect();
    places.sort_unstable();
    for place in places.iter().rev() {
        let _ = run(Command::new("umount").args(["--lazy", place]));
    }
}

/// Where containerd looks for shims: first where ours are installed for the tests.
fn search_path() -> Result<String> {
    let path = std::env::var("PATH").context("PATH is not set")?;
    let ours = bin("")?;
    Ok(format!("{}:{path}", ours.display()))
}

fn configuration(directory: &Path) -> String {
    format!(
        r#"
version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "{directory}/blockfile"
  scratch_file = "{directory}/empty.img"
  fs_type = "ext4"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.bulkhead]
      runtime_type = "io.containerd.bulkhead.v2"
"#,
        directory = directory.display(),
        pause = images::PAUSE,
    )
}

/// What the blockfile snapshotter begins each file system with.
fn scratch_disk(path: &Path) -> Result<()> {
    fs::File::create(path)?.set_len(64 << 20)?;
    let made = Command::new("/sbin/mkfs.ext4")
        .args(["-q", "-F"])
        .arg(path)
        .status()
        .context("cannot run mkfs.ext4; is e2fsprogs installed?")?;
    ensure!(made.success(), "mkfs.ext4: {made}");
    Ok(())
}

/// A daemon that is ended with the test.
pub(super) struct Daemon {
    child: Child,
    name: String,
}

impl Daemon {
    /// Starts it, with its output in a file.
    pub(super) fn start(mut command: Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut options = fs::File::options();
        let log = options.append(true).create(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot run {name}; does xtask/setup install it?"))?;
        Ok(Self { child, name })
    }

    /// Fails if it has ended.
    pub(super) fn is_alive(&mut self) -> Result<()> {
        let ended = self.child.try_wait()?;
        ensure!(ended.is_none(), "{} has ended: {ended:?}", self.name);
        Ok(())
    }

    /// Asks it to end, and ends it if it does not.
    pub(super) fn stop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let ended = until("a daemon's end", || Ok(self.child.try_wait()?.is_some()));
        if ended.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
