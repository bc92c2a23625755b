//! The way to the agent: vsock streams, the first of which carries ttrpc.

use std::{io, os::fd::AsRawFd, path::Path};

use nix::sys::socket::{MsgFlags, recv};
use protocol::{
    AGENT_PORT, FORWARD_PORT, LOOKUP_PORT, STREAM_PORT, StreamId, agent_ttrpc::AgentClient,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::UnixStream,
};
use ttrpc::asynchronous::{Client, transport::Socket};

use super::frames::Answers;

/// The longest answer to `CONNECT`: `OK 4294967295\n`.
const ANSWER_MAX: usize = 14;

/// Connects to the agent's rpc port.
pub(super) async fn client(vsock: &Path) -> io::Result<AgentClient> {
    let stream = connect(vsock, AGENT_PORT, &[]).await?;
    Ok(AgentClient::new(Client::new(Socket::new(Answers::on(
        stream,
    )))))
}

/// Opens a standard stream by the name that the agent will know it by.
pub(super) async fn stream(vsock: &Path, id: StreamId) -> io::Result<UnixStream> {
    connect(vsock, STREAM_PORT, &id.to_bytes()).await
}

/// Opens a stream that leads to the guest's loopback.
pub(super) async fn forward(vsock: &Path) -> io::Result<UnixStream> {
    connect(vsock, FORWARD_PORT, &[]).await
}

/// Opens a stream for questions to a name server.
pub(super) async fn lookup(vsock: &Path) -> io::Result<UnixStream> {
    connect(vsock, LOOKUP_PORT, &[]).await
}

/// Connects to a port of the guest through the VMM's socket; `first` are the stream's first bytes.
async fn connect(vsock: &Path, port: u32, first: &[u8]) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(vsock).await?;
    let greeting = [format!("CONNECT {port}\n").as_bytes(), first].concat();
    stream.write_all(&greeting).await?;
    read_answer(&mut stream, port).await?;
    Ok(stream)
}

/// Reads `OK <port>\n` and not a byte more: what follows is the guest's.
async fn read_answer(stream: &mut UnixStream, port: u32) -> io::Result<()> {
    let refused = || {
        let text = format!("the guest refused the connection to its port {port}");
        io::Error::new(io::ErrorKind::ConnectionRefused, text)
    };
    let mut answer = [0; ANSWER_MAX];
    let mut length = 0;
    while !answer[..length].ends_with(b"\n") {
        let mut seen = [0; ANSWER_MAX];
        let wanted = ANSWER_MAX - length;
        let count = stream
            .async_io(Interest::READABLE, || {
                let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
                Ok(recv(stream.as_raw_fd(), &mut seen[..wanted], flags)?)
            })
            .await?;
        let line = seen[..count].iter().position(|byte| *byte == b'\n');
        let take = line.map_or(count, |at| at + 1);
        if take == 0 {
            return Err(refused());
        }
        stream
            .read_exact(&mut answer[length..length + take])
            .await?;
        length += take;
    }
    if answer.starts_with(b"OK ") {
        Ok(())
    } else {
        Err(refused())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answered(bytes: &[u8]) -> (io::Result<()>, Vec<u8>) {
        let (mut ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(bytes).await.expect("written");
        drop(theirs);
        let answer = read_answer(&mut ours, 1024).await;
        let mut rest = Vec::new();
        ours.read_to_end(&mut rest).await.expect("read");
        (answer, rest)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_follows_the_answer_is_left_for_the_stream() {
        let (answer, rest) = answered(b"OK 1073741824\nbytes\nof the guest").await;
        assert!(answer.is_ok(), "{answer:?}");
        assert_eq!(rest, b"bytes\nof the guest");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_closed_connection_is_a_refusal_with_the_port() {
        let (answer, _) = answered(b"").await;
        let error = answer.expect_err("refused");
        assert!(error.to_string().contains("port 1024"), "{error}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn other_answers_are_refusals() {
        for bytes in [&b"NO\n"[..], b"OK 123456789012345", b"\n"] {
            assert!(answered(bytes).await.0.is_err(), "{bytes:?}");
        }
    }
}
