//! Connections to 127.0.0.1 and `[::1]` in the pod's namespace at the host reach
//! the guest's loopback: `kubectl port-forward` and the host's probes find the
//! processes where they would be in a container without a machine of its own.
//!
//! ```text
//!   client ──SYN──► lo ──filter: drop──╳
//!                    └─copy─► here ──stream──► agent ──► 127.0.0.1:port of the guest
//!                              │ connected: listen on the address
//!                              │ refused:   nothing
//!                              └─ SYN again, marked ──► lo ──► our listener, or a reset
//! ```
//!
//! The first packet is held back until the guest has answered, so a port that
//! nobody listens on is refused, as it should be, by the host's own kernel.

use std::{
    collections::{HashMap, HashSet},
    fs,
    future::Future,
    io,
    net::{SocketAddr, TcpListener as StdTcpListener},
    os::fd::{AsRawFd, OwnedFd},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::socket::{MsgFlags, recv, send};
use protocol::ForwardTarget;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional, unix::AsyncFd},
    net::{TcpListener, TcpStream, UnixStream},
    task::{AbortHandle, JoinSet},
    time::timeout,
};

use super::{
    Namespace,
    filter::Filter,
    syn::{self, Syn},
    sys,
};
use crate::sys::watch_readable;

/// How long the guest may take to answer. The client asks again meanwhile, which is not heard.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longer than any first packet.
const FRAME: usize = 2048;

/// Connections at one time.
const MAX_CONNECTIONS: usize = 4096;

/// What lets the host's kernel take packets again that were held back: for the loopback, and in
/// the pod's namespace, alone.
const SETTINGS: [&str; 2] = [
    "/proc/sys/net/ipv4/conf/lo/route_localnet",
    "/proc/sys/net/ipv4/conf/lo/accept_local",
];

/// Opens a stream to [`protocol::FORWARD_PORT`] of the guest.
type Dial = dyn Fn() -> Pin<Box<dyn Future<Output = io::Result<UnixStream>> + Send>> + Send + Sync;

/// Why the guest's loopback cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error("the pod's network namespace has no loopback")]
    NoLoopback,
    /// A step.
    #[error("cannot {what} the loopback of the pod's network namespace")]
    Step {
        /// What was being done with it.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The way to the guest's loopback, as long as this lives. What was connected ends with it.
#[derive(Debug)]
pub struct Loopback {
    task: AbortHandle,
    _filter: Filter,
}

impl Loopback {
    /// Leads connections to the loopback of `namespace` to the guest, to whose agent `dial`
    /// opens a stream. Runs in the calling runtime.
    ///
    /// # Errors
    /// When the caller may not, or the kernel lacks packet sockets or traffic control.
    pub fn start<F>(
        namespace: &Namespace,
        dial: impl Fn() -> F + Send + Sync + 'static,
    ) -> Result<Self, Error>
    where
        F: Future<Output = io::Result<UnixStream>> + Send + 'static,
    {
        let step = |what| move |source| Error::Step { what, source };
        let kernel = namespace.kernel();
        let links = kernel.links().map_err(step("find"))?;
        let lo = links.iter().find(|link| link.flags.is_loopback());
        let lo = lo.ok_or(Error::NoLoopback)?.index;
        let program = syn::program();
        let (frames, sender) = namespace
            .run(|| {
                // a file that cannot be written may say what it should already
                for setting in SETTINGS {
                    if fs::read_to_string(setting)?.trim() != "1" {
                        fs::write(setting, "1")?;
                    }
                }
                Ok((sys::frames(lo, &program)?, sys::sender(lo, syn::MARK)?))
            })
            .map_err(step("watch"))?;
        let frames = watch_readable(frames).map_err(step("watch"))?;
        let filter = Filter::drop(kernel, lo, &program).map_err(step("filter what comes in at"))?;
        let shared = Arc::new(Shared {
            namespace: namespace.clone(),
            sender,
            dial: Box::new(move || Box::pin(dial())),
            listeners: Mutex::default(),
        });
        let task = tokio::spawn(shared.serve(frames)).abort_handle();
        Ok(Self {
            task,
            _filter: filter,
        })
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Shared {
    namespace: Namespace,
    sender: OwnedFd,
    dial: Box<Dial>,
    listeners: Mutex<Listeners>,
}

/// For each address that is listened on, the guest's ends of those whose connection is on its way.
type Listeners = HashMap<SocketAddr, HashMap<SocketAddr, UnixStream>>;

/// What a task was about when it ended.
enum Ended {
    Asked(Syn),
    Other,
}

impl Shared {
    /// Takes first packets for ever. Whatever is made of them ends with this.
    async fn serve(self: Arc<Self>, frames: AsyncFd<OwnedFd>) {
        let mut asked = HashSet::new();
        let mut tasks = JoinSet::new();
        let mut buffer = [0; FRAME];
        loop {
            tokio::select! {
                frame = receive(&frames, &mut buffer) => {
                    let Ok(len) = frame else {
                        return;
                    };
                    let frame = &mut buffer[..len];
                    let Some(syn) = syn::read(frame) else {
                        continue;
                    };
                    if tasks.len() < MAX_CONNECTIONS && asked.insert(syn) {
                        tasks.spawn(Arc::clone(&self).connect(syn, frame.to_vec()));
                    }
                }
                Some(ended) = tasks.join_next() => match ended {
                    Ok((Ended::Asked(syn), next)) => {
                        asked.remove(&syn);
                        if let Some(listener) = next {
                            tasks.spawn(Arc::clone(&self).accept(listener, syn.to));
                        }
                    }
                    Ok((Ended::Other, _)) | Err(_) => {}
                }
            }
        }
    }

    /// Asks the guest, and lets the packet go on its way: to a listener of ours, or to nobody.
    async fn connect(self: Arc<Self>, syn: Syn, frame: Vec<u8>) -> (Ended, Option<TcpListener>) {
        let listener = match timeout(PATIENCE, self.ask(syn.to)).await {
            Ok(Ok(stream)) => self.expect(syn, stream),
            Ok(Err(_)) | Err(_) => None,
        };
        if let Err(error) = send(self.sender.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT) {
            tracing::warn!(to = %syn.to, %error, "cannot pass a connection to the loopback on");
        }
        (Ended::Asked(syn), listener)
    }

    /// Has the guest connect to its own `to`.
    async fn ask(&self, to: SocketAddr) -> io::Result<UnixStream> {
        let mut stream = (self.dial)().await?;
        stream.write_all(&ForwardTarget(to).to_bytes()).await?;
        match stream.read_u8().await? {
            ForwardTarget::CONNECTED => Ok(stream),
            errno => Err(io::Error::from_raw_os_error(errno.into())),
        }
    }

    /// Keeps the guest's end until the client's is there; returns a listener for it if there was
    /// none.
    fn expect(&self, syn: Syn, stream: UnixStream) -> Option<TcpListener> {
        let mut listeners = self.listeners();
        if let Some(expected) = listeners.get_mut(&syn.to) {
            expected.insert(syn.from, stream);
            return None;
        }
        let listener = self.listen(syn.to);
        match listener {
            Ok(listener) => {
                listeners.insert(syn.to, HashMap::from([(syn.from, stream)]));
                Some(listener)
            }
            Err(error) => {
                tracing::warn!(to = %syn.to, %error, "cannot listen on the pod's loopback");
                None
            }
        }
    }

    fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let listener = self.namespace.run(|| StdTcpListener::bind(address))?;
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    }

    /// Joins clients of `address` with the guest's ends until no more are expected.
    async fn accept(
        self: Arc<Self>,
        listener: TcpListener,
        address: SocketAddr,
    ) -> (Ended, Option<TcpListener>) {
        let mut streams = JoinSet::new();
        loop {
            let accepted = timeout(PATIENCE, listener.accept()).await;
            let mut listeners = self.listeners();
            let Some(expected) = listeners.get_mut(&address) else {
                break;
            };
            match accepted {
                Ok(Ok((client, from))) => {
                    if let Some(guest) = expected.remove(&from) {
                        streams.spawn(join(client, guest));
                    }
                }
                // who has not come by now will not
                Ok(Err(_)) | Err(_) => expected.clear(),
            }
            if expected.is_empty() {
                listeners.remove(&address);
                break;
            }
        }
        drop(listener);
        while streams.join_next().await.is_some() {}
        (Ended::Other, None)
    }

    fn listeners(&self) -> MutexGuard<'_, Listeners> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries a connection to its end, of which both sides know.
async fn join(mut client: TcpStream, mut guest: UnixStream) {
    let _ = client.set_nodelay(true);
    let _ = copy_bidirectional(&mut client, &mut guest).await;
}

async fn receive(frames: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut guard = frames.readable().await?;
        let received = guard.try_io(|fd| Ok(recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?));
        match received {
            Ok(Ok(len)) => return Ok(len),
            // such as the loopback's being switched off
            Ok(Err(error)) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
    }
}
