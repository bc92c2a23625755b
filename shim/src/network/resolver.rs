//! Name servers on the loopback of the pod's namespace, as docker has one on 127.0.0.11 for
//! networks of one's own: the guest has their address, too, and what is asked there is asked here.
//!
//! ```text
//!   program ──► 127.0.0.11:53 of the guest ──► agent ──stream──► here ──► 127.0.0.11:53
//! ```
//!
//! Questions are the guest's: they go to this one address and to no other, and a bounded number
//! at a time.

use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use protocol::{ForwardTarget, Lookup, Transport};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UdpSocket, UnixStream},
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::timeout,
};

use super::{Namespace, syn};
use crate::text::chain;

/// The port of name servers.
const PORT: u16 = 53;

/// Name servers of a file that anybody asks (resolv.conf(5), `MAXNS`).
const MOST: usize = 3;

/// How long a name server may take. Who asked has asked again by then.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest message.
const MESSAGE: usize = u16::MAX as usize;

/// A message's header (RFC 1035, section 4.1.1).
const HEADER: usize = 12;

/// The name servers of a `resolv.conf` that are on a loopback.
pub fn on_loopback(resolv_conf: &str) -> Vec<IpAddr> {
    let servers = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == "nameserver").then_some(words.next()?)
    });
    let addresses = servers.filter_map(|server| server.parse::<IpAddr>().ok());
    addresses.filter(IpAddr::is_loopback).take(MOST).collect()
}

/// A name server that the guest has, as long as this lives.
#[derive(Debug)]
pub struct Resolver(AbortHandle);

impl Resolver {
    /// Serves questions to `address`, which come on the stream that `dial` opens to
    /// [`protocol::LOOKUP_PORT`] of the guest. Runs in the calling runtime.
    pub fn start<F>(namespace: &Namespace, address: IpAddr, dial: F) -> Self
    where
        F: Future<Output = io::Result<UnixStream>> + Send + 'static,
    {
        let server = Server {
            namespace: namespace.clone(),
            address: SocketAddr::new(address, PORT),
        };
        let serving = async move {
            if let Err(error) = server.serve(dial).await {
                let error = chain(&error);
                tracing::warn!(%address, error, "the guest cannot ask the pod's name server");
            }
        };
        Self(tokio::spawn(serving).abort_handle())
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug, Clone)]
struct Server {
    namespace: Namespace,
    address: SocketAddr,
}

impl Server {
    async fn serve(self, dial: impl Future<Output = io::Result<UnixStream>>) -> io::Result<()> {
        let mut guest = dial.await?;
        guest
            .write_all(&ForwardTarget(self.address).to_bytes())
            .await?;
        match timeout(PATIENCE, guest.read_u8()).await?? {
            ForwardTarget::CONNECTED => {}
            errno => return Err(io::Error::from_raw_os_error(errno.into())),
        }
        let (mut questions, mut answers) = guest.into_split();
        let (tell, mut told) = mpsc::channel::<Vec<u8>>(Lookup::MOST);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Some(answer) = told.recv().await {
                if answers.write_all(&answer).await.is_err() {
                    return;
                }
            }
        });
        loop {
            let mut bytes = [0; Lookup::LEN];
            // The end of the machine is no failure.
            if questions.read_exact(&mut bytes).await.is_err() {
                return Ok(());
            }
            let header = Lookup::from_bytes(bytes).ok_or(io::ErrorKind::InvalidData)?;
            let mut question = vec![0; header.length.into()];
            if questions.read_exact(&mut question).await.is_err() {
                return Ok(());
            }
            while tasks.try_join_next().is_some() {}
            if tasks.len() > Lookup::MOST {
                // An agent does not ask so much.
                continue;
            }
            let (server, tell) = (self.clone(), tell.clone());
            tasks.spawn(async move {
                let answer = server.answer(header.transport, &question).await;
                let header = Lookup {
                    length: answer.len() as u16,
                    ..header
                };
                let _ = tell.send([&header.to_bytes()[..], &answer].concat()).await;
            });
        }
    }

    /// The name server's answer, or that there is none.
    async fn answer(&self, transport: Transport, question: &[u8]) -> Vec<u8> {
        let asked = async {
            match transport {
                Transport::Udp => self.ask_by_datagram(question).await,
                Transport::Tcp => self.ask_by_connection(question).await,
            }
        };
        match timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => failure(question),
        }
    }

    async fn ask_by_datagram(&self, question: &[u8]) -> io::Result<Vec<u8>> {
        let any: SocketAddr = match self.address {
            SocketAddr::V4(_) => ([127, 0, 0, 1], 0).into(),
            SocketAddr::V6(_) => ([0, 0, 0, 0, 0, 0, 0, 1], 0).into(),
        };
        let socket = self.namespace.run(|| std::net::UdpSocket::bind(any))?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        socket.connect(self.address).await?;
        socket.send(question).await?;
        let mut answer = vec![0; MESSAGE];
        let length = socket.recv(&mut answer).await?;
        answer.truncate(length);
        Ok(answer)
    }

    async fn ask_by_connection(&self, question: &[u8]) -> io::Result<Vec<u8>> {
        let socket = self.namespace.run(|| match self.address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        })?;
        // Past what leads connections to this loopback to the guest.
        setsockopt(&socket, sockopt::Mark, &syn::MARK)?;
        let mut stream: TcpStream = socket.connect(self.address).await?;
        stream.write_u16(question.len() as u16).await?;
        stream.write_all(question).await?;
        let length = stream.read_u16().await?;
        let mut answer = vec![0; length.into()];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }
}

/// The answer that there is none, SERVFAIL, so that who asked need not wait: the question's own
/// words, told to be an answer (RFC 1035, section 4.1.1). Nothing to what is no question.
fn failure(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    if let Some(header) = answer.first_chunk_mut::<HEADER>() {
        header[2] |= 0x80;
        header[3] = (header[3] & 0xf0) | 2;
        return answer;
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_on_a_loopback_are_found() {
        let text = "# made by docker\nsearch example.org\nnameserver 127.0.0.11\nnameserver 10.0.0.1\n\
                    nameserver\nnameserver ::1 # why not\noptions ndots:0\n#nameserver 127.0.0.2\n";
        let expected: Vec<IpAddr> = ["127.0.0.11", "::1"]
            .map(|text| text.parse().expect("an address"))
            .into();
        assert_eq!(on_loopback(text), expected);
    }

    #[test]
    fn a_failure_answers_the_question() {
        let question = b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01";
        let answer = failure(question);
        assert_eq!(answer[..4], [0x12, 0x34, 0x81, 0x02]);
        assert_eq!(answer[4..], question[4..]);
        assert!(failure(b"short").is_empty());
    }

    fn own_namespace() -> Namespace {
        let own = std::fs::File::open("/proc/self/ns/net").expect("there");
        Namespace::open(own.into()).expect("ours")
    }

    #[tokio::test]
    async fn a_question_is_asked_and_answered_both_ways() {
        // Another process may have the port of the other transport.
        let (udp, tcp, address) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
            let address = udp.local_addr().expect("an address");
            if let Ok(tcp) = tokio::net::TcpListener::bind(address).await {
                break (udp, tcp, address);
            }
        };
        tokio::spawn(async move {
            let mut buffer = [0; 64];
            let (length, from) = udp.recv_from(&mut buffer).await.expect("asked");
            udp.send_to(&[b"udp ", &buffer[..length]].concat(), from)
                .await
                .expect("sent");
            let (mut client, _) = tcp.accept().await.expect("connected");
            let length = client.read_u16().await.expect("asked");
            let mut text = vec![0; length.into()];
            client.read_exact(&mut text).await.expect("asked");
            client.write_u16(length + 4).await.expect("sent");
            client
                .write_all(&[b"tcp ", &text[..]].concat())
                .await
                .expect("sent");
        });
        let server = Server {
            namespace: own_namespace(),
            address,
        };
        assert_eq!(server.answer(Transport::Udp, b"who?").await, b"udp who?");
        // Marking a socket takes a capability.
        if nix::unistd::geteuid().is_root() {
            assert_eq!(server.answer(Transport::Tcp, b"who?").await, b"tcp who?");
        }
    }

    #[tokio::test]
    async fn where_nobody_answers_that_is_told_at_once() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("bound");
        let address = socket.local_addr().expect("an address");
        drop(socket);
        let server = Server {
            namespace: own_namespace(),
            address,
        };
        let question = [0; HEADER];
        let answer = timeout(
            Duration::from_secs(5),
            server.answer(Transport::Udp, &question),
        );
        assert_eq!(answer.await.expect("at once")[3], 2);
    }
}
