//! A network for `bulkhead run IMAGE`, by Debian's CNI plug-ins: addresses, published ports, name
//! servers, volumes, and what is left when everything is killed.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use system_tests::{
    client::command::{self, Done},
    host::{curl, rules, sh},
    image::{Host, Layout, Packing},
    scratch,
};

/// Enough for a busy lab machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Asks again until there is an answer.
fn until<T>(what: &str, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > deadline => return Err(error.context(what.to_owned())),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Where a long story is.
fn step(begin: Instant, what: &str) {
    println!("{:6.1} s  {what}", begin.elapsed().as_secs_f64());
}

fn detached(host: &Host, args: &[&str]) -> Result<Done> {
    let args = [&["-d", "--network", "bulkhead"], args].concat();
    command::run(&mut host.run_command(&args)?)
}

/// The address that a container finds for itself.
fn address(host: &Host, name: &str) -> Result<String> {
    let line = until("its address is in its log", || {
        let log = command::run(&mut host.plain(&["logs", name])?)?;
        let line = log.text()?.lines().find(|line| line.starts_with("10.86."));
        line.map(str::to_owned).context("no address yet")
    })?;
    Ok(line
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

#[test]
fn what_runs_from_an_image_has_a_network_publishes_ports_and_leaves_nothing() -> Result<()> {
    let mut layout = Layout::with_shell()?;
    layout.layer(Packing::Plain, |root| {
        fs::create_dir_all(root.join("www/deep"))?;
        fs::write(root.join("www/index.html"), "from the image\n")?;
        std::os::unix::fs::symlink("index.html", root.join("www/deep/link"))?;
        Ok(std::os::unix::fs::lchown(
            root.join("www"),
            Some(33),
            Some(33),
        )?)
    })?;
    // Debian's ping without its capability.
    let mut ping = String::new();
    layout.layer(Packing::Plain, |root| {
        fs::create_dir(root.join("ping"))?;
        ping = scratch::program("/usr/bin/ping", &root.join("ping"))?.command("/ping");
        Ok(())
    })?;
    layout.save(&json!({"Env": ["PATH=/bin"]}))?;
    let host = Host::new()?;
    let begin = Instant::now();
    host.bulkhead("pull", &[&layout.location(), "--name", "web"])?;
    step(begin, "pulled");

    let serve = "cat /etc/hosts /etc/resolv.conf; hostname; httpd -f -p 80 -h /www";
    let web = [
        "--name",
        "web",
        "-p",
        "8080:80",
        "--dns",
        "192.0.2.53",
        "-v",
        "pages:/www",
        "web",
        "/bin/sh",
        "-c",
        serve,
    ];
    detached(&host, &web)?.prints("web")?;
    step(begin, "detached");
    assert_eq!(
        until("the page", || curl("http://127.0.0.1:8080/"))?,
        "from the image"
    );
    step(begin, "answers");
    let own = address(&host, "web")?;
    assert_eq!(curl(&format!("http://{own}/"))?, "from the image");
    let log = command::run(&mut host.plain(&["logs", "web"])?)?;
    log.tells(&format!("{own}\tweb"))?
        .tells("10.86.0.1\thost.containers.internal")?;
    log.tells("nameserver 192.0.2.53")?;

    step(begin, "logged");
    // The volume has what the image has there, and takes what the host writes.
    let pages = host.volumes().join("pages/_data");
    assert_eq!(
        sh(&format!(
            "stat -c %u {}; readlink {0}/deep/link",
            pages.display()
        ))?,
        "33\nindex.html"
    );
    fs::write(pages.join("index.html"), "of the volume\n")?;
    until("the new page", || {
        match curl("http://127.0.0.1:8080/")?.as_str() {
            "of the volume" => Ok(()),
            other => bail!("{other}"),
        }
    })?;

    step(begin, "volume");
    // Another container reaches it and the host; and what is not possible is told.
    let look = format!(
        "wget -qO- http://{own}/; wget -qO- http://host.containers.internal:8080/; \
         ip -o -4 addr show dev eth0 | wc -l"
    );
    let other = host.run_command(&["--network", "bridge", "web", "/bin/sh", "-c", &look]);
    let other = command::run(&mut other?)?;
    other.prints("of the volume\nof the volume\n1")?;
    let ping = format!("{ping} -n -c 1 -W 9 {own} | grep -o '1 received'");
    let anyone = [
        "-u",
        "33:44",
        "--network",
        "bulkhead",
        "web",
        "/bin/sh",
        "-c",
        &ping,
    ];
    command::run(&mut host.run_command(&anyone)?)?.prints("1 received")?;
    for (args, wanted) in [
        (
            &["-p", "8080:80", "--network", "bulkhead", "web"][..],
            "port 8080",
        ),
        (&["--network", "host", "web"], "--network host"),
        (&["--network", "nowhere", "web"], "\"nowhere\""),
        (&["-p", "81:80", "--network", "none", "web"], "--publish"),
        (&["-dt", "web"], "--detach"),
    ] {
        let refused = command::run(&mut host.run_command(args)?)?;
        refused.ends_with(125)?.tells(wanted)?;
    }
    step(begin, "refused");
    let mut absent = host.run_command(&["--network", "bulkhead", "web", "/bin/true"])?;
    let absent = command::run(absent.env("CNI_PATH", "/nonexistent"))?;
    absent
        .ends_with(125)?
        .tells("package containernetworking-plugins")?;
    let volumes = host.volumes().display().to_string();
    let remove = ["volume", "--volume-root", &volumes, "rm", "pages"];
    command::run(&mut host.plain(&remove)?)?
        .ends_with(125)?
        .tells("in use")?;

    step(begin, "absent");
    // Everything is killed; what it left is found and undone, the network's part, too.
    let second = [
        "--name",
        "second",
        "-p",
        "8081:80",
        "web",
        "/bin/sh",
        "-c",
        "cat /etc/hosts; sleep 1000",
    ];
    detached(&host, &second)?.prints("second")?;
    let lost = address(&host, "second")?;
    ensure!(
        rules("8081")?.contains("DNAT"),
        "no rule leads to the second"
    );
    let journal = fs::read_to_string(host.state().join("default/second/journal"))?;
    let first: Value = serde_json::from_str(journal.lines().next().context("empty")?)?;
    let owner = first["owner"].as_i64().context("no owner")? as i32;
    kill(Pid::from_raw(owner), Signal::SIGKILL)?;
    until("the second is gone", || {
        match Path::new(&format!("/proc/{owner}/stat")).exists() {
            true => bail!("it lives"),
            false => Ok(()),
        }
    })?;
    step(begin, "killed");
    let said = command::run(&mut host.plain(&["gc"])?)?;
    said.prints("second")?;
    assert_eq!(rules("8081")?, "");
    assert_eq!(rules(&format!("{lost}/32"))?, "");
    assert!(!Path::new("/run/cni/networks/bulkhead").join(&lost).exists());

    step(begin, "collected");
    // With --rm the end removes all; without it, the command.
    let brief = ["--rm", "--name", "brief", "web", "/bin/sh", "-c", "sleep 1"];
    detached(&host, &brief)?.prints("brief")?;
    until("the brief one is gone", || {
        match host.state().join("default/brief").exists() {
            true => bail!("it is there"),
            false => Ok(()),
        }
    })?;
    step(begin, "brief");
    command::run(&mut host.plain(&["rm", "--force", "web"])?)?.ends_with(0)?;
    // Its process lets go of it a moment later.
    until("the volume is removed", || {
        command::run(&mut host.plain(&remove)?)?.prints("pages")?;
        Ok(())
    })?;
    // A killed one's bundle goes with the next run.
    let last = host.run_command(&["--network", "none", "web", "/bin/echo", "over"])?;
    command::run(&mut { last })?.prints("over")?;
    host.nothing_is_left()?;
    assert_eq!(rules(&own)?, "");
    assert_eq!(rules("8080")?, "");
    assert_eq!(
        sh("ip -o link show type veth; ls -A /run/cni/networks/bulkhead | grep '^10' || true")?,
        ""
    );
    let logs = host.store().with_file_name("logs");
    assert_eq!(fs::read_dir(logs)?.count(), 0);
    Ok(())
}
