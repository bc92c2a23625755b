//! CNI plug-ins that hang hold nobody up who wants `bulkhead run` to end.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Output,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use system_tests::{
    client::{command, until},
    container::Run,
    image::{Host, Layout},
};

/// Much less than the minute that a plug-in has.
const SOON: Duration = Duration::from_secs(35);

/// A plug-in that hangs as long as there is a file with the name of what it is told to do.
struct Plugin(tempfile::TempDir);

impl Plugin {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().display();
        let script = format!(
            "#!/bin/sh\ncat >/dev/null; cd {path}; echo $CNI_COMMAND >>log\n\
             if [ -e $CNI_COMMAND ]; then sleep 1000 & echo $$ $! >pids; wait; fi\n\
             [ $CNI_COMMAND = DEL ] || echo '{{\"cniVersion\": \"1.0.0\"}}'\n"
        );
        let program = directory.path().join("hangs");
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let network = json!({
            "cniVersion": "1.0.0", "name": "hanging", "plugins": [{"type": "hangs"}],
        });
        fs::write(directory.path().join("1.conflist"), network.to_string())?;
        Ok(Self(directory))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `/bin/true` in its network, until the plug-in hangs.
    fn hangs(&self, host: &Host) -> Result<Run> {
        let mut run = host.container_of(&["--network", "hanging", "web", "/bin/true"], |run| {
            run.env("CNI_PATH", self.0.path());
            run.env("NETCONFPATH", self.0.path());
        })?;
        until("the plug-in's start", || {
            let status = run.child.try_wait()?;
            ensure!(status.is_none(), "the command ended with {status:?}");
            Ok(self.file("pids").exists())
        })?;
        Ok(run)
    }

    /// What it was told, since the last time.
    fn was_told(&self) -> Result<String> {
        let log = fs::read_to_string(self.file("log"))?;
        fs::remove_file(self.file("log"))?;
        Ok(log.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    /// Fails unless all of its processes end.
    fn is_gone(&self) -> Result<()> {
        let pids = fs::read_to_string(self.file("pids"))?;
        fs::remove_file(self.file("pids"))?;
        for pid in pids.split_whitespace() {
            let pid = Path::new("/proc").join(pid);
            until("the end of the plug-in", || Ok(!pid.exists()))?;
        }
        Ok(())
    }
}

/// Presses Ctrl-C once.
fn interrupted(mut run: Run) -> Result<Output> {
    run.signal(Signal::SIGINT)?;
    let begin = Instant::now();
    while run.child.try_wait()?.is_none() {
        ensure!(begin.elapsed() < SOON, "Ctrl-C does not end the command");
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("after Ctrl-C it took {:?}", begin.elapsed());
    run.output()
}

#[test]
fn who_waits_for_a_plug_in_that_hangs_can_end_it() -> Result<()> {
    let layout = Layout::with_shell()?;
    layout.save(&json!({"Env": ["PATH=/bin"]}))?;
    let host = Host::new()?;
    host.bulkhead("pull", &[&layout.location(), "--name", "web"])?;
    let plugin = Plugin::new()?;
    let before = mounts()?;
    let unmounted = || until("the end of its mounts", || Ok(mounts()?.is_subset(&before)));

    // What is not attached yet is detached again.
    fs::write(plugin.file("ADD"), "")?;
    let output = interrupted(plugin.hangs(&host)?)?;
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    plugin.is_gone()?;
    assert_eq!(plugin.was_told()?, "ADD DEL");
    host.nothing_is_left()?;
    unmounted()?;
    fs::remove_file(plugin.file("ADD"))?;

    // What cannot be detached is left for later.
    fs::write(plugin.file("DEL"), "")?;
    let output = interrupted(plugin.hangs(&host)?)?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("bulkhead gc"), "{said}");
    plugin.is_gone()?;
    fs::remove_file(plugin.file("DEL"))?;
    plugin.was_told()?;
    let collected = command::run(&mut host.plain(&["gc"])?)?;
    ensure!(!collected.text()?.is_empty(), "nothing was collected");
    assert_eq!(plugin.was_told().context("not told to detach")?, "DEL");
    host.nothing_is_left()?;
    unmounted()
}

fn mounts() -> Result<BTreeSet<String>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().map(str::to_owned).collect())
}
