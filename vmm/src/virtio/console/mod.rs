//! The console (virtio 1.2, section 5.3): one port, `hvc0` to Linux.
//!
//! Output goes to a file, pipe, socket or terminal and never holds the guest
//! up ([`output`]); input comes from a descriptor as fast as the guest has
//! buffers for it. Linux loses what comes while it is still setting the port
//! up: input should follow the guest's first output.
//!
//! System calls of its thread: `read` and `write`, also on eventfds, and
//! `epoll_ctl`.

pub mod output;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use vm_memory::{ReadVolatile, VolatileMemoryError};

use self::output::Output;
use super::{Active, Error, Events, Kind, Sources, VirtioDevice, slices::Slices};

const RX: usize = 0;
const TX: usize = 1;

const QUEUE_SIZES: [u16; 2] = [16, 64];

/// The most bytes that one request may write. Linux writes pages at most.
const MAX_OUTPUT_BYTES: usize = 1 << 20;

const INPUT: u64 = 0;
const OUTPUT: u64 = 1;

/// The console.
pub struct Console {
    output: Output,
    /// Whether the output is watched for room.
    output_watched: bool,
    input: Option<Input>,
}

/// Where the guest's input comes from.
struct Input {
    fd: OwnedFd,
    state: InputState,
}

/// What is known of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InputState {
    /// It is watched for something to read.
    Watched,
    /// It has something to read for which the guest has no buffer.
    Ready,
    /// It is a file, which always can be read.
    File,
    /// It has ended.
    Ended,
}

impl Console {
    /// A console that writes to `output`, which is set to never block, and reads from `input`,
    /// which should have no other reader.
    ///
    /// # Errors
    /// When the output cannot be set so.
    pub fn new(output: File, input: Option<OwnedFd>) -> io::Result<Self> {
        Ok(Self {
            output: Output::new(output)?,
            output_watched: false,
            input: input.map(|fd| Input {
                fd,
                state: InputState::Watched,
            }),
        })
    }

    fn take_output(&mut self, active: &mut Active) -> Result<(), Error> {
        let memory = &active.memory;
        let queue = &mut active.queues[TX];
        while let Some(chain) = queue.pop(memory)? {
            let head = chain.head_index();
            let mut data = Slices::readable(TX, memory, chain)?;
            data.truncate(MAX_OUTPUT_BYTES);
            active.counters.bytes_from_guest.add(data.len() as u64);
            self.output.write(data);
            queue.push(memory, head, 0)?;
        }
        queue.signal(memory)?;
        self.watch_output(&active.sources)
    }

    fn watch_output(&mut self, sources: &Sources) -> Result<(), Error> {
        let wanted = self.output.is_waiting();
        if wanted == self.output_watched {
            return Ok(());
        }
        self.output_watched = wanted;
        let changed = if wanted {
            sources.add(&self.output, Events::OUT, OUTPUT)
        } else {
            sources.remove(&self.output)
        };
        changed.map_err(|source| Error::Host {
            what: "wait for the console's output",
            source,
        })
    }

    fn give_input(&mut self, active: &mut Active) -> Result<(), Error> {
        let Some(input) = &mut self.input else {
            return Ok(());
        };
        let memory = &active.memory;
        let queue = &mut active.queues[RX];
        let mut given = false;
        while input.state != InputState::Ended {
            let chain = match queue.pop(memory)? {
                None if queue.ready() && queue.resume_kicks(memory)? => queue.pop(memory)?,
                chain => chain,
            };
            let Some(chain) = chain else {
                input.wait_for_buffers(&active.sources);
                break;
            };
            let head = chain.head_index();
            let room = Slices::writable(RX, memory, chain)?;
            let count = input.read(&room, &active.sources)?;
            if count == 0 {
                queue.unpop();
                break;
            }
            active.counters.bytes_to_guest.add(count as u64);
            // A chain has less than 4 GiB.
            queue.push(memory, head, count as u32)?;
            given = true;
            if input.state == InputState::Watched {
                break;
            }
        }
        if given {
            queue.signal(memory)?;
        }
        Ok(())
    }
}

impl Input {
    /// Reads once into the first piece of `room`. 0 bytes mean that there is nothing now, or
    /// ever, which the state tells.
    fn read(&mut self, room: &Slices<'_>, sources: &Sources) -> Result<usize, Error> {
        let Some(mut piece) = room.parts().first().cloned() else {
            return Err(Error::BadRequest {
                queue: RX,
                what: "a receive buffer has no room",
            });
        };
        match self.fd.read_volatile(&mut piece) {
            Ok(0) => self.end(sources),
            Ok(count) => return Ok(count),
            Err(VolatileMemoryError::IOError(error))
                if error.kind() == io::ErrorKind::WouldBlock
                    || error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.end(sources),
        }
        Ok(0)
    }

    fn end(&mut self, sources: &Sources) {
        if self.state != InputState::File {
            // It is in the set in every other state.
            let _ = sources.remove(self);
        }
        self.state = InputState::Ended;
    }

    /// Stops watching: there is something to read, again and again.
    fn wait_for_buffers(&mut self, sources: &Sources) {
        if self.state == InputState::Watched && sources.modify(self, Events::empty(), INPUT).is_ok()
        {
            self.state = InputState::Ready;
        }
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    /// Columns and rows, the number of ports and the emergency write: none is offered, all are 0.
    fn config_space(&self) -> Vec<u8> {
        vec![0; 12]
    }

    fn activate(&mut self, active: &mut Active) -> Result<(), Error> {
        let host = |source| Error::Host {
            what: "listen to the console's input",
            source,
        };
        if let Some(input) = &mut self.input
            && input.state != InputState::Ended
        {
            input.state = match active.sources.add(input, Events::IN, INPUT) {
                Ok(()) => InputState::Watched,
                // Files cannot be waited for.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => InputState::File,
                Err(error) => return Err(host(error)),
            };
        }
        self.output_watched = false;
        self.watch_output(&active.sources)
    }

    fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        if index == TX {
            return self.take_output(active);
        }
        match &mut self.input {
            Some(input) if input.state == InputState::Ready => {
                let watched = active.sources.modify(input, Events::IN, INPUT);
                watched.map_err(|source| Error::Host {
                    what: "listen to the console's input",
                    source,
                })?;
                input.state = InputState::Watched;
                Ok(())
            }
            Some(input) if input.state == InputState::File => self.give_input(active),
            _ => Ok(()),
        }
    }

    fn handle_source(
        &mut self,
        token: u64,
        _events: Events,
        active: &mut Active,
    ) -> Result<(), Error> {
        if token == INPUT {
            return self.give_input(active);
        }
        self.output.flush();
        self.watch_output(&active.sources)
    }
}
