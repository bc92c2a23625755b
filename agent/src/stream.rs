//! Standard streams on their way in: each is parked under its id until a
//! request names it.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use protocol::StreamId;
use tokio::{
    io::AsyncReadExt,
    sync::Notify,
    time::{sleep, timeout},
};

use crate::{
    log,
    port::{Connection, Port},
};

/// Why a stream is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host named a stream that it did not open.
    #[error(
        "the host opened no stream {0:#x} within {wait} s; connect to port {port} and write the id first",
        wait = TAKE.as_secs(),
        port = protocol::STREAM_PORT
    )]
    Absent(u64),
}

/// Streams waiting at one time.
const MAX_PARKED: usize = 256;

/// How long a new connection may take to say its id.
const HEADER: Duration = Duration::from_secs(10);

/// How long a stream waits for the request that names it.
const PARKED: Duration = Duration::from_secs(60);

/// How long a request waits for a stream it names.
const TAKE: Duration = Duration::from_secs(10);

/// The streams that no process has taken yet.
#[derive(Debug, Default)]
pub struct Streams {
    parked: Mutex<HashMap<StreamId, Connection>>,
    changed: Notify,
}

impl Streams {
    /// Takes connections of `port` for ever.
    pub async fn serve(self: Arc<Self>, port: Port) {
        loop {
            match port.accept().await {
                Ok(connection) => {
                    tokio::spawn(self.clone().receive(connection));
                }
                Err(error) => {
                    log!("cannot accept a stream: {error}");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// The stream `id`, waiting for it a while.
    ///
    /// # Errors
    /// When it does not come.
    pub async fn take(&self, id: StreamId) -> Result<Connection, Error> {
        let arrival = async {
            loop {
                let changed = self.changed.notified();
                if let Some(connection) = self.lock().remove(&id) {
                    return connection;
                }
                changed.await;
            }
        };
        timeout(TAKE, arrival)
            .await
            .map_err(|_| Error::Absent(id.0))
    }

    async fn receive(self: Arc<Self>, mut connection: Connection) {
        let id = match timeout(HEADER, read_id(&mut connection)).await {
            Ok(Ok(Some(id))) => id,
            _ => return,
        };
        if !self.park(id, connection) {
            log!("a stream was refused: {MAX_PARKED} are waiting, or one of its id");
            return;
        }
        sleep(PARKED).await;
        self.lock().remove(&id);
    }

    /// Keeps `connection` for who asks for `id`, unless there are too many or one already.
    fn park(&self, id: StreamId, connection: Connection) -> bool {
        let mut parked = self.lock();
        if parked.len() >= MAX_PARKED || parked.contains_key(&id) {
            return false;
        }
        parked.insert(id, connection);
        drop(parked);
        self.changed.notify_waiters();
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<StreamId, Connection>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn read_id(connection: &mut Connection) -> io::Result<Option<StreamId>> {
    let mut bytes = [0; StreamId::LEN];
    connection.read_exact(&mut bytes).await?;
    Ok(StreamId::from_bytes(bytes))
}
