//! The daemon of a pod: it serves the Task service until containerd shuts it down.

use std::{
    io::{self, PipeReader},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, unix::pipe},
    signal::unix::{SignalKind, signal},
};
use tracing::level_filters::LevelFilter;
use ttrpc::r#async::{Server, transport::Listener};

use super::{events::Publisher, service, socket::Socket, start::Daemon, tasks::Tasks};
use crate::log;

/// How long containerd may take for the last events, and for the last answer's way.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why the daemon could not serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No runtime.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// No signals.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// No socket.
    #[error("cannot serve on the socket")]
    Socket(#[source] io::Error),
    /// No service.
    #[error("cannot serve")]
    Serve(#[source] ttrpc::Error),
}

impl Daemon {
    /// Serves until the end is asked for, by containerd or by a signal.
    ///
    /// # Errors
    /// When it cannot begin.
    pub fn serve(mut self) -> Result<(), Error> {
        let level = match self.bootstrap.debug {
            true => LevelFilter::DEBUG,
            false => LevelFilter::INFO,
        };
        if let Some(file) = self.log.take() {
            // Only a second log could fail.
            let _ = log::start(Some(file), log::Format::Text, level);
        }
        std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "the shim failed")));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::Runtime)?;
        let served = runtime.block_on(self.run());
        served.inspect_err(|error| tracing::error!(reason = crate::text::chain(error), "ended"))
    }

    async fn run(self) -> Result<(), Error> {
        let namespace = self.invocation.namespace.to_string();
        let publisher = Publisher::start(self.bootstrap.events_address.clone(), namespace);
        let tasks = Tasks::new(self.invocation, self.bundle, publisher);
        serve(self.socket, self.known, &Arc::new(tasks)).await
    }
}

/// Serves tasks on a socket until their end is asked for, or there is nobody who could.
pub(super) async fn serve(
    socket: Socket,
    known: PipeReader,
    tasks: &Arc<Tasks>,
) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    let listener = socket.listener().map_err(Error::Socket)?;
    let listener = UnixListener::from_std(listener).map_err(Error::Socket)?;
    let listener = Listener::new(Connections(listener));
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(service::methods(tasks));
    server.start().await.map_err(Error::Serve)?;

    let telling = async {
        tokio::join!(tasks.tell_all(), tasks.log_death());
        // Without a pod nothing happens.
        std::future::pending::<()>().await;
    };
    let why = tokio::select! {
        () = tasks.over() => "containerd asks for it",
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        () = unknown(known) => "containerd was not told of it",
        () = telling => "",
    };
    tracing::info!(why, "the shim ends");
    // Nobody is to find it any more: the next of its name waits until all else is gone, too.
    socket.remove();
    tasks.end(LAST_WORDS).await;
    let _ = tokio::time::timeout(LAST_WORDS, server.shutdown()).await;
    Ok(())
}

/// Waits for the end of the starter, if that came before its answer: containerd, or what a client
/// of it wanted, was given up in this moment.
async fn unknown(known: PipeReader) {
    let told = async {
        let mut pipe = pipe::Receiver::from_owned_fd(known.into())?;
        pipe.read(&mut [0]).await
    };
    if !matches!(told.await, Ok(0)) {
        std::future::pending::<()>().await;
    }
}

/// The connections to a listener, as a stream.
struct Connections(UnixListener);

impl futures_core::Stream for Connections {
    type Item = io::Result<tokio::net::UnixStream>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let accepted = self.0.poll_accept(context);
        accepted.map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}
