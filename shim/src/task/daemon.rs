//! The daemon of a pod: it serves the Task service until containerd shuts it down.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};
use tracing::level_filters::LevelFilter;
use ttrpc::r#async::{Server, transport::Listener};

use super::{events::Publisher, service, start::Daemon, tasks::Tasks};
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
        let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
        let namespace = self.invocation.namespace.to_string();
        let publisher = Publisher::start(self.bootstrap.events_address.clone(), namespace);
        let tasks = Arc::new(Tasks::new(self.invocation, self.bundle, publisher));

        let listener = self.socket.listener().map_err(Error::Socket)?;
        let listener = UnixListener::from_std(listener).map_err(Error::Socket)?;
        let mut server = Server::new()
            .add_listener(self::listener(listener))
            .register_service(service::methods(&tasks));
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
            () = telling => "",
        };
        tracing::info!(why, "the shim ends");
        tasks.end(LAST_WORDS).await;
        self.socket.remove();
        let _ = tokio::time::timeout(LAST_WORDS, server.shutdown()).await;
        Ok(())
    }
}

/// A listener as ttrpc wants one.
pub(super) fn listener(socket: UnixListener) -> Listener {
    Listener::new(Connections(socket))
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
