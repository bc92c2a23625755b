//! Listening sockets: vsock in the guest, unix sockets in tests.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr,
    VsockAddr, bind, getpeername, listen, shutdown, socket,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd},
    time::sleep,
};

use crate::{log, sys};

/// How long nobody is accepted after an error.
const PAUSE: Duration = Duration::from_millis(100);

/// Opens the vsock port `number` of this guest.
///
/// # Errors
/// When the guest has no vsock device or the port is taken.
pub fn vsock(number: u32) -> io::Result<OwnedFd> {
    open(
        AddressFamily::Vsock,
        &VsockAddr::new(libc::VMADDR_CID_ANY, number),
    )
}

/// Opens a unix socket at `path`.
///
/// # Errors
/// When the socket cannot be made there.
pub fn unix(path: &Path) -> io::Result<OwnedFd> {
    open(AddressFamily::Unix, &UnixAddr::new(path)?)
}

fn open(family: AddressFamily, address: &dyn SockaddrLike) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    bind(fd.as_raw_fd(), address)?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(fd)
}

/// A listening socket in the runtime. A stream of [`Connection`]s, all from the host: a process
/// of the guest that connects to it is turned away.
#[derive(Debug)]
pub struct Port(AsyncFd<OwnedFd>);

impl Port {
    /// Takes a socket that [`vsock`] or [`unix`] opened.
    ///
    /// # Errors
    /// When the runtime cannot watch it.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        sys::watch(fd, Interest::READABLE).map(Self)
    }

    /// The next connection.
    ///
    /// # Errors
    /// When the system has no descriptor left for it.
    pub async fn accept(&self) -> io::Result<Connection> {
        std::future::poll_fn(|context| self.poll_accept(context)).await
    }

    /// Answers connections for ever, each in a task of its own; `what` they are for is for the log.
    pub async fn serve<F>(self, what: &str, answer: impl Fn(Connection) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        loop {
            match self.accept().await {
                Ok(connection) => drop(tokio::spawn(answer(connection))),
                Err(error) => {
                    log!("cannot accept a connection for {what}: {error}");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Connection>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let accepted = guard.try_io(|listener| accept_from_host(listener.get_ref().as_fd()));
            match accepted {
                Ok(Ok(Some(fd))) => return Poll::Ready(Connection::new(fd)),
                Ok(Ok(None)) | Err(_) => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl futures_core::Stream for Port {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_accept(context).map(Some)
    }
}

/// Accepts a connection; nothing if it is not the host's.
fn accept_from_host(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let fd = sys::accept(listener)?;
    let peer: SockaddrStorage = getpeername(fd.as_raw_fd())?;
    let from_guest = peer
        .as_vsock_addr()
        .is_some_and(|address| address.cid() != protocol::HOST_CID);
    Ok((!from_guest).then_some(fd))
}

/// A connection from the host.
#[derive(Debug)]
pub struct Connection(AsyncFd<OwnedFd>);

impl Connection {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        sys::watch(fd, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// The socket.
    pub fn socket(&self) -> &AsyncFd<OwnedFd> {
        &self.0
    }

    /// Tells the host that nothing more will be written.
    pub fn finish(&self) {
        // A connection that is gone needs no telling.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Write);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let free = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), free)?)) {
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            let written = guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), bytes)?));
            if let Ok(written) = written {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}
