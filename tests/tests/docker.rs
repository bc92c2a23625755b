//! docker, from Debian's package: its daemon, its containerd, and runc's shim drive the command line.

use std::{
    fs,
    io::Read,
    net::{TcpListener, TcpStream},
};

use anyhow::{Context, Result, ensure};
use system_tests::{
    client::{command, docker::Docker, images::BUSYBOX, until},
    image::Host,
};

/// Says when it is ready, answers a signal, and ends by another with a status of its own.
const SERVICE: &str = "trap 'echo usr1' USR1; trap 'echo bye; exit 3' TERM; echo ready; \
                       echo trouble >&2; while :; do sleep 0.1; done";

#[test]
fn docker_runs_enters_freezes_and_stops_containers() -> Result<()> {
    Docker::tell(|docker| {
        runs_to_the_end(docker)?;
        has_a_terminal(docker)?;
        serves(docker)?;
        match docker.runtime.is_ours() {
            true => lends_its_images(docker),
            false => Ok(()),
        }
    })
}

/// `bulkhead run` gets an image out of the daemon.
fn lends_its_images(docker: &Docker) -> Result<()> {
    let host = Host::new()?;
    let image = format!("docker-daemon:{BUSYBOX}");
    let mut run = host.run_command(&["--rm", &image, "echo", "lent"])?;
    let run = command::run(run.env("DOCKER_HOST", docker.address()))?;
    run.prints("lent")?;
    let mut pull = host.command("pull", &["docker-daemon:localhost/none:1"])?;
    let pull = command::run(pull.env("DOCKER_HOST", docker.address()))?;
    pull.ends_with(125)?
        .tells("skopeo cannot copy docker-daemon:localhost/none:1")?;
    Ok(())
}

/// The file of a limit, where cgroup v2 has it.
const LIMIT: &str = "/sys/fs/cgroup/memory.max";

fn runs_to_the_end(docker: &Docker) -> Result<()> {
    let script = format!(
        "cat; echo out; echo err >&2; echo $(id -u) $(cat {LIMIT}) $(cat /v/given); exit 5"
    );
    let volume = docker.directory().join("volume");
    fs::create_dir_all(&volume)?;
    fs::write(volume.join("given"), "shared\n")?;
    let volume = format!("{}:/v:ro", volume.display());
    let limits = [
        "--rm", "-i", "--init", "--user", "1000", "--memory", "64m", "--volume", &volume, BUSYBOX,
    ];
    let command = [&limits[..], &["sh", "-c", &script]].concat();
    let done = docker.feed(&docker.arguments("none", &command), "in\n")?;
    done.ends_with(5)?;
    ensure!(
        done.stdout == "in\nout\n1000 67108864 shared\n",
        "stdout: {:?}",
        done.stdout
    );
    // Before it stands a warning of docker's, that it cannot limit swap here.
    ensure!(done.stderr.ends_with("err\n"), "stderr: {:?}", done.stderr);
    let missing = docker.run(&docker.arguments("none", &["--rm", BUSYBOX, "/missing"]))?;
    missing.ends_with(127)?.tells("/missing")?;
    Ok(())
}

/// On a network of its own, which gives it its address.
fn has_a_terminal(docker: &Docker) -> Result<()> {
    docker
        .run(&["network", "create", "--subnet", "10.233.0.0/24", "own"])?
        .text()?;
    let mut terminal = docker
        .terminal(&docker.arguments("own", &["--rm", "-it", "--name", "me", BUSYBOX, "sh"]))?;
    // The size arrives a moment after the start.
    until("the terminal's size", || {
        terminal.type_in("stty size\r")?;
        terminal.shows_soon("30 90")
    })?;
    terminal.type_in("ip -4 -o addr show eth0\r")?;
    terminal.shows("inet 10.233.0.2/24")?;
    // By docker's own name server, on a loopback of the host's side.
    terminal.type_in("grep -c 127.0.0.11 /etc/resolv.conf; nslookup -type=a me | tail -n 2\r")?;
    terminal.shows("Address: 10.233.0.2")?;
    terminal.type_in("exit 7\r")?;
    let (status, shown) = terminal.end()?;
    ensure!(status == 7, "ended with {status}: {shown:?}");
    docker.run(&["network", "rm", "own"])?.text()?;
    Ok(())
}

fn serves(docker: &Docker) -> Result<()> {
    let service = ["-d", "--name", "web", BUSYBOX, "sh", "-c", SERVICE];
    docker.run(&docker.arguments("bridge", &service))?.text()?;
    let logs = || docker.run(&["logs", "web"]);
    until("the service", || Ok(logs()?.stdout.contains("ready")))?;
    on_the_bridge(docker)?;
    joins_and_leaves_a_network(docker)?;

    let exec = [
        "exec", "-i", "-u", "user", "-w", "/tmp", "-e", "A=b", "web", "sh", "-c",
    ];
    let script = "cat; echo $(id -u) $PWD $A; exit 9";
    let done = docker.feed(&[&exec[..], &[script]].concat(), "in\n")?;
    done.ends_with(9)?;
    ensure!(
        done.stdout == "in\n1000 /tmp b\n",
        "stdout: {:?}",
        done.stdout
    );

    docker.run(&["top", "web"])?.tells("sh -c")?;
    let stats = [
        "stats",
        "--no-stream",
        "--format",
        "{{.MemUsage}} of {{.PIDs}}",
        "web",
    ];
    let stats = docker.run(&stats)?;
    // With Bulkhead it is the cgroup of the process that stands for the container; the machine's
    // lies beside it (docs/decisions/0055-cgroups-of-the-host.md).
    let memory = !stats.text()?.starts_with("0B");
    ensure!(
        memory || docker.runtime.is_ours(),
        "no memory: {}",
        stats.stdout
    );
    let pid = docker.run(&["inspect", "--format", "{{.State.Pid}}", "web"])?;
    let net = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net"));
    let theirs = net(pid.text()?).context("no process stands for the container")?;
    ensure!(theirs != net("self")?, "the host's own network");

    docker
        .run(&["update", "--memory", "80m", "--memory-swap", "80m", "web"])?
        .text()?;
    let limit = ["exec", "web", "cat", LIMIT];
    docker.run(&limit)?.prints("83886080")?;
    docker.run(&["pause", "web"])?.text()?;
    docker
        .run(&["inspect", "--format", "{{.State.Status}}", "web"])?
        .prints("paused")?;
    docker.run(&["unpause", "web"])?.text()?;
    docker.run(&["kill", "--signal", "USR1", "web"])?.text()?;
    until("the signal's answer", || {
        Ok(logs()?.stdout.contains("usr1"))
    })?;

    docker.run(&["stop", "--time", "60", "web"])?.text()?;
    docker
        .run(&["inspect", "--format", "{{.State.ExitCode}}", "web"])?
        .prints("3")?;
    ensure!(
        logs()?.stdout == "ready\nusr1\nbye\n",
        "log: {:?}",
        logs()?.stdout
    );
    docker.run(&["start", "web"])?.text()?;
    docker.run(&["kill", "web"])?.text()?;
    docker.run(&["wait", "web"])?.prints("137")?;
    docker.run(&["rm", "web"])?.text()?;
    Ok(())
}

/// The host reaches what listens in it, and it reaches the host.
fn on_the_bridge(docker: &Docker) -> Result<()> {
    let format = "{{.NetworkSettings.IPAddress}} {{.NetworkSettings.Gateway}}";
    let told = docker.run(&["inspect", "--format", format, "web"])?;
    let (address, gateway) = told.text()?.split_once(' ').context("no address")?;
    serves_once(docker, address)?;
    let listener = TcpListener::bind((gateway, 0))?;
    let port = listener.local_addr()?.port();
    let client = format!("echo from inside | nc {gateway} {port}");
    docker
        .run(&["exec", "-d", "web", "sh", "-c", &client])?
        .text()?;
    listener.set_nonblocking(true)?;
    until("a connection from inside", || {
        let Ok((mut connection, _)) = listener.accept() else {
            return Ok(false);
        };
        let mut text = String::new();
        connection.read_to_string(&mut text)?;
        ensure!(text == "from inside\n", "{text:?}");
        Ok(true)
    })
}

/// Something that listens in it is reached at this address.
fn serves_once(docker: &Docker, address: &str) -> Result<()> {
    let server = "echo hello | nc -l -p 80";
    docker
        .run(&["exec", "-d", "web", "sh", "-c", server])?
        .text()?;
    until("an answer over the bridge", || {
        let Ok(mut connection) = TcpStream::connect((address, 80)) else {
            return Ok(false);
        };
        let mut text = String::new();
        connection.read_to_string(&mut text)?;
        ensure!(text == "hello\n", "{text:?}");
        Ok(true)
    })
}

/// While it runs: a further interface comes, with the default route, and goes.
fn joins_and_leaves_a_network(docker: &Docker) -> Result<()> {
    docker
        .run(&["network", "create", "--subnet", "10.233.1.0/24", "beside"])?
        .text()?;
    let inside = |script: &str| docker.run(&["exec", "web", "sh", "-c", script]);
    for _ in 0..2 {
        docker
            .run(&["network", "connect", "beside", "web"])?
            .text()?;
        let format = "{{.NetworkSettings.Networks.beside.IPAddress}}";
        let told = docker.run(&["inspect", "--format", format, "web"])?;
        let address = told.text()?;
        // Each is called otherwise than those before.
        let show = "ip -4 -o addr; nslookup -type=a web 127.0.0.11";
        until("the further interface", || {
            let shown = inside(show)?.stdout;
            Ok(shown.contains(&format!("inet {address}/24"))
                && shown.contains(&format!("Address: {address}")))
        })?;
        serves_once(docker, address)?;
        docker
            .run(&["network", "disconnect", "beside", "web"])?
            .text()?;
        until("the interface's end", || {
            let cards = inside("ls -d /sys/class/net/eth*")?;
            let routes = inside("ip route")?.stdout;
            Ok(
                cards.stdout == "/sys/class/net/eth0\n"
                    && routes.contains("default via 10.232.0.1"),
            )
        })?;
    }
    docker.run(&["network", "rm", "beside"])?.text()?;
    on_the_bridge(docker)
}
