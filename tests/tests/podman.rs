//! podman, from Debian's package: what it is used for most.

use std::{fs, io::Read, net::TcpStream, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::client::{
    images::BUSYBOX,
    podman::{Podman, machines_are},
    until,
};

#[test]
fn podman_runs_enters_measures_and_stops_containers_and_pods_as_with_runc() -> Result<()> {
    let reports = Podman::tell(|podman| {
        let report = runs_with_settings(podman)?;
        has_a_terminal(podman)?;
        serves(podman)?;
        has_pods(podman)?;
        Ok(report)
    })?;
    for report in &reports {
        for line in WANTED {
            ensure!(
                report.lines().any(|told| told == line),
                "no {line:?} in:\n{report}"
            );
        }
    }
    // Not one line differs.
    let same = reports.windows(2).all(|pair| pair[0] == pair[1]);
    ensure!(same, "the reports differ:\n{}", reports.join("\n---\n"));
    Ok(())
}

/// Says all that podman's flags have set.
const REPORT: &str = r#"
    cat
    echo "id $(id -u) $(id -g) groups $(id -G)"
    echo "in $PWD as $(hostname), A is $A"
    echo "files $(ulimit -n) core $(ulimit -c)"
    echo "memory $(cat /sys/fs/cgroup/memory.max) swap $(cat /sys/fs/cgroup/memory.swap.max)"
    echo "cpu $(cat /sys/fs/cgroup/cpu.max) weight $(cat /sys/fs/cgroup/cpu.weight)"
    echo "pids $(cat /sys/fs/cgroup/pids.max)"
    echo "first $(tr '\0' ' ' </proc/1/cmdline | head -n 1)"
    grep -E 'Cap(Eff|Bnd)|NoNewPrivs|Seccomp:' /proc/self/status
    echo "umask $(umask) oom $(cat /proc/self/oom_score_adj)"
    echo "sysctl $(cat /proc/sys/net/ipv4/ip_default_ttl)"
    for place in /scratch /dev/shm; do
        echo "$place $(df -k $place | awk 'NR == 2 { print $2 }') KiB"
    done
    grep -o ' /scratch [^ ]*' /proc/self/mountinfo
    touch /root-file 2>&1
    cat /ro/file; touch /ro/new 2>&1
    cat /single; echo changed >/single
    cat /rw/file; echo new >/rw/new
    echo kept >>/named/count; cat /named/count
    ls -l /dev | grep -v kcore | awk 'NR > 1 { print $1, $NF }' | sort
    echo err >&2; exit 5
"#;

/// Some of what it is to say.
const WANTED: [&str; 16] = [
    "in",
    "id 1000 1000 groups 1000 10",
    "in /tmp as box, A is b c",
    "files 123 core 0",
    "memory 100663296 swap 0",
    "cpu 50000 100000 weight 20",
    "pids 77",
    "umask 0027 oom 100",
    "sysctl 42",
    "/scratch 4096 KiB",
    "/dev/shm 8192 KiB",
    "touch: /root-file: Read-only file system",
    "from ro",
    "touch: /ro/new: Read-only file system",
    "from single",
    "from rw",
];

/// One container with about all that can be set, its streams and its status.
fn runs_with_settings(podman: &Podman) -> Result<String> {
    let files = podman.files()?;
    for directory in ["ro", "rw"] {
        fs::create_dir_all(files.join(directory))?;
        fs::write(
            files.join(directory).join("file"),
            format!("from {directory}\n"),
        )?;
    }
    fs::write(files.join("single"), "from single\n")?;
    for name in ["rw", "single"] {
        nix::unistd::chown(&files.join(name), Some(1000.into()), Some(1000.into()))?;
    }
    let bind = |from: &str, to: &str| format!("{}/{from}:{to}", files.display());
    let (ro, rw) = (bind("ro", "/ro:ro"), bind("rw", "/rw"));
    let single = bind("single", "/single");
    let mut flags = vec![
        "run",
        "--rm",
        "-i",
        "--init",
        "--read-only",
        "--hostname",
        "box",
    ];
    flags.extend([
        "--user",
        "1000:1000",
        "--group-add",
        "10",
        "--workdir",
        "/tmp",
    ]);
    flags.extend([
        "--env",
        "A=b c",
        "--umask",
        "0027",
        "--oom-score-adj",
        "100",
    ]);
    flags.extend([
        "--ulimit",
        "nofile=123:456",
        "--ulimit",
        "core=0:0",
        "--ulimit",
        "nproc=99:99",
    ]);
    flags.extend(["--memory", "96m", "--memory-swap", "96m", "--cpus", "0.5"]);
    flags.extend(["--cpu-shares", "512", "--pids-limit", "77"]);
    flags.extend(["--cpuset-cpus", "0", "--cpuset-mems", "0"]);
    flags.extend(["--cap-drop", "all", "--cap-add", "net_raw"]);
    flags.extend(["--security-opt", "no-new-privileges"]);
    flags.extend(["--sysctl", "net.ipv4.ip_default_ttl=42"]);
    flags.extend(["--tmpfs", "/scratch:size=4m,mode=1777", "--shm-size", "8m"]);
    flags.extend(["--volume", &ro, "--volume", &rw, "--volume", &single]);
    flags.extend(["--volume", "named:/named:U"]);
    flags.extend([BUSYBOX, "sh", "-c", REPORT]);
    let done = podman.feed(&flags, "in\n")?;
    done.ends_with(5)?;
    ensure!(done.stderr == "err\n", "stderr: {:?}", done.stderr);
    ensure!(fs::read_to_string(files.join("single"))? == "changed\n");
    ensure!(fs::read_to_string(files.join("rw/new"))? == "new\n");
    // The volume outlives its container, which podman removes.
    let volume = podman.run(&["volume", "inspect", "--format", "{{.Mountpoint}}", "named"])?;
    let volume = std::path::Path::new(volume.text()?).join("count");
    ensure!(fs::read_to_string(volume)? == "kept\n");
    // Podman makes this of the words in the runtime's error.
    let missing = podman.run(&["run", "--rm", BUSYBOX, "/missing"])?;
    missing.ends_with(127)?.tells("/missing")?;
    podman.run(&["ps", "--all", "--quiet"])?.prints("")?;
    Ok(done.stdout)
}

/// One is typed into, and tells of its size and of changes of it.
fn has_a_terminal(podman: &Podman) -> Result<()> {
    let mut terminal = podman.terminal(&["run", "-it", "--rm", BUSYBOX, "sh"])?;
    terminal.type_in("stty size; echo $((6 * 7))\r")?;
    terminal.shows("30 90")?;
    terminal.shows("42")?;
    terminal.resize(25, 70)?;
    until("the terminal's new size", || {
        terminal.type_in("stty size\r")?;
        terminal.shows_soon("25 70")
    })?;
    // Ctrl-C ends what runs in the foreground, not the shell.
    terminal.type_in("sleep 1000\r")?;
    terminal.shows("sleep 1000")?;
    until("the shell's prompt", || {
        terminal.type_in("\x03")?;
        terminal.type_in("echo $((7 * 7))\r")?;
        terminal.shows_soon("49")
    })?;
    terminal.type_in("exit 7\r")?;
    let (status, shown) = terminal.end()?;
    ensure!(status == 7, "ended with {status}: {shown:?}");
    Ok(())
}

/// Says when it is ready, answers a signal, and ends by another with a status of its own.
const SERVICE: &str = "trap 'echo usr1' USR1; trap 'echo bye; exit 3' TERM; echo ready; \
                       echo trouble >&2; while :; do sleep 0.1; done";

/// One in the background is entered, looked at, frozen, signalled and stopped.
fn serves(podman: &Podman) -> Result<()> {
    let id = podman.run(&["run", "-d", "--name", "web", BUSYBOX, "sh", "-c", SERVICE])?;
    ensure!(id.text()?.len() == 64, "no id: {:?}", id.stdout);
    podman.wait_for_log("web", "ready")?;
    machines_are(podman, 1)?;

    let exec = [
        "exec", "-i", "-u", "user", "-w", "/tmp", "-e", "A=b", "web", "sh", "-c",
    ];
    let script = "cat; echo $(id -u) $(id -G) $PWD $A; echo err >&2; exit 9";
    let done = podman.feed(&[&exec[..], &[script]].concat(), "in\n")?;
    done.ends_with(9)?;
    ensure!(
        done.stdout == "in\n1000 1000 10 /tmp b\n",
        "stdout: {:?}",
        done.stdout
    );
    ensure!(done.stderr == "err\n", "stderr: {:?}", done.stderr);
    podman
        .run(&["exec", "web", "/etc/passwd"])?
        .ends_with(126)?;
    sees_the_host_side(podman, "web")?;

    podman.run(&["pause", "web"])?.text()?;
    ensure!(podman.inspect("web", "{{.State.Status}}")? == "paused");
    podman.run(&["kill", "--signal", "USR1", "web"])?.text()?;
    podman.run(&["unpause", "web"])?.text()?;
    podman.wait_for_log("web", "usr1")?;
    podman.run(&["stop", "--time", "60", "web"])?.text()?;
    ensure!(podman.inspect("web", "{{.State.ExitCode}}")? == "3");
    let log = podman.run(&["logs", "web"])?;
    ensure!(
        log.stdout == "ready\nusr1\nbye\n",
        "stdout: {:?}",
        log.stdout
    );
    ensure!(log.stderr == "trouble\n", "stderr: {:?}", log.stderr);
    podman.run(&["rm", "web"])?.text()?;
    Ok(())
}

/// What podman reads of the host's process and cgroup that stand for the container.
fn sees_the_host_side(podman: &Podman, container: &str) -> Result<()> {
    let top = podman.run(&["top", container, "pid", "args"])?;
    let top = top.text()?.to_owned();
    ensure!(top.contains("sh -c"), "no container's command: {top}");

    let stats = podman.run(&["stats", "--no-stream", "--format", "json", container])?;
    let stats: Value = serde_json::from_str(stats.text()?)?;
    let pids = stats[0]["pids"]
        .as_str()
        .and_then(|pids| pids.parse::<u32>().ok());
    ensure!(pids > Some(0), "no processes: {stats}");
    let memory = stats[0]["mem_usage"].as_str().context("no memory")?;
    ensure!(!memory.starts_with("0B"), "no memory: {stats}");

    let state = podman.inspect(container, "{{.State.Status}} {{.State.Pid}}")?;
    let pid = state
        .strip_prefix("running ")
        .with_context(|| state.clone())?;
    for namespace in ["net", "ipc", "uts", "pid", "mnt"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        ensure!(
            of(pid)? != of("self")?,
            "the host's own {namespace} namespace"
        );
    }
    Ok(())
}

/// A pod is one machine, whose containers share its network and its name and have their own
/// processes.
fn has_pods(podman: &Podman) -> Result<()> {
    // With podman 4.3 and its cgroupfs manager, a pod's cgroup forbids all devices (see
    // docs/compatibility.md), so that runc starts nothing there.
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
    let server = "while :; do echo hello | nc -l -p 80; done";
    podman
        .run(&[
            "run", "-d", "--pod", "pod", "--name", "first", BUSYBOX, "sh", "-c", server,
        ])?
        .text()?;
    let client = "hostname; until nc -w 2 127.0.0.1 80 </dev/null; do sleep 0.1; done; pidof nc";
    let second = ["run", "-d", "--pod", "pod", "--name", "second", BUSYBOX];
    podman
        .run(&[&second[..], &["sh", "-c", &format!("{client}; sleep 1000")]].concat())?
        .text()?;
    machines_are(podman, 1)?;
    podman.wait_for_log("second", "podhost\nhello\n")?;
    // One ends, the other goes on.
    podman
        .run(&["rm", "--force", "--time", "0", "first"])?
        .text()?;
    podman
        .run(&["exec", "second", "pidof", "nc"])?
        .ends_with(1)?;
    podman
        .run(&["pod", "rm", "--force", "--time", "0", "pod"])?
        .text()?;
    machines_are(podman, 0)
}

#[test]
fn podman_connects_containers_by_networks_of_its_own() -> Result<()> {
    Podman::tell(|podman| {
        let create = ["network", "create", "--subnet", "10.234.0.0/24", "own"];
        podman.run(&create)?.text()?;
        let serve = "echo ready; while :; do echo hello | nc -l -p 8080; done";
        let flags = [
            "run",
            "-d",
            "--name",
            "web",
            "--network",
            "own",
            "--publish",
            "18080:8080",
        ];
        podman
            .run(&[&flags[..], &[BUSYBOX, "sh", "-c", serve]].concat())?
            .text()?;
        podman.wait_for_log("web", "ready")?;
        // Published, from the host; and to the address.
        let address = podman.inspect("web", "{{.NetworkSettings.Networks.own.IPAddress}}")?;
        for address in ["127.0.0.1:18080", &format!("{address}:8080")] {
            let mut last = Ok(String::new());
            let answered = until("an answer", || {
                last = answer_of(address);
                Ok(last.as_deref().is_ok_and(|text| text == "hello\n"))
            });
            answered.with_context(|| format!("of {address}, at last {last:?}"))?;
        }
        // By name, from another container, as aardvark-dns tells.
        let ask = format!("nslookup -type=a web | tail -n 2; nc {address} 8080 < /dev/null");
        let asked = ["run", "--rm", "--network", "own", BUSYBOX, "sh", "-c", &ask];
        let asked = podman.run(&asked)?;
        let told = asked.text()?;
        ensure!(
            told.contains(&format!("Address: {address}")) && told.ends_with("hello"),
            "{told}"
        );
        joins_and_leaves_a_network(podman)?;
        podman
            .run(&["rm", "--force", "--time", "0", "web"])?
            .text()?;
        podman.run(&["network", "rm", "own"])?.text()?;
        ensure!(
            TcpStream::connect("127.0.0.1:18080").is_err(),
            "a port stays published"
        );
        Ok(())
    })?;
    Ok(())
}

/// While it runs: a further interface comes, and goes.
fn joins_and_leaves_a_network(podman: &Podman) -> Result<()> {
    let create = ["network", "create", "--subnet", "10.234.1.0/24", "beside"];
    podman.run(&create)?.text()?;
    for _ in 0..2 {
        podman
            .run(&["network", "connect", "beside", "web"])?
            .text()?;
        let format = "{{.NetworkSettings.Networks.beside.IPAddress}}";
        let address = podman.inspect("web", format)?;
        until("the further interface", || {
            let show = [
                "exec", "web", "ip", "-4", "-o", "addr", "show", "dev", "eth1",
            ];
            let shown = podman.run(&show)?.stdout;
            Ok(shown.contains(&format!("inet {address}/24")))
        })?;
        until("an answer by it", || {
            Ok(answer_of(&format!("{address}:8080")).is_ok_and(|text| text == "hello\n"))
        })?;
        podman
            .run(&["network", "disconnect", "beside", "web"])?
            .text()?;
        until("the interface's end", || {
            let shown = podman.run(&["exec", "web", "ls", "/sys/class/net"])?;
            Ok(shown.status == 0 && !shown.stdout.contains("eth1"))
        })?;
    }
    podman.run(&["network", "rm", "beside"])?.text()?;
    Ok(())
}

/// All that is said on a connection.
fn answer_of(address: &str) -> std::io::Result<String> {
    let mut connection = TcpStream::connect_timeout(
        &address.parse().map_err(std::io::Error::other)?,
        Duration::from_secs(10),
    )?;
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut text = String::new();
    connection.read_to_string(&mut text)?;
    Ok(text)
}
