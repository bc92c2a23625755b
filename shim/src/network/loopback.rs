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
//!
//! A connection takes a stream of the machine's and two descriptors here. So
//! that the pod's process and its machine have some for their other work
//! however many connect, those beyond [`MAX_CONNECTIONS`] are refused.

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

use nix::sys::{
    resource::{Resource, getrlimit},
    socket::{Backlog, MsgFlags, listen, recv, send, setsockopt, sockopt},
};
use protocol::{ForwardTarget, carry};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, unix::AsyncFd},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, sleep_until, timeout},
};
use vmm::virtio::vsock;

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

/// Connections at one time, those that are only asked for counted: half of the machine's streams.
const MAX_CONNECTIONS: usize = vsock::MAX_CONNECTIONS / 2;

/// The part of this process's descriptors that connections may take: one of this many for each of
/// a connection's two.
const DESCRIPTORS: u64 = 4;

/// What the kernel may keep of each direction of a connection, in bytes.
const KEPT: usize = 128 << 10;

/// How long a client may be silent before its kernel is asked whether it is still there, how often
/// it is asked, and how many times in vain: one that is gone without a word holds no stream.
const SILENCE_S: u32 = 60;
const ASK_EVERY_S: u32 = 10;
const ASK_TIMES: u32 = 6;

/// How long nobody is accepted after an error.
const PAUSE: Duration = Duration::from_millis(100);

/// The log is told of refused connections no more often.
const COMPLAINT: Duration = Duration::from_secs(60);

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
        // A new namespace's is off, as the relay makes one.
        namespace.loopback_up().map_err(step("switch on"))?;
        let kernel = namespace.kernel();
        let links = kernel.links().map_err(step("find"))?;
        let lo = links.iter().find(|link| link.flags.is_loopback());
        let lo = lo.ok_or(Error::NoLoopback)?.index;
        let program = syn::program();
        let frames = namespace
            .run(|| {
                // a file that cannot be written may say what it should already
                for setting in SETTINGS {
                    if fs::read_to_string(setting)?.trim() != "1" {
                        fs::write(setting, "1")?;
                    }
                }
                sys::frames(lo, &program, syn::MARK)
            })
            .map_err(step("watch"))?;
        let frames = watch_readable(frames).map_err(step("watch"))?;
        let filter = Filter::drop(kernel, lo, &program).map_err(step("filter what comes in at"))?;
        let shared = Arc::new(Shared {
            namespace: namespace.clone(),
            frames,
            dial: Box::new(move || Box::pin(dial())),
            room: Arc::new(Semaphore::new(room())),
            listeners: Mutex::default(),
        });
        let task = tokio::spawn(shared.serve()).abort_handle();
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
    /// Where the first packets come in, and go on their way.
    frames: AsyncFd<OwnedFd>,
    dial: Box<Dial>,
    room: Arc<Semaphore>,
    listeners: Mutex<Listeners>,
}

/// For each address that is listened on, the guest's ends of those whose connection is on its way.
type Listeners = HashMap<SocketAddr, Expected>;

/// The guest's ends, by the client's address.
type Expected = HashMap<SocketAddr, GuestEnd>;

/// A stream to the guest's loopback, and its place among all.
struct GuestEnd {
    stream: UnixStream,
    /// When its client will not come any more.
    until: Instant,
    room: OwnedSemaphorePermit,
}

/// What a task was about when it ended.
enum Ended {
    Asked(Syn),
    Other,
}

impl Shared {
    /// Takes first packets for ever. Whatever is made of them ends with this.
    async fn serve(self: Arc<Self>) {
        let mut asked = HashSet::new();
        let mut tasks = JoinSet::new();
        let mut refused = Refused::default();
        let mut buffer = [0; FRAME];
        loop {
            tokio::select! {
                frame = receive(&self.frames, &mut buffer) => {
                    let frame = match frame {
                        Ok(len) => &mut buffer[..len],
                        Err(error) => {
                            tracing::error!(%error, "connections to the pod's loopback are not heard any more");
                            return;
                        }
                    };
                    let Some(syn) = syn::read(frame) else {
                        continue;
                    };
                    if asked.contains(&syn) {
                        continue;
                    }
                    if let Ok(room) = Arc::clone(&self.room).try_acquire_owned() {
                        asked.insert(syn);
                        tasks.spawn(Arc::clone(&self).connect(syn, frame.to_vec(), room));
                    } else {
                        refused.note(syn);
                        self.let_go(syn, frame);
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
    async fn connect(
        self: Arc<Self>,
        syn: Syn,
        frame: Vec<u8>,
        room: OwnedSemaphorePermit,
    ) -> (Ended, Option<TcpListener>) {
        let listener = match timeout(PATIENCE, self.ask(syn.to)).await {
            Ok(Ok(stream)) => {
                let until = Instant::now() + PATIENCE;
                let guest = GuestEnd {
                    stream,
                    until,
                    room,
                };
                self.expect(syn, guest)
            }
            Ok(Err(error)) => {
                tracing::debug!(to = %syn.to, %error, "the guest does not take a connection");
                None
            }
            Err(_) => {
                tracing::debug!(to = %syn.to, "the guest does not answer a connection");
                None
            }
        };
        self.let_go(syn, &frame);
        (Ended::Asked(syn), listener)
    }

    /// Lets a packet that was held back go on its way.
    fn let_go(&self, syn: Syn, frame: &[u8]) {
        if let Err(error) = send(self.frames.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT) {
            tracing::debug!(to = %syn.to, %error, "cannot pass a connection to the loopback on");
        }
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
    fn expect(&self, syn: Syn, guest: GuestEnd) -> Option<TcpListener> {
        let mut listeners = self.listeners();
        if let Some(expected) = listeners.get_mut(&syn.to) {
            expected.insert(syn.from, guest);
            return None;
        }
        let listener = self.listen(syn.to);
        match listener {
            Ok(listener) => {
                listeners.insert(syn.to, HashMap::from([(syn.from, guest)]));
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
        // All that are on their way may come at once, and nobody is asked for twice.
        listen(&listener, Backlog::MAXALLOWABLE)?;
        // Those that are accepted have what the listener has.
        setsockopt(&listener, sockopt::RcvBuf, &KEPT)?;
        setsockopt(&listener, sockopt::SndBuf, &KEPT)?;
        setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
        setsockopt(&listener, sockopt::KeepAlive, &true)?;
        setsockopt(&listener, sockopt::TcpKeepIdle, &SILENCE_S)?;
        setsockopt(&listener, sockopt::TcpKeepInterval, &ASK_EVERY_S)?;
        setsockopt(&listener, sockopt::TcpKeepCount, &ASK_TIMES)?;
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
        let mut listening = Some(listener);
        while let Some((listener, first_leaves)) = self.next(address, &mut listening) {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((client, from)) => match self.take(address, from) {
                        Some(guest) => drop(streams.spawn(join(client, guest, address))),
                        // One for whom there was no room, or who comes too late.
                        None => drop(client.set_zero_linger()),
                    },
                    Err(error) => {
                        tracing::warn!(to = %address, %error, "cannot take a connection to the pod's loopback");
                        // Mostly out of descriptors, of which streams that end give some back.
                        sleep(PAUSE).await;
                    }
                },
                Some(_) = streams.join_next() => {}
                () = sleep_until(first_leaves) => {}
            }
        }
        while streams.join_next().await.is_some() {}
        (Ended::Other, None)
    }

    /// The listener of `address`, and when the first of those that are expected there is not
    /// expected any more. If nobody is, nobody listens there any more either.
    fn next<'a>(
        &self,
        address: SocketAddr,
        listener: &'a mut Option<TcpListener>,
    ) -> Option<(&'a TcpListener, Instant)> {
        let mut listeners = self.listeners();
        let expected = listeners.get_mut(&address)?;
        let Some(first) = first_leaves(expected, Instant::now()) else {
            // Both at once: another may listen there as soon as this is unlocked.
            *listener = None;
            listeners.remove(&address);
            return None;
        };
        Some((listener.as_ref()?, first))
    }

    /// The guest's end for the client that has come.
    fn take(&self, address: SocketAddr, from: SocketAddr) -> Option<GuestEnd> {
        self.listeners().get_mut(&address)?.remove(&from)
    }

    fn listeners(&self) -> MutexGuard<'_, Listeners> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets those that are not expected any more, and says when the next will not be.
fn first_leaves(expected: &mut Expected, now: Instant) -> Option<Instant> {
    expected.retain(|_, guest| guest.until > now);
    expected.values().map(|guest| guest.until).min()
}

/// How many connections this process can have.
fn room() -> usize {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(1, |(soft, _)| room_among(soft))
}

fn room_among(descriptors: u64) -> usize {
    usize::try_from(descriptors / DESCRIPTORS)
        .map_or(MAX_CONNECTIONS, |most| most.clamp(1, MAX_CONNECTIONS))
}

/// Connections for which there was no room, and when the log was told of them last.
#[derive(Debug, Default)]
struct Refused {
    count: u64,
    told: Option<Instant>,
}

impl Refused {
    fn note(&mut self, syn: Syn) {
        self.count += 1;
        if self.told.is_none_or(|told| told.elapsed() >= COMPLAINT) {
            self.told = Some(Instant::now());
            tracing::warn!(
                to = %syn.to,
                count = self.count,
                most = room(),
                "refused connections to the pod's loopback, of which there are too many at a time"
            );
        }
    }
}

/// Carries a connection to its end, of which both sides know.
async fn join(client: TcpStream, guest: GuestEnd, to: SocketAddr) {
    if let Err(error) = carry(client, guest.stream).await {
        tracing::debug!(%to, %error, "a connection to the pod's loopback is broken off");
    }
    drop(guest.room);
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

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    const ADDRESS: &str = "127.0.0.1:80";

    fn guest(room: &Arc<Semaphore>, until: Instant) -> (GuestEnd, UnixStream) {
        let (stream, theirs) = UnixStream::pair().expect("a pair");
        let room = Arc::clone(room).try_acquire_owned().expect("room");
        let guest = GuestEnd {
            stream,
            until,
            room,
        };
        (guest, theirs)
    }

    #[tokio::test]
    async fn what_breaks_off_in_the_guest_is_a_reset_for_the_client_and_makes_room() {
        let room = Arc::new(Semaphore::new(1));
        let (guest, mut theirs) = guest(&room, Instant::now());
        assert_eq!(room.available_permits(), 0);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let mut client = TcpStream::connect(address).await.expect("connected");
        let accepted = listener.accept().await.expect("accepted").0;
        let joined = tokio::spawn(join(accepted, guest, address));
        theirs.write_all(b"\0\x04half").await.expect("written");
        let mut half = [0; 4];
        client.read_exact(&mut half).await.expect("heard");
        drop(theirs);
        let error = client.read_to_end(&mut Vec::new()).await;
        let error = error.expect_err("no end");
        assert_eq!((&half, error.kind()), (b"half", ErrorKind::ConnectionReset));
        joined.await.expect("no panic");
        assert_eq!(room.available_permits(), 1);
    }

    #[tokio::test]
    async fn each_that_does_not_come_is_forgotten_in_its_time_whoever_else_comes() {
        let room = Arc::new(Semaphore::new(2));
        let now = Instant::now();
        let mut expected = Expected::new();
        for (client, seconds) in [("127.0.0.1:1", 10), ("127.0.0.1:2", 15)] {
            let (guest, _) = guest(&room, now + Duration::from_secs(seconds));
            expected.insert(client.parse().expect("an address"), guest);
        }
        let after = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(first_leaves(&mut expected, now), Some(after(10)));
        assert_eq!(first_leaves(&mut expected, after(12)), Some(after(15)));
        assert_eq!(room.available_permits(), 1);
        assert_eq!(first_leaves(&mut expected, after(15)), None);
        assert_eq!(room.available_permits(), 2);
    }

    #[test]
    fn connections_leave_descriptors_and_streams_for_the_pods_other_work() {
        assert_eq!(room_among(1024), 256);
        assert_eq!(room_among(1), 1);
        assert_eq!(room_among(u64::MAX), vsock::MAX_CONNECTIONS / 2);
    }

    #[test]
    fn refused_connections_are_counted_and_told_of_once_in_a_while() {
        let address: SocketAddr = ADDRESS.parse().expect("an address");
        let syn = Syn {
            from: address,
            to: address,
        };
        let mut refused = Refused::default();
        refused.note(syn);
        let told = refused.told;
        refused.note(syn);
        assert_eq!((refused.count, refused.told), (2, told));
        assert!(told.is_some());
    }
}
