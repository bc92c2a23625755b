//! How a connection is carried over a stream between host and guest, so that its other end learns
//! how it ended: by an end of what is said, or by a reset.
//!
//! ```text
//!   stream:  length (2 bytes) bytes | length bytes | ... | 0
//! ```
//!
//! Neither vsock nor a unix socket passes a reset on: whoever reads sees an end either way, and
//! bytes that are missing are not missed. So the end of what one side says is said, too, by a
//! length of 0. A stream that ends without it has been broken off, wherever that was, and the
//! connection is reset.
//!
//! The stream stays open both ways until both ends are said: one that ends before is a peer that
//! does not listen any more.

use std::{
    io,
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::{
    io::{
        AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, Interest,
        ReadHalf, WriteHalf, split,
    },
    net::{
        TcpStream,
        tcp::{ReadHalf as LocalReader, WriteHalf as LocalWriter},
    },
    time::{sleep, timeout},
};

/// The most bytes behind one length, and what is kept of each direction.
const MOST: usize = 16 << 10;

/// The bytes of a length.
const LENGTH: usize = 2;

/// What says the end.
const END: u16 = 0;

/// How long what may take for ever is waited for.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// How long a direction that still works may go on when the other is broken: what is on its
    /// way arrives, and nobody is waited for who will never read it.
    last: Duration,
    /// How often a side that has nothing to say looks whether the other is still there.
    look: Duration,
}

const PATIENCE: Patience = Patience {
    last: Duration::from_secs(10),
    look: Duration::from_secs(30),
};

/// Carries `local` over `stream` to the end of both directions. An end is passed on as an end, and
/// whatever breaks as a reset.
///
/// # Errors
/// What broke the connection off.
pub async fn carry<S>(local: TcpStream, stream: S) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    carry_with(PATIENCE, local, stream).await
}

async fn carry_with<S>(patience: Patience, mut local: TcpStream, stream: S) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let (heard, stream) = split(stream);
    let end = {
        let (reader, writer) = local.split();
        both(patience, reader, writer, heard, stream).await
    };
    if let End::Reset(_) = end {
        // Dropping it then resets it.
        let _ = local.set_zero_linger();
    }
    match end {
        End::Whole => Ok(()),
        End::Unheard(error) | End::Reset(error) => Err(error),
    }
}

/// How a connection ended.
enum End {
    /// Both sides said all.
    Whole,
    /// The other side said all and listens no more. The kernel answers what is said yet with a
    /// reset, after everything that was heard.
    Unheard(io::Error),
    /// What the other side said is not whole.
    Reset(io::Error),
}

/// Where a direction broke.
enum Broken {
    Local(io::Error),
    Stream(io::Error),
}

async fn both<S>(
    Patience { last, look }: Patience,
    reader: LocalReader<'_>,
    writer: LocalWriter<'_>,
    heard: ReadHalf<S>,
    stream: WriteHalf<S>,
) -> End
where
    S: AsyncRead + AsyncWrite,
{
    // An error of a socket is told once. If the writer took it, the reader sees an end that is none.
    let trusted = AtomicBool::new(true);
    let local: &TcpStream = reader.as_ref();
    let mut lost = pin!(lost(local, last));
    let mut hearing = pin!(hear(heard, writer));
    let mut saying = pin!(say(look, &reader, stream, &trusted));
    let gone = || io::Error::from(io::ErrorKind::ConnectionAborted);
    tokio::select! {
        heard = &mut hearing => match heard {
            Ok(heard) => tokio::select! {
                said = &mut saying => match said {
                    Ok(()) => End::Whole,
                    Err(Broken::Local(error) | Broken::Stream(error)) => End::Unheard(error),
                },
                error = silence(heard) => End::Unheard(error),
                () = lost => End::Unheard(gone()),
            },
            Err(Broken::Local(error)) => {
                let whole = error.kind() == io::ErrorKind::BrokenPipe;
                trusted.store(whole, Ordering::Relaxed);
                let _ = timeout(last, saying).await;
                End::Reset(error)
            }
            Err(Broken::Stream(error)) => End::Reset(error),
        },
        said = &mut saying => match said {
            Ok(()) => tokio::select! {
                heard = hearing => match heard {
                    Ok(_) => End::Whole,
                    Err(Broken::Local(error) | Broken::Stream(error)) => End::Reset(error),
                },
                () = lost => End::Reset(gone()),
            },
            Err(Broken::Stream(error)) => match timeout(last, hearing).await {
                Ok(Ok(_)) => End::Unheard(error),
                Ok(Err(_)) | Err(_) => End::Reset(error),
            },
            Err(Broken::Local(error)) => End::Reset(error),
        },
        () = &mut lost => End::Reset(gone()),
    }
}

/// Takes what the other side says to its end, and gives the stream back.
async fn hear<S: AsyncRead>(
    stream: ReadHalf<S>,
    mut local: LocalWriter<'_>,
) -> Result<BufReader<ReadHalf<S>>, Broken> {
    let mut stream = BufReader::with_capacity(LENGTH + MOST, stream);
    loop {
        let mut left = match stream.read_u16().await.map_err(Broken::Stream)? {
            END => break,
            length => usize::from(length),
        };
        while left > 0 {
            let bytes = stream.fill_buf().await.map_err(Broken::Stream)?;
            let count = left.min(bytes.len());
            if count == 0 {
                return Err(Broken::Stream(io::ErrorKind::UnexpectedEof.into()));
            }
            local
                .write_all(&bytes[..count])
                .await
                .map_err(Broken::Local)?;
            stream.consume(count);
            left -= count;
        }
    }
    local.shutdown().await.map_err(Broken::Local)?;
    Ok(stream)
}

/// Says what comes from `local` to its end, if it is `trusted` then.
async fn say<S: AsyncWrite>(
    look: Duration,
    local: &LocalReader<'_>,
    mut stream: WriteHalf<S>,
    trusted: &AtomicBool,
) -> Result<(), Broken> {
    let mut buffer = vec![0; LENGTH + MOST];
    loop {
        let readable = timeout(look, local.readable()).await;
        let Ok(readable) = readable else {
            // No byte: only whether it could be written.
            stream.write(&[]).await.map_err(Broken::Stream)?;
            continue;
        };
        readable.map_err(Broken::Local)?;
        let count = match local.try_read(&mut buffer[LENGTH..]) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(Broken::Local(error)),
        };
        if count == 0 && !trusted.load(Ordering::Relaxed) {
            return Err(Broken::Local(io::ErrorKind::ConnectionReset.into()));
        }
        // At most MOST: a u16.
        buffer[..LENGTH].copy_from_slice(&(count as u16).to_be_bytes());
        let said = stream.write_all(&buffer[..LENGTH + count]).await;
        said.map_err(Broken::Stream)?;
        if count == 0 {
            return stream.flush().await.map_err(Broken::Stream);
        }
    }
}

/// Waits until the other side, which has said all, is gone.
async fn silence(mut stream: impl AsyncRead + Unpin) -> io::Error {
    match stream.read(&mut [0]).await {
        Ok(0) => io::ErrorKind::BrokenPipe.into(),
        Ok(_) => io::ErrorKind::InvalidData.into(),
        Err(error) => error,
    }
}

/// Waits until the connection is broken, and for what may still be read from it.
async fn lost(local: &TcpStream, last: Duration) {
    while let Ok(ready) = local.ready(Interest::ERROR).await {
        if ready.is_error() {
            break;
        }
    }
    sleep(last).await;
}

#[cfg(test)]
mod tests;
