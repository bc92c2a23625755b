//! podman, from Debian's package: what goes beyond `podman.rs`.

use std::fs;

use anyhow::{Result, ensure};
use system_tests::client::{
    Runtime,
    images::BUSYBOX,
    podman::{Podman, machines_are},
    until,
};

#[test]
fn podman_restarts_checks_copies_attaches_and_kills_as_with_runc() -> Result<()> {
    Podman::tell(|podman| {
        tells_ends_apart(podman)?;
        leaves_and_returns_to_a_terminal(podman)?;
        does_to_a_running_container(podman)?;
        restarts_and_checks(podman)?;
        changes_a_pod(podman)
    })?;
    Ok(())
}

fn tells_ends_apart(podman: &Podman) -> Result<()> {
    let script = "sh -c 'kill -9 $$'; exit $?";
    let killed = podman.run(&["run", "--rm", BUSYBOX, "sh", "-c", script])?;
    killed.ends_with(137)?;
    let unfit = podman.run(&["run", "--rm", BUSYBOX, "/etc/passwd"])?;
    unfit.ends_with(126)?.tells("/etc/passwd")?;
    let hungry = [
        "run",
        "--rm",
        "--memory",
        "32m",
        "--memory-swap",
        "32m",
        BUSYBOX,
    ];
    let script = "x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo survived";
    let killed = podman.run(&[&hungry[..], &["sh", "-c", script]].concat())?;
    killed.ends_with(137)?;
    Ok(())
}

fn leaves_and_returns_to_a_terminal(podman: &Podman) -> Result<()> {
    let mut terminal = podman.terminal(&["run", "-it", "--name", "term", BUSYBOX, "sh"])?;
    terminal.type_in("echo $((6 * 7))\r")?;
    terminal.shows("42")?;
    let script = "stty size; read x; exit $x";
    let mut other = podman.terminal(&["exec", "-it", "term", "sh", "-c", script])?;
    other.shows("30 90")?;
    other.type_in("9\r")?;
    let (status, shown) = other.end()?;
    ensure!(status == 9, "exec ended with {status}: {shown:?}");

    // Podman knows its keys, Ctrl-P and Ctrl-Q, only one by one.
    terminal.end_by(&["\x10", "\x11"])?;
    ensure!(podman.inspect("term", "{{.State.Status}}")? == "running");
    let mut terminal = podman.terminal(&["attach", "term"])?;
    terminal.type_in("echo $((8 * 8)); exit 7\r")?;
    terminal.shows("64")?;
    terminal.end()?;
    podman.run(&["wait", "term"])?.prints("7")?;
    podman.run(&["rm", "term"])?.text()?;
    Ok(())
}

fn does_to_a_running_container(podman: &Podman) -> Result<()> {
    let start = [
        "run",
        "-d",
        "--name",
        "web",
        "--memory",
        "64m",
        "--volume",
        "named:/named",
    ];
    podman
        .run(
            &[
                &start[..],
                &[BUSYBOX, "sh", "-c", "echo x >>/named/count; sleep 1000"],
            ]
            .concat(),
        )?
        .text()?;
    podman.run(&["exec", "web", "/missing"])?.ends_with(127)?;
    podman
        .run(&["exec", "-d", "web", "touch", "/tmp/detached"])?
        .text()?;
    until("what `exec -d` does", || {
        let seen = podman.run(&["exec", "web", "test", "-e", "/tmp/detached"])?;
        Ok(seen.status == 0)
    })?;
    copies_files(podman, "web")?;
    // Options of ps: it is run in the container.
    podman
        .run(&["top", "web", "-o", "pid,args"])?
        .tells("sleep 1000")?;
    podman
        .run(&["update", "--memory", "80m", "--cpus", "0.5", "web"])?
        .text()?;
    let limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    podman
        .run(&["exec", "web", "sh", "-c", limits])?
        .prints("83886080\n50000 100000")?;

    podman.run(&["kill", "web"])?.text()?;
    podman.run(&["wait", "web"])?.prints("137")?;
    podman.run(&["start", "web"])?.text()?;
    // It has the files that it left, and the volume.
    podman
        .run(&["exec", "web", "sh", "-c", "ls /tmp; cat /named/count"])?
        .prints("detached\nthere\nx\nx")?;
    podman
        .run(&["rm", "--force", "--time", "0", "web"])?
        .text()?;
    podman.run(&["volume", "rm", "named"])?.text()?;
    Ok(())
}

fn copies_files(podman: &Podman, container: &str) -> Result<()> {
    let files = podman.files()?;
    fs::write(files.join("there"), "from the host")?;
    let (there, back) = (files.join("there"), files.join("back"));
    let place = format!("{container}:/tmp/there");
    podman
        .run(&["cp", &there.to_string_lossy(), &place])?
        .text()?;
    podman
        .run(&["exec", container, "cat", "/tmp/there"])?
        .prints("from the host")?;
    let passwd = format!("{container}:/etc/passwd");
    podman
        .run(&["cp", &passwd, &back.to_string_lossy()])?
        .text()?;
    ensure!(fs::read_to_string(&back)?.starts_with("root:x:0:0:"));
    Ok(())
}

fn restarts_and_checks(podman: &Podman) -> Result<()> {
    let script = "echo started; exit 4";
    let restart = ["run", "-d", "--name", "again", "--restart", "on-failure:2"];
    podman
        .run(&[&restart[..], &[BUSYBOX, "sh", "-c", script]].concat())?
        .text()?;
    until("the second restart's end", || {
        let state = podman.inspect(
            "again",
            "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}",
        )?;
        Ok(state == "2 exited 4")
    })?;
    podman
        .run(&["logs", "again"])?
        .prints("started\nstarted\nstarted")?;

    let check = [
        "run",
        "-d",
        "--name",
        "checked",
        "--health-cmd",
        "test -e /tmp/well",
    ];
    let command = [BUSYBOX, "sh", "-c", "touch /tmp/well; sleep 1000"];
    podman
        .run(
            &[
                &check[..],
                &["--health-interval", "disable", "--health-retries", "1"],
                &command,
            ]
            .concat(),
        )?
        .text()?;
    until("the check's success", || {
        Ok(podman.run(&["healthcheck", "run", "checked"])?.status == 0)
    })?;
    podman
        .run(&["exec", "checked", "rm", "/tmp/well"])?
        .text()?;
    podman
        .run(&["healthcheck", "run", "checked"])?
        .ends_with(1)?;
    podman
        .run(&["rm", "--force", "--time", "0", "checked", "again"])?
        .text()?;
    Ok(())
}

fn changes_a_pod(podman: &Podman) -> Result<()> {
    podman
        .run(&[
            "pod",
            "create",
            "--name",
            "pod",
            "--share-parent=false",
            "--hostname",
            "podhost",
        ])?
        .text()?;
    let member = ["run", "-d", "--pod", "pod", "--name"];
    let sleeper = [BUSYBOX, "sleep", "1000"];
    podman
        .run(&[&member[..], &["first"], &sleeper].concat())?
        .text()?;
    podman
        .run(&[&member[..], &["second"], &sleeper].concat())?
        .text()?;
    // Each has its own files.
    podman.run(&["exec", "first", "touch", "/mine"])?.text()?;
    podman
        .run(&["exec", "second", "ls", "/mine"])?
        .ends_with(1)?;
    // One leaves, a third comes, and they stop and start together.
    podman
        .run(&["rm", "--force", "--time", "0", "first"])?
        .text()?;
    podman
        .run(&["run", "--rm", "--pod", "pod", BUSYBOX, "hostname"])?
        .prints("podhost")?;
    machines_are(podman, 1)?;
    podman.run(&["pod", "stop", "--time", "0", "pod"])?.text()?;
    machines_are(podman, 0)?;
    podman.run(&["pod", "start", "pod"])?.text()?;
    machines_are(podman, 1)?;
    podman
        .run(&["exec", "second", "hostname"])?
        .prints("podhost")?;
    podman
        .run(&["pod", "rm", "--force", "--time", "0", "pod"])?
        .text()?;
    machines_are(podman, 0)
}

/// Two containers, one of which is done soon.
const KUBE: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: kube
spec:
  restartPolicy: Never
  containers:
  - name: web
    image: localhost/busybox:1
    command: [sh, -c, 'echo ready; sleep 1000']
    env: [{name: A, value: b}]
    resources: {limits: {memory: 64Mi}}
  - name: job
    image: localhost/busybox:1
    command: [sh, -c, 'echo done; exit 6']
";

#[test]
fn podman_plays_a_pod_of_kubernetes() -> Result<()> {
    // With runc, this needs podman's systemd cgroup manager: see docs/compatibility.md.
    Podman::tell_with(&[Runtime::Bulkhead], |podman| {
        let file = podman.files()?.join("pod.yaml");
        fs::write(&file, KUBE)?;
        let file = file.to_string_lossy();
        podman
            .run(&["kube", "play", "--network", "none", &file])?
            .text()?;
        machines_are(podman, 1)?;
        podman.wait_for_log("kube-web", "ready")?;
        podman.run(&["wait", "kube-job"])?.prints("6")?;
        podman.run(&["logs", "kube-job"])?.prints("done")?;
        let script = "echo $A $(hostname) $(cat /sys/fs/cgroup/memory.max)";
        podman
            .run(&["exec", "kube-web", "sh", "-c", script])?
            .prints("b kube 67108864")?;
        podman.run(&["kube", "down", &file])?.text()?;
        machines_are(podman, 0)
    })?;
    Ok(())
}
