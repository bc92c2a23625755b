//! A name server on the loopback of the pod's namespace at the host, as docker has one on
//! 127.0.0.11, has the same address here: what is asked here is asked there.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use protocol::{ForwardTarget, Lookup, Transport};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::port::Port;

/// How long the host may take to say which, and a client to ask on its connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a question is remembered. Who asks does not wait longer.
const ANSWER: Duration = Duration::from_secs(20);

/// The longest message.
const MESSAGE: usize = u16::MAX as usize;

/// Connections of clients at a time.
const CLIENTS: usize = 32;

/// Serves connections of `port` for ever, each for one name server.
pub async fn serve(port: Port) {
    // How one ended is known at the other end.
    port.serve("a name server", |connection| async {
        answer(connection).await.ok();
    })
    .await;
}

/// Serves the name server that the host says, until it breaks it off.
///
/// # Errors
/// When the host breaks it off or says nonsense.
pub async fn answer(
    mut host: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> io::Result<()> {
    let mut bytes = [0; ForwardTarget::LEN];
    timeout(PATIENCE, host.read_exact(&mut bytes)).await??;
    match listen(bytes).await {
        Ok(server) => {
            host.write_all(&[ForwardTarget::CONNECTED]).await?;
            server.run(host).await
        }
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::EADDRNOTAVAIL);
            let status = u8::try_from(errno).unwrap_or(Errno::EADDRNOTAVAIL as u8);
            host.write_all(&[status]).await
        }
    }
}

/// Listens where the host says, if that is a loopback address.
async fn listen(bytes: [u8; ForwardTarget::LEN]) -> io::Result<Server> {
    let target = ForwardTarget::from_bytes(bytes).filter(|target| target.0.ip().is_loopback());
    let ForwardTarget(address) = target.ok_or(Errno::EADDRNOTAVAIL)?;
    let datagrams = UdpSocket::bind(address).await?;
    Ok(Server {
        connections: TcpListener::bind(datagrams.local_addr()?).await?,
        datagrams,
        asked: HashMap::new(),
        next: 0,
    })
}

struct Server {
    datagrams: UdpSocket,
    connections: TcpListener,
    /// Questions without an answer.
    asked: HashMap<u16, Asked>,
    next: u16,
}

struct Asked {
    at: Instant,
    by: Asker,
}

enum Asker {
    Datagram(SocketAddr),
    Connection(oneshot::Sender<Vec<u8>>),
}

/// A question of a connection.
struct Question {
    message: Vec<u8>,
    by: oneshot::Sender<Vec<u8>>,
}

impl Server {
    async fn run(
        mut self,
        host: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> io::Result<()> {
        let (from_host, mut host) = tokio::io::split(host);
        let (heard, mut answers) = mpsc::channel(1);
        let reading = tokio::spawn(hear(from_host, heard));
        let (ask, mut questions) = mpsc::channel(1);
        let mut buffer = vec![0; MESSAGE];
        let ended = loop {
            let (question, by) = tokio::select! {
                answer = answers.recv() => match answer {
                    Some((id, message)) => {
                        self.tell(id, message).await;
                        continue;
                    }
                    None => break Ok(()),
                },
                received = self.datagrams.recv_from(&mut buffer) => match received {
                    Ok((length, from)) => ((Transport::Udp, buffer[..length].to_vec()), Asker::Datagram(from)),
                    // Of an answer that nobody took.
                    Err(_) => continue,
                },
                accepted = self.connections.accept() => {
                    if let Ok((client, _)) = accepted
                        && ask.strong_count() <= CLIENTS
                    {
                        tokio::spawn(converse(client, ask.clone()));
                    }
                    continue;
                }
                Some(Question { message, by }) = questions.recv() => {
                    ((Transport::Tcp, message), Asker::Connection(by))
                }
            };
            let (transport, message) = question;
            let Some(id) = self.remember(by) else {
                continue;
            };
            let header = Lookup {
                id,
                transport,
                length: message.len() as u16,
            };
            let bytes = [&header.to_bytes()[..], &message].concat();
            if let Err(error) = host.write_all(&bytes).await {
                break Err(error);
            }
        };
        reading.abort();
        ended
    }

    /// A number for a question; none while too many wait for answers.
    fn remember(&mut self, by: Asker) -> Option<u16> {
        if self.asked.len() >= Lookup::MOST {
            self.asked.retain(|_, asked| asked.at.elapsed() < ANSWER);
        }
        if self.asked.len() >= Lookup::MOST {
            return None;
        }
        while self.asked.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let (id, at) = (self.next, Instant::now());
        self.asked.insert(id, Asked { at, by });
        self.next = self.next.wrapping_add(1);
        Some(id)
    }

    /// Passes an answer on, if somebody still waits for it.
    async fn tell(&mut self, id: u16, message: Vec<u8>) {
        match self.asked.remove(&id).map(|asked| asked.by) {
            Some(Asker::Datagram(to)) => {
                // Who has gone needs none.
                let _ = self.datagrams.send_to(&message, to).await;
            }
            Some(Asker::Connection(by)) => {
                let _ = by.send(message);
            }
            None => {}
        }
    }
}

/// Reads answers until the stream ends.
async fn hear(
    mut host: ReadHalf<impl AsyncRead + AsyncWrite + Unpin>,
    heard: mpsc::Sender<(u16, Vec<u8>)>,
) -> io::Result<()> {
    loop {
        let mut bytes = [0; Lookup::LEN];
        host.read_exact(&mut bytes).await?;
        let header = Lookup::from_bytes(bytes).ok_or(io::ErrorKind::InvalidData)?;
        let mut message = vec![0; header.length.into()];
        host.read_exact(&mut message).await?;
        if heard.send((header.id, message)).await.is_err() {
            return Ok(());
        }
    }
}

/// Takes the questions of a client's connection, one after the other (RFC 1035, section 4.2.2).
async fn converse(mut client: TcpStream, ask: mpsc::Sender<Question>) -> io::Result<()> {
    loop {
        let length = timeout(PATIENCE, client.read_u16()).await??;
        let mut message = vec![0; length.into()];
        timeout(PATIENCE, client.read_exact(&mut message)).await??;
        let (by, answer) = oneshot::channel();
        if ask.send(Question { message, by }).await.is_err() {
            return Ok(());
        }
        let Ok(Ok(answer)) = timeout(ANSWER, answer).await else {
            return Ok(());
        };
        client.write_u16(answer.len() as u16).await?;
        client.write_all(&answer).await?;
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    /// A port of the loopback that nobody has, of neither transport.
    async fn free() -> SocketAddr {
        loop {
            let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
            let address = socket.local_addr().expect("an address");
            if TcpListener::bind(address).await.is_ok() {
                return address;
            }
        }
    }

    async fn started(at: SocketAddr) -> UnixStream {
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        tokio::spawn(answer(theirs));
        ours.write_all(&ForwardTarget(at).to_bytes())
            .await
            .expect("written");
        assert_eq!(
            ours.read_u8().await.expect("an answer"),
            ForwardTarget::CONNECTED
        );
        ours
    }

    async fn question(host: &mut UnixStream) -> (Lookup, Vec<u8>) {
        let mut bytes = [0; Lookup::LEN];
        host.read_exact(&mut bytes).await.expect("a header");
        let header = Lookup::from_bytes(bytes).expect("a header");
        let mut message = vec![0; header.length.into()];
        host.read_exact(&mut message).await.expect("a message");
        (header, message)
    }

    async fn tell(host: &mut UnixStream, question: Lookup, message: &[u8]) {
        let length = message.len() as u16;
        let header = Lookup { length, ..question };
        host.write_all(&header.to_bytes()).await.expect("written");
        host.write_all(message).await.expect("written");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn answers_come_to_those_who_asked_in_whatever_order() {
        let at = free().await;
        let mut host = started(at).await;
        let clients = [
            UdpSocket::bind("127.0.0.1:0").await.expect("bound"),
            UdpSocket::bind("127.0.0.1:0").await.expect("bound"),
        ];
        let mut asked = Vec::new();
        for (client, text) in clients.iter().zip(["one", "two"]) {
            client.send_to(text.as_bytes(), at).await.expect("sent");
            asked.push(question(&mut host).await);
        }
        for (header, message) in asked.iter().rev() {
            assert_eq!(header.transport, Transport::Udp);
            tell(&mut host, *header, &[b"re: ", &message[..]].concat()).await;
        }
        for (client, text) in clients.iter().zip(["re: one", "re: two"]) {
            let mut buffer = [0; 16];
            let length = client.recv(&mut buffer).await.expect("answered");
            assert_eq!(&buffer[..length], text.as_bytes());
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_connection_asks_again_and_again() {
        let at = free().await;
        let mut host = started(at).await;
        let mut client = TcpStream::connect(at).await.expect("connected");
        for text in ["first", "second"] {
            client.write_u16(text.len() as u16).await.expect("written");
            client.write_all(text.as_bytes()).await.expect("written");
            let (header, message) = question(&mut host).await;
            assert_eq!(
                (header.transport, &message[..]),
                (Transport::Tcp, text.as_bytes())
            );
            tell(&mut host, header, b"yes").await;
            assert_eq!(client.read_u16().await.expect("answered"), 3);
            let mut answer = [0; 3];
            client.read_exact(&mut answer).await.expect("answered");
            assert_eq!(&answer, b"yes");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn more_questions_than_may_wait_are_dropped() {
        let at = free().await;
        let mut host = started(at).await;
        let client = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        for _ in 0..Lookup::MOST {
            client.send_to(b"?", at).await.expect("sent");
            question(&mut host).await;
        }
        client.send_to(b"one too many", at).await.expect("sent");
        let nothing = timeout(Duration::from_millis(50), question(&mut host)).await;
        assert!(nothing.is_err(), "{nothing:?}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn only_the_loopback_is_listened_on() {
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        tokio::spawn(answer(theirs));
        let target = ForwardTarget("0.0.0.0:53".parse().expect("an address"));
        ours.write_all(&target.to_bytes()).await.expect("written");
        let status = ours.read_u8().await.expect("an answer");
        assert_eq!(status, Errno::EADDRNOTAVAIL as u8);
    }
}
