//! docker: its daemon on a containerd of our own, and its command.

use std::{ffi::OsStr, fs, path::Path, process::Command};

use anyhow::{Context, Result};
use serde_json::json;

use super::{
    Runtime,
    command::{Done, feed, run},
    containerd::{Containerd, Daemon, unmount_below},
    images::{self, BUSYBOX},
    leftovers::Leftovers,
    terminal::Terminal,
    until,
};

/// Debian's, also where another one is found first.
const DOCKER: &str = "/usr/bin/docker";

/// A running docker, with the image [`BUSYBOX`].
pub struct Docker {
    /// What runs its containers.
    pub runtime: Runtime,
    daemon: Daemon,
    // Dropped after the daemon that uses it.
    containerd: Containerd,
}

impl Docker {
    /// Tells a story to docker with each runtime, and then looks whether something is left.
    ///
    /// # Errors
    /// What the story fails with, with the logs.
    pub fn tell(story: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let runtimes = Runtime::all()?;
        let mut docker = Self::start(&runtimes)?;
        for runtime in runtimes {
            docker.runtime = runtime;
            let before = Leftovers::now()?;
            let told = story(&docker);
            let logs = docker.containerd.logs();
            docker.remove_all()?;
            told.and_then(|()| before.are_all())
                .with_context(|| format!("docker with {}; logs:{logs}\n", runtime.name()))?;
        }
        Ok(())
    }

    fn start(runtimes: &[Runtime]) -> Result<Self> {
        let containerd = Containerd::start()?;
        let directory = containerd.path();
        let file = |name: &str| directory.join(name).to_string_lossy().into_owned();
        let mut paths = serde_json::Map::new();
        for runtime in runtimes {
            // Its own name for runc is taken.
            let name = format!("test-{}", runtime.name());
            paths.insert(name, json!({"path": runtime.program()?}));
        }
        let config = json!({
            "containerd": containerd.socket(),
            "hosts": [format!("unix://{}", file("docker.sock"))],
            "data-root": file("docker"),
            "exec-root": file("docker-exec"),
            "pidfile": file("docker.pid"),
            "storage-driver": "overlay2",
            // Its own bridge, and addresses that no other test has.
            "bip": "10.232.0.1/24",
            "default-address-pools": [{"base": "10.233.0.0/16", "size": 24}],
            "iptables": false,
            "ip6tables": false,
            "runtimes": paths,
        });
        fs::write(file("daemon.json"), config.to_string())?;
        let mut command = Command::new("dockerd");
        command.args(["--config-file", &file("daemon.json")]);
        let daemon = Daemon::start(command, Path::new(&file("docker.log")))?;
        let mut docker = Self {
            runtime: Runtime::Runc,
            daemon,
            containerd,
        };
        until("docker's answer", || {
            docker.daemon.is_alive()?;
            Ok(docker.run(&["version"])?.status == 0)
        })
        .with_context(|| docker.containerd.logs())?;
        let archive = images::archive(docker.containerd.path(), &[BUSYBOX])?;
        let archive = archive.to_string_lossy();
        docker
            .run(&["load", "--quiet", "--input", &archive])?
            .text()?;
        Ok(docker)
    }

    /// Runs a command of docker.
    ///
    /// # Errors
    /// When it does not end.
    pub fn run(&self, args: &[impl AsRef<OsStr>]) -> Result<Done> {
        run(self.command().args(args))
    }

    /// Runs a command of docker with `input`.
    ///
    /// # Errors
    /// When it does not end.
    pub fn feed(&self, args: &[impl AsRef<OsStr>], input: &str) -> Result<Done> {
        feed(self.command().args(args), input.as_bytes())
    }

    /// Runs a command of docker in a terminal of 30 rows and 90 columns.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn terminal(&self, args: &[impl AsRef<OsStr>]) -> Result<Terminal> {
        let mut command = self.command();
        command.args(args);
        Terminal::start(command, 30, 90)
    }

    /// The arguments of `docker run` with this runtime and network.
    pub fn arguments(&self, network: &str, rest: &[&str]) -> Vec<String> {
        let runtime = format!("--runtime=test-{}", self.runtime.name());
        let network = format!("--network={network}");
        let fixed = ["run", &runtime, &network].into_iter();
        fixed
            .chain(rest.iter().copied())
            .map(str::to_owned)
            .collect()
    }

    /// A directory for the test's files.
    pub fn directory(&self) -> &Path {
        self.containerd.path()
    }

    /// Where the daemon listens, for `DOCKER_HOST`.
    pub fn address(&self) -> String {
        let socket = self.containerd.path().join("docker.sock");
        format!("unix://{}", socket.display())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(DOCKER);
        command
            .current_dir(self.containerd.path())
            .env("DOCKER_HOST", self.address());
        command
    }

    fn remove_all(&self) -> Result<()> {
        let all = self.run(&["ps", "--all", "--quiet"])?.stdout;
        let ids: Vec<_> = all.split_whitespace().collect();
        if !ids.is_empty() {
            self.run(&[&["rm", "--force"], &ids[..]].concat())?;
        }
        Ok(())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.daemon.stop();
        let _ = run(Command::new("ip").args(["link", "delete", "docker0"]));
        unmount_below(self.containerd.path());
    }
}
