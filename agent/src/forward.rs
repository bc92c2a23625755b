//! Connections of the host to the guest's loopback: what somebody in the pod's
//! network namespace at the host says to 127.0.0.1 or `[::1]` is said here.

use std::{io, net::SocketAddr, time::Duration};

use nix::errno::Errno;
use protocol::{ForwardTarget, carry};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::port::Port;

/// How long the host may take to say where, and the loopback to connect.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the kernel may keep of each direction of a connection, in bytes. It would keep megabytes
/// for who does not read, of the little that a small guest has for all its connections; once that
/// is used up, it breaks off those that end with something unsent.
const KEPT: u32 = 128 << 10;

/// Serves connections of `port` for ever.
pub async fn serve(port: Port) {
    // How one ended is known at both of its ends.
    port.serve("the loopback", |connection| async {
        answer(connection).await.ok();
    })
    .await;
}

/// Serves one connection to its end.
///
/// # Errors
/// When either side breaks it off.
pub async fn answer(mut host: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut bytes = [0; ForwardTarget::LEN];
    timeout(PATIENCE, host.read_exact(&mut bytes)).await??;
    match connect(bytes).await {
        Ok(local) => {
            host.write_all(&[ForwardTarget::CONNECTED]).await?;
            carry(local, host).await
        }
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::ECONNREFUSED);
            let status = u8::try_from(errno).unwrap_or(Errno::ECONNREFUSED as u8);
            host.write_all(&[status]).await
        }
    }
}

/// Connects to where the host says, if that is a loopback address.
async fn connect(bytes: [u8; ForwardTarget::LEN]) -> io::Result<TcpStream> {
    let target = ForwardTarget::from_bytes(bytes).filter(|target| target.0.ip().is_loopback());
    let ForwardTarget(address) = target.ok_or(Errno::EADDRNOTAVAIL)?;
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_recv_buffer_size(KEPT)?;
    socket.set_send_buffer_size(KEPT)?;
    let stream = timeout(PATIENCE, socket.connect(address)).await??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    async fn ask(target: &str) -> (u8, UnixStream) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(answer(theirs));
        let target = ForwardTarget(target.parse().unwrap());
        ours.write_all(&target.to_bytes()).await.unwrap();
        (ours.read_u8().await.unwrap(), ours)
    }

    async fn joined() -> (UnixStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (status, stream) = ask(&address.to_string()).await;
        assert_eq!(status, ForwardTarget::CONNECTED);
        (stream, listener.accept().await.unwrap().0)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_stream_leads_to_the_loopback_and_ends_as_it_does() {
        let (mut stream, mut local) = joined().await;
        stream.write_all(b"\0\x05hello\0\0").await.unwrap();
        let mut heard = String::new();
        local.read_to_string(&mut heard).await.unwrap();
        local.write_all(b"bye").await.unwrap();
        drop(local);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(
            (heard.as_str(), answer.as_str()),
            ("hello", "\0\x03bye\0\0")
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_breaks_off_at_one_side_is_no_end_at_the_other() {
        let (mut stream, local) = joined().await;
        local.set_zero_linger().unwrap();
        drop(local);
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"", "nor its end said");

        let (mut stream, mut local) = joined().await;
        stream.write_all(b"\0\x05hel").await.unwrap();
        drop(stream);
        let error = local.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn little_is_kept_for_a_server_that_does_not_read() {
        let (mut stream, _local) = joined().await;
        let message = vec![0xff; 64 << 10];
        let mut written = 0;
        while let Ok(count) = timeout(Duration::from_secs(1), stream.write(&message)).await {
            written += count.unwrap();
            assert!(written < 3 << 19, "{written} bytes are on their way");
        }
        assert!(written > 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn why_there_is_no_connection_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert_eq!(ask(&address.to_string()).await.0, Errno::ECONNREFUSED as u8);
        assert_eq!(ask("192.0.2.1:80").await.0, Errno::EADDRNOTAVAIL as u8);
    }
}
