//! The VMM's side of the control socket.

use std::{
    collections::BTreeMap,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{
    Commands,
    connection::{Connection, Next},
};

/// Clients at a time; further ones are let go at once.
const MAX_CONNECTIONS: usize = 16;
/// How long nobody is let in after the process ran out of descriptors.
const PAUSE_MS: i32 = 1000;

const LISTENER: u64 = 0;
const ENDED: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// Answers clients of `listener` until `ended` is signalled. Returns at once then, with all that
/// could be sent without waiting sent.
///
/// # Errors
/// When the listener is not one, or the process has no descriptor to wait with.
pub fn serve(listener: OwnedFd, ended: &EventFd, commands: &mut dyn Commands) -> io::Result<()> {
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    let mut server = Server {
        listener,
        epoll: Epoll::new()?,
        connections: BTreeMap::new(),
        next_token: FIRST_CONNECTION,
    };
    server.watch(
        ControlOperation::Add,
        ended.as_raw_fd(),
        EventSet::IN,
        ENDED,
    )?;
    server.listen(ControlOperation::Add)?;
    server.run(commands)
}

struct Server {
    listener: UnixListener,
    epoll: Epoll,
    connections: BTreeMap<u64, Connection>,
    next_token: u64,
}

impl Server {
    fn run(&mut self, commands: &mut dyn Commands) -> io::Result<()> {
        let mut events = [EpollEvent::default(); MAX_CONNECTIONS + 2];
        let mut timeout_ms = -1;
        loop {
            let ready = match self.epoll.wait(timeout_ms, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if timeout_ms >= 0 {
                self.listen(ControlOperation::Add)?;
                timeout_ms = -1;
            }
            for event in &events[..ready] {
                match event.data() {
                    ENDED => return Ok(()),
                    LISTENER => {
                        if self.accept().is_err() {
                            // Most likely no descriptor is free: listen again a little later.
                            self.listen(ControlOperation::Delete)?;
                            timeout_ms = PAUSE_MS;
                        }
                    }
                    token => self.connection_ready(token, commands)?,
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        let (stream, _) = match self.listener.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => return Ok(()),
            other => other?,
        };
        if self.connections.len() >= MAX_CONNECTIONS {
            return Ok(());
        }
        let connection = Connection::new(stream)?;
        let token = self.next_token;
        self.watch(
            ControlOperation::Add,
            connection.as_raw_fd(),
            EventSet::IN,
            token,
        )?;
        self.next_token += 1;
        self.connections.insert(token, connection);
        Ok(())
    }

    fn connection_ready(&mut self, token: u64, commands: &mut dyn Commands) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(());
        };
        let next = connection.ready(commands);
        let fd = connection.as_raw_fd();
        match next {
            Next::Read => self.watch(ControlOperation::Modify, fd, EventSet::IN, token),
            Next::Write => self.watch(ControlOperation::Modify, fd, EventSet::OUT, token),
            // Closing it also ends the watch.
            Next::Close => {
                self.connections.remove(&token);
                Ok(())
            }
        }
    }

    fn listen(&self, operation: ControlOperation) -> io::Result<()> {
        self.watch(operation, self.listener.as_raw_fd(), EventSet::IN, LISTENER)
    }

    fn watch(
        &self,
        operation: ControlOperation,
        fd: i32,
        events: EventSet,
        token: u64,
    ) -> io::Result<()> {
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, token))
    }
}
