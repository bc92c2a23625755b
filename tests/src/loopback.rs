//! Connections to 127.0.0.1 and `[::1]` in a pod's network namespace, which reach what listens there
//! in its guest alone, however many there are and however their ends behave.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::{
    prctl::set_child_subreaper,
    socket::{setsockopt, sockopt},
};
use serde_json::json;
use shim::network::Namespace;

use crate::{
    client::{containerd::Containerd, leftovers::Leftovers, until},
    container::Bundle,
    scratch,
};

const LOOPBACKS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

// The ports of `local-server`.
const ECHO: u16 = 7;
const SOME: u16 = 8;
const NOTHING: u16 = 9;
const EVERYTHING: u16 = 19;

/// Enough for a busy lab machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// More than a pod takes at a time, which is 512 if it has descriptors for them.
const IDLE: usize = 600;

/// What may be on its way in one connection, in all the buffers of both kernels.
const BUFFERED_MAX: usize = 16 << 20;

/// Those who connect at the same time, and how often each does.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// How many.
    pub clients: u32,
    /// How often.
    pub times: u32,
}

/// Runs a program in the container and returns its output.
pub type Exec<'a> = dyn Fn(&[&str]) -> Result<String> + 'a;

/// Tells `story` to the pod of a container that `bulkhead run` made, in which `local-server` runs.
/// Its second argument runs a program in the container.
///
/// # Errors
/// When the story does not hold, or something is left.
pub fn below_bulkhead(
    local_server: &str,
    story: impl FnOnce(&Pod, &Exec<'_>) -> Result<()>,
) -> Result<()> {
    // As an engine's monitor does, to adopt what the command leaves running.
    set_child_subreaper(true)?;
    let bundle = server(local_server)?;
    let pid_file = bundle.path().join("pid");
    let flags = ["--detach", "--pid-file", &pid_file.to_string_lossy()];
    let mut run = bundle.command(&flags)?;
    run.stdin(Stdio::null()).stdout(Stdio::null());
    let run = run.stderr(Stdio::inherit()).status()?;
    ensure!(run.success(), "{run}");
    let exec = |args: &[&str]| {
        let done = bundle
            .bulkhead(&[&["exec", "web"], args].concat())?
            .output()?;
        ensure!(done.status.success(), "{done:?}");
        Ok(String::from_utf8(done.stdout)?)
    };
    let pod = Pod::of(fs::read_to_string(&pid_file)?.parse()?);
    let told = pod.and_then(|pod| story(&pod, &exec));
    let delete = bundle.bulkhead(&["delete", "--force", "web"])?.output()?;
    told?;
    ensure!(delete.status.success(), "{delete:?}");
    bundle.nothing_is_left()
}

/// As [`below_bulkhead`], below containerd.
///
/// # Errors
/// As [`below_bulkhead`].
pub fn below_containerd(
    local_server: &str,
    story: impl FnOnce(&Pod, &Exec<'_>) -> Result<()>,
) -> Result<()> {
    let containerd = Containerd::start()?;
    let before = Leftovers::now()?;
    let bundle = server(local_server)?;
    bundle.edit(|config| config["root"]["path"] = json!(bundle.rootfs()))?;
    let config = bundle.path().join("config.json");
    let config = config.to_string_lossy();
    let runtime = "io.containerd.bulkhead.v2";
    let run = ["run", "-d", "--runtime", runtime, "--config", &config, "l1"];
    containerd.ctr(&run)?.ends_with(0)?;

    let list = containerd.ctr(&["tasks", "ls"])?;
    let pid = list.text()?.lines().nth(1).context("no task")?;
    let pid: u32 = pid.split_whitespace().nth(1).context("no pid")?.parse()?;
    let exec = |args: &[&str]| {
        let exec = [&["tasks", "exec", "--exec-id", "e1", "l1"], args].concat();
        Ok(containerd.ctr(&exec)?.text()?.to_owned())
    };
    let told = Pod::of(pid).and_then(|pod| story(&pod, &exec));
    told.with_context(|| containerd.logs())?;
    containerd.ctr(&["tasks", "rm", "-f", "l1"])?;
    containerd.ctr(&["containers", "rm", "l1"])?.ends_with(0)?;
    before.are_all().with_context(|| containerd.logs())
}

/// A bundle in which `local-server` runs.
fn server(local_server: &str) -> Result<Bundle> {
    let bundle = Bundle::new(&[])?;
    let directory = bundle.rootfs().join("server");
    fs::create_dir(&directory)?;
    let program = scratch::program(local_server, &directory)?;
    let command = program.command("/server");
    let arguments: Vec<_> = command.split(' ').collect();
    bundle.edit(|config| {
        config["process"]["args"] = json!(arguments);
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_NET_BIND_SERVICE"]);
        }
    })?;
    Ok(bundle)
}

/// A pod's network as the host has it.
pub struct Pod(Namespace);

impl Pod {
    /// The one in whose network namespace `pid` is.
    fn of(pid: u32) -> Result<Self> {
        let file = File::open(format!("/proc/{pid}/ns/net"))?;
        Ok(Self(Namespace::open(file.into())?))
    }

    /// Each address is the guest's, and connections are whole or known to be broken.
    ///
    /// # Errors
    /// When one is not.
    pub fn is_reached(&self, load: Load) -> Result<()> {
        until("the guest's server", || {
            Ok(self.connect(LOOPBACKS[1], EVERYTHING).is_ok())
        })?;
        for ip in LOOPBACKS {
            self.echoes(ip, 1)?;
            let refused = self.connect(ip, 5).expect_err("nobody listens there");
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        }
        self.many_come_and_go(load)
    }

    /// Of many, a third ends as it should, a third is broken off by the client and a third by the
    /// server.
    fn many_come_and_go(&self, load: Load) -> Result<()> {
        let one = |number: u32| {
            let ip = LOOPBACKS[number as usize / 3 % 2];
            let told = match number % 3 {
                0 => self.echoes(ip, number),
                1 => self.breaks_off(ip, number),
                _ => self.is_broken_off(ip, number),
            };
            told.with_context(|| format!("connection {number} to {ip}"))
        };
        let Load { clients, times } = load;
        thread::scope(|scope| {
            let client =
                |first| scope.spawn(move || (0..times).try_for_each(|n| one(first * times + n)));
            let clients: Vec<_> = (0..clients).map(client).collect();
            let mut ends = clients.into_iter().map(|client| client.join());
            ends.try_for_each(|end| end.unwrap_or_else(|_| anyhow::bail!("a client panicked")))
        })
    }

    /// Both directions are exact, and the end of each is known.
    fn echoes(&self, ip: IpAddr, number: u32) -> Result<()> {
        let said = bytes(number);
        let mut stream = self.connect(ip, ECHO)?;
        let mut writer = stream.try_clone()?;
        let heard = thread::scope(|scope| {
            let writing = scope.spawn(|| {
                writer.write_all(&said)?;
                writer.shutdown(Shutdown::Write)
            });
            let mut heard = Vec::new();
            let end = stream.read_to_end(&mut heard);
            end.with_context(|| format!("after {} of {} bytes", heard.len(), said.len()))?;
            writing.join().unwrap_or(Ok(()))?;
            anyhow::Ok(heard)
        })?;
        let (len, all) = (heard.len(), said.len());
        ensure!(heard == said, "{len} of {all} bytes and an end, or others");
        Ok(())
    }

    /// A client that leaves with something unread and something unsaid.
    fn breaks_off(&self, ip: IpAddr, number: u32) -> Result<()> {
        let said = bytes(number);
        let mut stream = self.connect(ip, ECHO)?;
        stream.write_all(&said[..said.len() / 2])?;
        let mut heard = vec![0; 1000];
        stream.read_exact(&mut heard)?;
        ensure!(heard == said[..1000], "other bytes");
        Ok(())
    }

    /// A server that ends while its client still talks, which the client is told.
    fn is_broken_off(&self, ip: IpAddr, number: u32) -> Result<()> {
        let mut stream = self.connect(ip, SOME)?;
        let count = 10_000 + number;
        stream.write_all(&count.to_be_bytes())?;
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard)?;
        let expected: Vec<_> = (0..count).map(|at| at as u8).collect();
        let len = heard.len();
        ensure!(heard == expected, "{len} of {count} bytes, or others");
        let deadline = Instant::now() + PATIENCE;
        while stream.write_all(&[0; 1000]).is_ok() {
            ensure!(Instant::now() < deadline, "the client can talk for ever");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// As many servers that do not read and clients that do not, at each address: both directions
    /// come to a halt, and others go on.
    ///
    /// # Errors
    /// When more and more is on its way, or others do not go on.
    pub fn bears_ends_that_take_nothing(&self, count: u32) -> Result<()> {
        let mut deaf = Vec::new();
        let mut flooded = Vec::new();
        for ip in LOOPBACKS {
            for _ in 0..count {
                deaf.push((self.connect(ip, NOTHING)?, 0));
                flooded.push(self.connect(ip, EVERYTHING)?);
            }
        }
        let chunk = vec![7; 64 << 10];
        let mut last = Instant::now();
        // A slower machine stops earlier, with less on its way: never in vain.
        while last.elapsed() < Duration::from_secs(2) {
            for (stream, written) in &mut deaf {
                stream.set_nonblocking(true)?;
                match stream.write(&chunk) {
                    Ok(len) => {
                        *written += len;
                        ensure!(*written < BUFFERED_MAX, "{written} bytes are on their way");
                        last = Instant::now();
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error).context("a server that does not read"),
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
        for number in 3..7 {
            for ip in LOOPBACKS {
                let echoed = self.echoes(ip, number);
                echoed.context("beside those that take nothing")?;
            }
        }
        // What waited is there.
        for mut stream in flooded {
            let mut heard = vec![0; 256 << 10];
            stream.read_exact(&mut heard)?;
            ensure!(heard.iter().all(|byte| *byte == b'x'), "other bytes");
        }
        for (stream, _) in deaf {
            leaves_by_reset(&stream)?;
        }
        Ok(())
    }

    /// Clients that are there and do nothing: those for whom there is no room are refused, and the
    /// pod does its other work, which `ask` asks for; later there is room for others again.
    ///
    /// # Errors
    /// When all are served, or nothing else is done.
    pub fn has_more_clients_than_room(&self, ask: impl Fn() -> Result<()>) -> Result<()> {
        let mut served = Vec::new();
        let mut refused = 0;
        for _ in 0..IDLE {
            let client = self.connect(LOOPBACKS[0], NOTHING);
            match client {
                Ok(client) => served.push(client),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => refused += 1,
                // By a listener that was there for another.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => refused += 1,
                Err(error) => return Err(error).context("neither served nor refused"),
            }
            // That there is no more room is enough.
            if refused > 20 {
                break;
            }
        }
        ensure!(refused > 0, "{} clients are served", served.len());
        ensure!(
            served.len() > 20,
            "only {} clients are served",
            served.len()
        );
        ask()?;
        served.iter().try_for_each(leaves_by_reset)?;
        drop(served);
        until("room for others again", || {
            Ok(self.echoes(LOOPBACKS[1], 9).is_ok())
        })
    }

    fn connect(&self, ip: IpAddr, port: u16) -> io::Result<TcpStream> {
        let address = SocketAddr::new(ip, port);
        let stream = self
            .0
            .run(|| TcpStream::connect_timeout(&address, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }
}

/// Else a server that does not read keeps the connection until keepalive finds its client gone.
fn leaves_by_reset(stream: &TcpStream) -> Result<()> {
    let (l_onoff, l_linger) = (1, 0);
    Ok(setsockopt(
        stream,
        sockopt::Linger,
        &libc::linger { l_onoff, l_linger },
    )?)
}

/// Bytes that are others for each number, about 100 KiB.
fn bytes(number: u32) -> Vec<u8> {
    let words = (0..25_000 + number).map(|i| (i ^ number << 20).wrapping_mul(2_654_435_761));
    words.flat_map(u32::to_le_bytes).collect()
}
