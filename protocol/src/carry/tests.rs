//! The two ends of a connection that is carried over a stream, and what each learns of the other.

use std::{future::Future, io::ErrorKind};

use tokio::{
    net::{TcpListener, UnixStream},
    task::JoinHandle,
};

use super::*;

/// Longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(60);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(DEADLINE, what).await.expect("in time")
}

async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let client = TcpStream::connect(address).await.expect("connected");
    (client, listener.accept().await.expect("accepted").0)
}

/// A connection, one end of which is carried; the other side of the stream is the test's.
async fn carried() -> (TcpStream, UnixStream, JoinHandle<io::Result<()>>) {
    let (ours, theirs) = connection().await;
    let (stream, peer) = UnixStream::pair().expect("a pair");
    (ours, peer, tokio::spawn(carry(theirs, stream)))
}

/// A client and a server whose connection is carried from one to the other.
async fn joined() -> (TcpStream, TcpStream) {
    let (client, near) = connection().await;
    let (server, far) = connection().await;
    let (one, other) = UnixStream::pair().expect("a pair");
    tokio::spawn(carry(near, one));
    tokio::spawn(carry(far, other));
    (client, server)
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at % 251) as u8).collect()
}

/// Reads to the end, or to what is there instead of one.
async fn read(from: &mut (impl AsyncRead + Unpin)) -> (Vec<u8>, io::Result<()>) {
    let mut heard = Vec::new();
    let end = soon(from.read_to_end(&mut heard)).await;
    (heard, end.map(drop))
}

fn is_reset(end: &io::Result<()>) -> bool {
    matches!(end, Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn both_directions_are_whole_and_end_one_after_the_other() {
    let (mut client, mut server) = joined().await;
    let said = bytes(1_000_003);
    let saying = tokio::spawn({
        let said = said.clone();
        async move {
            client.write_all(&said).await.expect("written");
            client.shutdown().await.expect("ended");
            client
        }
    });
    let (heard, end) = read(&mut server).await;
    assert!(end.is_ok() && heard == said);
    server.write_all(b"answer").await.expect("written");
    drop(server);
    let (answer, end) = read(&mut saying.await.expect("said")).await;
    assert!(end.is_ok() && answer == b"answer");
}

#[tokio::test]
async fn a_reset_of_either_side_is_a_reset_for_the_other() {
    for client_breaks in [true, false] {
        let (client, server) = joined().await;
        let (mut breaks, mut hears) = match client_breaks {
            true => (client, server),
            false => (server, client),
        };
        breaks.write_all(b"half").await.expect("written");
        let mut half = [0; 4];
        soon(hears.read_exact(&mut half)).await.expect("heard");
        breaks.set_zero_linger().expect("set");
        drop(breaks);
        let (rest, end) = read(&mut hears).await;
        assert!(rest.is_empty() && is_reset(&end), "{end:?}");
    }
}

#[tokio::test]
async fn a_stream_that_ends_without_its_end_said_resets_the_connection() {
    // in between, within the bytes, within the length, and before anything
    for said in [&[0, 1, b'x'][..], &[0, 3, b'x'], &[0], &[]] {
        let (mut local, mut peer, carrying) = carried().await;
        peer.write_all(said).await.expect("written");
        drop(peer);
        let (_, end) = read(&mut local).await;
        assert!(is_reset(&end), "{said:?}: {end:?}");
        assert!(soon(carrying).await.expect("no panic").is_err());
    }
}

#[tokio::test]
async fn a_reset_says_no_end() {
    let (mut local, mut peer, carrying) = carried().await;
    local.write_all(b"half").await.expect("written");
    let mut half = [0; 6];
    soon(peer.read_exact(&mut half)).await.expect("heard");
    local.set_zero_linger().expect("set");
    drop(local);
    assert_eq!(read(&mut peer).await.0, b"");
    assert!(soon(carrying).await.expect("no panic").is_err());
}

#[tokio::test]
async fn a_reset_that_the_writer_is_told_of_is_no_end_for_the_reader() {
    let (local, mut peer, carrying) = carried().await;
    local.set_zero_linger().expect("set");
    drop(local);
    // Whichever direction finds it first.
    let _ = peer.write_all(&[0, 1, b'x', 0, 1, b'y']).await;
    assert_eq!(read(&mut peer).await.0, b"");
    assert!(soon(carrying).await.expect("no panic").is_err());
}

#[tokio::test]
async fn what_was_said_before_a_server_left_is_heard_by_a_client_that_still_talks() {
    let (mut client, mut server) = joined().await;
    let answer = bytes(300_000);
    let answering = tokio::spawn({
        let answer = answer.clone();
        async move {
            server.read_exact(&mut [0; 4]).await.expect("heard");
            server.write_all(&answer).await.expect("written");
        }
    });
    client.write_all(b"more").await.expect("written");
    let (heard, end) = read(&mut client).await;
    answering.await.expect("answered");
    assert!(end.is_ok() && heard == answer, "{} {end:?}", heard.len());
    // What is said to nobody is refused at last.
    soon(async {
        while client.write_all(&[0; 1000]).await.is_ok() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_said_all_and_is_gone_closes_the_connection() {
    let (mut local, mut peer, carrying) = carried().await;
    peer.write_all(&[0, 3, b'b', b'y', b'e', 0, 0])
        .await
        .expect("written");
    drop(peer);
    let (heard, end) = read(&mut local).await;
    assert!(end.is_ok() && heard == b"bye", "{end:?}");
    assert!(soon(carrying).await.expect("no panic").is_err());
}

#[tokio::test]
async fn bytes_behind_the_end_are_refused() {
    let (_local, mut peer, carrying) = carried().await;
    peer.write_all(&[0, 0, 0, 1, b'x']).await.expect("written");
    let error = soon(carrying).await.expect("no panic").expect_err("broken");
    assert_eq!(error.kind(), ErrorKind::InvalidData);
}

#[tokio::test]
async fn a_peer_that_is_gone_is_found_though_nobody_reads_what_it_said() {
    let (_local, theirs) = connection().await;
    let (stream, peer) = UnixStream::pair().expect("a pair");
    let patience = Patience {
        last: Duration::from_millis(50),
        look: Duration::from_millis(50),
    };
    let carrying = tokio::spawn(carry_with(patience, theirs, stream));
    // Lengths and bytes alike, and more than the connection takes, of which nothing is read.
    let message = vec![0xff; 64 << 10];
    while timeout(Duration::from_millis(500), peer.writable())
        .await
        .is_ok()
    {
        let _ = peer.try_write(&message);
    }
    drop(peer);
    assert!(soon(carrying).await.expect("no panic").is_err());
}
