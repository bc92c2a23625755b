//! One client of the control socket, as the VMM sees it.
//!
//! ```text
//!   Reading --a line--> carried out --reply sent--> Reading
//!                            \--socket full--> Writing --all sent--> Reading
//! ```
//!
//! Nothing is read while a reply waits, so a client that does not read holds a
//! bounded amount of memory and nobody else up.

use std::{
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use super::{
    Commands,
    message::{MAX_DESCRIPTORS, MAX_LINE_BYTES, Reply},
    sys,
};

/// A client.
pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    output: Vec<u8>,
    /// Whether it broke the rules; it is let go once it was told so.
    broken: bool,
}

/// What to do about a connection next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait until there is something to read.
    Read,
    /// Wait until there is room to write.
    Write,
    /// Let it go.
    Close,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            descriptors: Vec::new(),
            output: Vec::new(),
            broken: false,
        })
    }

    /// The socket is ready: takes what came, carries out what is complete, sends what it can.
    pub(super) fn ready(&mut self, commands: &mut dyn Commands) -> Next {
        self.advance(commands).unwrap_or(Next::Close)
    }

    fn advance(&mut self, commands: &mut dyn Commands) -> io::Result<Next> {
        if self.output.is_empty() && !self.receive()? {
            return Ok(Next::Close);
        }
        loop {
            if !self.flush()? {
                return Ok(Next::Write);
            }
            if self.broken {
                return Ok(Next::Close);
            }
            match self.next_line() {
                Ok(Some(line)) => {
                    let reply = self.answer(&line, commands);
                    self.queue(&reply);
                }
                Ok(None) => return Ok(Next::Read),
                Err(complaint) => {
                    self.broken = true;
                    self.queue(&Reply::Failed { message: complaint });
                }
            }
        }
    }

    /// False when the client is gone.
    fn receive(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        let (count, descriptors) = match sys::receive(&self.stream, &mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            other => other?,
        };
        self.input.extend_from_slice(&buffer[..count]);
        self.descriptors.extend(descriptors);
        Ok(count > 0)
    }

    fn next_line(&mut self) -> Result<Option<Vec<u8>>, String> {
        if self.descriptors.len() > MAX_DESCRIPTORS {
            return Err(format!(
                "more than {MAX_DESCRIPTORS} descriptors in a request"
            ));
        }
        let end = self.input.iter().position(|byte| *byte == b'\n');
        if end.unwrap_or(self.input.len()) > MAX_LINE_BYTES {
            return Err(format!("a request of more than {MAX_LINE_BYTES} bytes"));
        }
        Ok(end.map(|end| {
            let rest = self.input.split_off(end + 1);
            std::mem::replace(&mut self.input, rest)
        }))
    }

    fn answer(&mut self, line: &[u8], commands: &mut dyn Commands) -> Reply {
        let descriptors = std::mem::take(&mut self.descriptors);
        match serde_json::from_slice(line) {
            Ok(request) => commands.carry_out(request, descriptors),
            Err(error) => Reply::Failed {
                message: format!("not a request: {error}"),
            },
        }
    }

    fn queue(&mut self, reply: &Reply) {
        let failed = |message: String| Reply::Failed { message };
        let line = serde_json::to_vec(reply)
            .map_err(|error| error.to_string())
            .and_then(|line| match line.len() {
                len if len > MAX_LINE_BYTES => Err(format!("the reply has {len} bytes")),
                _ => Ok(line),
            })
            .or_else(|message| serde_json::to_vec(&failed(message)));
        // A line of ours with nothing but a message can always be written as JSON.
        self.output.extend(line.unwrap_or_default());
        self.output.push(b'\n');
    }

    /// False when the socket takes no more for now.
    fn flush(&mut self) -> io::Result<bool> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
