//! From the kernel's execution of `/init` to serving the host.
//!
//! Time to the hello is what a start waits for, so before it there is nothing
//! but three sockets; file systems come while the host reads it.

use std::{
    convert::Infallible,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::symlink,
    },
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{Resource, setrlimit},
        socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket},
        statfs::{FsType, TMPFS_MAGIC, statfs},
    },
    unistd::{chdir, chroot, write},
};
use protocol::{AGENT_PORT, FORWARD_PORT, HOST_CID, Hello, LOOKUP_PORT, READY_PORT, STREAM_PORT};
use tokio::sync::Notify;

use crate::{
    cgroup,
    container::Containers,
    forward,
    guest::Guest,
    log, lookup, parameters, port,
    port::Port,
    reaper::Reaper,
    rpc::{self, Service},
    stream::Streams,
    sys,
};

/// Why the guest cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Run by hand.
    #[error("this is process 1 of a Bulkhead guest and runs as nothing else")]
    NotFirst,
    /// A step.
    #[error("cannot {doing}: {source}")]
    Step {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The server did not start.
    #[error("cannot serve: {0}")]
    Serve(#[from] ttrpc::Error),
}

fn doing<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Step {
        doing,
        source: source.into(),
    }
}

/// How the guest ends.
#[derive(Debug, Clone, Default)]
pub struct Power(Arc<Notify>);

impl Power {
    /// Asks for the end; the answer to who asked still goes out.
    pub fn off(&self) {
        self.0.notify_one();
    }

    /// Waits until the end is asked for.
    pub async fn wait(&self) {
        self.0.notified().await;
    }
}

/// The agent, as the kernel starts it. Comes back only where it is not process 1.
pub fn run() -> Error {
    let started_ns = sys::boottime_ns();
    if std::process::id() != 1 {
        return Error::NotFirst;
    }
    std::panic::set_hook(Box::new(|panic| log!("{panic}")));
    let Err(error) = boot(started_ns);
    log!("{error}");
    end(RebootMode::RB_AUTOBOOT)
}

/// The recipe.
fn boot(started_ns: u64) -> Result<Infallible, Error> {
    fill_standard_streams().map_err(doing("fill the standard streams"))?;
    sys::ignore_broken_pipes().map_err(doing("ignore broken pipes"))?;
    let rpc = port::vsock(AGENT_PORT).map_err(doing("listen for requests"))?;
    let streams = port::vsock(STREAM_PORT).map_err(doing("listen for streams"))?;
    greet(started_ns).map_err(doing("greet the host"))?;
    leave_initramfs().map_err(doing("leave the initramfs"))?;
    mount_file_systems()?;
    parameters::set();
    // The agent's own need: every container takes some of its descriptors.
    setrlimit(Resource::RLIMIT_NOFILE, 1 << 20, 1 << 20).map_err(doing("raise the file limit"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(doing("start the runtime"))?;
    runtime.block_on(serve(started_ns, rpc, streams))?;
    end(RebootMode::RB_POWER_OFF)
}

/// Serves until the host asks for the end.
async fn serve(started_ns: u64, rpc: OwnedFd, streams: OwnedFd) -> Result<(), Error> {
    let power = Power::default();
    let sockets = Sockets {
        rpc: Port::new(rpc).map_err(doing("watch the port of requests"))?,
        streams: Port::new(streams).map_err(doing("watch the port of streams"))?,
    };
    serve_sockets(
        started_ns,
        sockets,
        Path::new("/run/bulkhead"),
        power.clone(),
    )
    .await?;
    let forward = port::vsock(FORWARD_PORT).and_then(Port::new);
    tokio::spawn(forward::serve(
        forward.map_err(doing("watch the port to the loopback"))?,
    ));
    let lookup = port::vsock(LOOKUP_PORT).and_then(Port::new);
    tokio::spawn(lookup::serve(
        lookup.map_err(doing("watch the port for name servers"))?,
    ));
    power.wait().await;
    // The answer that the guest ends is still on its way.
    tokio::time::sleep(Duration::from_millis(20)).await;
    Ok(())
}

/// The sockets that the host talks to.
pub struct Sockets {
    /// Requests.
    pub rpc: Port,
    /// Standard streams.
    pub streams: Port,
}

/// Serves the host's requests and streams in tasks that live as long as the runtime. Roots are
/// put together in `directory`.
///
/// # Errors
/// When a part does not start.
pub async fn serve_sockets(
    started_ns: u64,
    sockets: Sockets,
    directory: &Path,
    power: Power,
) -> Result<(), Error> {
    let reaper = Arc::new(Reaper::new().map_err(doing("watch for the ends of processes"))?);
    let streams = Arc::new(Streams::default());
    let containers = Containers::new(streams.clone(), reaper.clone(), directory)
        .map_err(doing("make the place for roots"))?;
    let containers = Arc::new(containers);
    let service = Service {
        guest: Guest::default(),
        containers,
        network: Mutex::default(),
        power,
        started_ns,
    };
    let server = rpc::serve(service, sockets.rpc).await?;
    tokio::spawn(async move {
        // Held here, for as long as everything else.
        let _server = server;
        if let Err(error) = reaper.run().await {
            log!("cannot learn of the ends of processes any more: {error}");
        }
    });
    tokio::spawn(streams.serve(sockets.streams));
    Ok(())
}

/// The kernel starts `/init` without standard streams when there is no console; their numbers
/// must not fall to sockets.
fn fill_standard_streams() -> io::Result<()> {
    use nix::fcntl::{OFlag, open};
    while let Some(number) = (0..3).find(|number| !sys::is_open(*number)) {
        let empty = nix::sys::stat::Mode::empty();
        let fd =
            open("/dev/null", OFlag::O_RDWR, empty).or_else(|_| open("/", OFlag::O_PATH, empty))?;
        debug_assert_eq!(fd.as_raw_fd(), number);
        // Open for as long as the agent is.
        std::mem::forget(fd);
    }
    Ok(())
}

/// How long a host may take that has more to do than it can: longer than it waits itself.
const GREETING: Duration = Duration::from_secs(2 * 3600);

/// Tells the host that the ports are open.
fn greet(started_ns: u64) -> io::Result<()> {
    let host = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    sys::wait_for_peer(host.as_fd(), GREETING)?;
    connect(host.as_raw_fd(), &VsockAddr::new(HOST_CID, READY_PORT))?;
    let hello = Hello {
        version: protocol::VERSION,
        main_ns: started_ns,
        ready_ns: sys::boottime_ns(),
    };
    write(&host, &hello.to_bytes())?;
    Ok(())
}

/// The kernel's RAMFS_MAGIC, which an initramfs without tmpfs has.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// pivot_root does not leave an initramfs, so containers could not leave it either: a mount of
/// the same tree over it becomes the root.
fn leave_initramfs() -> io::Result<()> {
    let kind = statfs("/")?.filesystem_type();
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Ok(());
    }
    let none = None::<&str>;
    fs::create_dir("/.root")?;
    mount(Some("/"), "/.root", none, MsFlags::MS_BIND, none)?;
    chdir("/.root")?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    chroot(".")?;
    Ok(chdir("/")?)
}

/// A file system of the guest's: type, where, flags, data.
type Mount = (&'static str, &'static str, MsFlags, Option<&'static str>);

/// All that the guest has mounted besides its root.
fn file_systems() -> [Mount; 8] {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let dev = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let run = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    [
        ("proc", "/proc", safe, None),
        ("sysfs", "/sys", safe, None),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755")),
        ("tmpfs", "/run", run, Some("mode=0755")),
        ("tmpfs", "/tmp", run, Some("mode=1777")),
        ("cgroup2", cgroup::ROOT, safe, Some("memory_recursiveprot")),
        (
            "devpts",
            "/dev/pts",
            dev,
            Some("mode=0620,ptmxmode=0666,gid=5"),
        ),
        ("tmpfs", "/dev/shm", run, Some("mode=1777")),
    ]
}

fn mount_file_systems() -> Result<(), Error> {
    for (kind, at, flags, data) in file_systems() {
        // A directory that the image has, and a mount that the kernel made, are as good.
        let _ = fs::create_dir(at);
        match mount(Some(kind), at, Some(kind), flags, data) {
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(error) => {
                log!("cannot mount {kind} on {at}: {error}");
                return Err(doing("mount the guest's file systems")(error));
            }
        }
    }
    for (target, name) in [("/proc/self/fd", "/dev/fd"), ("pts/ptmx", "/dev/ptmx")] {
        // devtmpfs has a ptmx of its own, which serves as well.
        let _ = symlink(target, name);
    }
    Ok(())
}

/// Ends the guest: writes back what is dirty, then off or round.
fn end(mode: RebootMode) -> ! {
    nix::unistd::sync();
    loop {
        let Err(error) = reboot(mode);
        log!("cannot end the guest: {error}");
        std::thread::sleep(Duration::from_secs(1));
    }
}
