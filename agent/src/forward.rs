//! Connections of the host to the guest's loopback: what somebody in the pod's
//! network namespace at the host says to 127.0.0.1 or `[::1]` is said here.

use std::{io, time::Duration};

use nix::errno::Errno;
use protocol::ForwardTarget;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::{log, port::Port};

/// How long the host may take to say where, and the loopback to connect.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves connections of `port` for ever.
pub async fn serve(port: Port) {
    loop {
        match port.accept().await {
            Ok(connection) => {
                // How it ended is known at both of its ends.
                tokio::spawn(async { answer(connection).await.ok() });
            }
            Err(error) => {
                log!("cannot accept a connection to the loopback: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves one connection to its end.
///
/// # Errors
/// When either side breaks it off.
pub async fn answer(mut host: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut bytes = [0; ForwardTarget::LEN];
    timeout(PATIENCE, host.read_exact(&mut bytes)).await??;
    match connect(bytes).await {
        Ok(mut local) => {
            host.write_all(&[ForwardTarget::CONNECTED]).await?;
            copy_bidirectional(&mut host, &mut local).await?;
            Ok(())
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
    let stream = timeout(PATIENCE, TcpStream::connect(address)).await??;
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

    #[tokio::test(flavor = "current_thread")]
    async fn a_stream_leads_to_the_loopback_and_ends_as_it_does() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (status, mut stream) = ask(&address.to_string()).await;
        assert_eq!(status, ForwardTarget::CONNECTED);
        let (mut local, _) = listener.accept().await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = String::new();
        local.read_to_string(&mut heard).await.unwrap();
        local.write_all(b"bye").await.unwrap();
        drop(local);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!((heard.as_str(), answer.as_str()), ("hello", "bye"));
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
