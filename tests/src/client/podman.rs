//! podman and buildah, with a store of their own.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{
    Runtime,
    command::{Done, feed, run},
    images::{self, BUSYBOX, PAUSE},
    leftovers::Leftovers,
    logs, store,
    terminal::Terminal,
    until,
};

/// A podman whose runtime is one of ours, with the image [`BUSYBOX`].
pub struct Podman {
    /// What runs its containers.
    pub runtime: Runtime,
    directory: TempDir,
}

impl Podman {
    /// Tells a story to a podman with each runtime in turn, and looks after each whether something
    /// is left. Returns what came of it, runtime by runtime.
    ///
    /// # Errors
    /// What the story fails with, with the logs.
    pub fn tell<T>(story: impl Fn(&Self) -> Result<T>) -> Result<Vec<T>> {
        Self::tell_with(&Runtime::all()?, story)
    }

    /// Tells a story to a podman with each of these runtimes in turn.
    ///
    /// # Errors
    /// As [`Podman::tell`].
    pub fn tell_with<T>(
        runtimes: &[Runtime],
        story: impl Fn(&Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut podman = Self::new()?;
        let mut all = Vec::new();
        for runtime in runtimes {
            podman.runtime = *runtime;
            podman.configure()?;
            let before = Leftovers::now()?;
            let told = story(&podman);
            let logs = logs(&[podman.directory.path(), Path::new("/run/bulkhead")]);
            // However the story ended, nothing of it may disturb the next.
            podman.remove_all()?;
            let told = told.and_then(|told| before.are_all().map(|()| told));
            let told =
                told.with_context(|| format!("podman with {}; logs:{logs}\n", runtime.name()))?;
            all.push(told);
        }
        Ok(all)
    }

    /// One with a store and an image, which are the same for both runtimes: loading takes long.
    fn new() -> Result<Self> {
        let podman = Self {
            runtime: Runtime::Runc,
            directory: store()?,
        };
        let store = podman.directory.path();
        podman.configure()?;
        fs::write(
            store.join("storage.conf"),
            format!(
                "[storage]\n\
                 driver = 'overlay'\n\
                 graphroot = '{store}/root'\n\
                 runroot = '{store}/run'\n",
                store = store.display(),
            ),
        )?;
        let archive = images::archive(store, &[BUSYBOX, PAUSE])?;
        let archive = archive.to_string_lossy();
        podman
            .run(&["load", "--quiet", "--input", &archive])?
            .text()?;
        Ok(podman)
    }

    /// Writes the configuration that names the runtime.
    fn configure(&self) -> Result<()> {
        let store = self.directory.path();
        fs::write(
            store.join("containers.conf"),
            format!(
                "[engine]\n\
                 cgroup_manager = 'cgroupfs'\n\
                 events_logger = 'file'\n\
                 infra_image = '{PAUSE}'\n\
                 runtime = '{name}'\n\
                 runtime_supports_json = ['runc', 'bulkhead']\n\
                 tmp_dir = '{store}/tmp'\n\
                 [engine.runtimes]\n\
                 {name} = ['{program}']\n\
                 [containers]\n\
                 default_ulimits = ['nofile=1024:1024', 'nproc=1024:1024']\n\
                 log_driver = 'k8s-file'\n\
                 netns = 'none'\n\
                 [network]\n\
                 network_backend = 'netavark'\n\
                 network_config_dir = '{store}/networks'\n",
                name = self.runtime.name(),
                store = store.display(),
                program = self.runtime.program()?.display(),
            ),
        )?;
        Ok(())
    }

    /// Runs a command of podman.
    ///
    /// # Errors
    /// When podman is missing or does not end.
    pub fn run(&self, args: &[&str]) -> Result<Done> {
        run(self.command("podman").args(args))
    }

    /// Runs a command of podman with `input`.
    ///
    /// # Errors
    /// As [`Podman::run`].
    pub fn feed(&self, args: &[&str], input: &str) -> Result<Done> {
        feed(self.command("podman").args(args), input.as_bytes())
    }

    /// Runs a command of podman in a terminal of 30 rows and 90 columns.
    ///
    /// # Errors
    /// As [`Podman::run`].
    pub fn terminal(&self, args: &[&str]) -> Result<Terminal> {
        let mut command = self.command("podman");
        command.args(args);
        Terminal::start(command, 30, 90)
    }

    /// Runs a command of buildah.
    ///
    /// # Errors
    /// When buildah is missing or does not end.
    pub fn buildah(&self, args: &[&str]) -> Result<Done> {
        run(self.command("buildah").args(args))
    }

    fn command(&self, program: &str) -> Command {
        let store = self.directory.path();
        let mut command = Command::new(program);
        command
            .current_dir(store)
            .env("CONTAINERS_CONF", store.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", store.join("storage.conf"))
            // There need not be a systemd whose timers run the checks; podman then would not start.
            .env("DISABLE_HC_SYSTEMD", "true");
        command
    }

    /// Where a test may put files.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn files(&self) -> Result<std::path::PathBuf> {
        let files = self.directory.path().join("files");
        fs::create_dir_all(&files)?;
        Ok(files)
    }

    /// Waits until a container has written `wanted`.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_for_log(&self, container: &str, wanted: &str) -> Result<()> {
        let what = format!("{wanted:?} in the log of {container}");
        until(&what, || {
            let log = self.run(&["logs", container])?.ends_with(0)?.stdout.clone();
            Ok(log.contains(wanted))
        })
    }

    /// What podman knows of a container, by a Go template.
    ///
    /// # Errors
    /// When it does not know it.
    pub fn inspect(&self, container: &str, template: &str) -> Result<String> {
        let done = self.run(&["inspect", "--format", template, container])?;
        Ok(done.text()?.to_owned())
    }

    fn remove_all(&self) -> Result<()> {
        self.run(&["pod", "rm", "--all", "--force", "--time", "0"])?;
        self.run(&["rm", "--all", "--force", "--time", "0"])?;
        self.run(&["volume", "prune", "--force"])?;
        self.run(&["network", "prune", "--force"])?;
        Ok(())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // Podman mounts its store on itself.
        let place = self.directory.path().join("root/overlay");
        let _ = run(Command::new("umount").arg("--quiet").arg(place));
    }
}

/// How many virtual machines run.
///
/// # Errors
/// When the kernel does not tell.
pub fn machines() -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        count += usize::from(comm.trim_end() == "bulkhead-vmm");
    }
    Ok(count)
}

/// Fails unless this many virtual machines run where they are ours, else none; or soon will, since
/// the one before may still be ending.
///
/// # Errors
/// With the number.
pub fn machines_are(podman: &Podman, wanted: usize) -> Result<()> {
    let wanted = if podman.runtime.is_ours() { wanted } else { 0 };
    until(&format!("{wanted} machines"), || Ok(machines()? == wanted))
        .with_context(|| format!("{:?} machines run", machines()))
}
