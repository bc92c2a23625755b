//! The live demonstration of a talk on containers, told with this runtime in
//! runc's place: the pid of the list leads to namespaces, a cgroup and its limit.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use system_tests::{container::Bundle, guest::bin};

/// What is typed in the second terminal.
const TYPED: &str = r#"
set -e
pid=$("$MYCRT" --root "$STATE" list -f json | jq -r '.[0].pid')
kill -0 "$pid"
for kind in pid mnt uts ipc net cgroup user; do
    lsns -n -o TYPE,PID -p "$pid" | grep -q "$kind *$pid" || { echo "no $kind namespace of its own"; exit 1; }
done
cgroup=$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
cat "/sys/fs/cgroup$cgroup/memory.max"
"#;

#[test]
fn the_pid_of_the_list_leads_to_namespaces_and_limits_of_the_container() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    fs::remove_file(bundle.path().join("config.json"))?;
    let mycrt = bin("bulkhead")?;
    let spec = Command::new(&mycrt)
        .args(["spec", "--rootless", "--bundle"])
        .arg(bundle.path())
        .status()?;
    ensure!(spec.success(), "`bulkhead spec` failed");
    bundle.edit(|config| {
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["sh", "-c", "echo ready; sleep 1000"]);
        config["linux"]["resources"]["memory"] = json!({"limit": 100 << 20});
    })?;
    let mut run = bundle.start(&[])?;
    run.wait_for_line("ready")?;

    let typed = Command::new("sh")
        .args(["-c", TYPED])
        .env("MYCRT", &mycrt)
        .env("STATE", bundle.path().join("state"))
        .output()
        .context("cannot run sh")?;
    let said = String::from_utf8_lossy(&typed.stdout).into_owned();
    let words = String::from_utf8_lossy(&typed.stderr).into_owned();
    ensure!(typed.status.success(), "{said}{words}");
    assert_eq!(said.trim(), (100 << 20).to_string());

    run.signal(Signal::SIGTERM)?;
    let killed = Command::new(&mycrt)
        .arg("--root")
        .arg(bundle.path().join("state"))
        .args(["kill", "web", "KILL"])
        .status()?;
    ensure!(killed.success(), "`bulkhead kill` failed");
    assert_eq!(run.output()?.status.code(), Some(137));
    bundle.nothing_is_left()
}
