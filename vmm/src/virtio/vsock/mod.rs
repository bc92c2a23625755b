//! The socket device (virtio 1.2, section 5.10): stream sockets between
//! programs of the host and programs of the guest.
//!
//! At the host all connections go through one listening unix socket
//! ([`greeting`]); the guest may connect only to ports that were given to the
//! device together with the sockets that it is joined to, each once.
//!
//! ```text
//!   guest --TX queue--> packet --> muxer --> connection (credit, state)
//!                                    |          |
//!                                    v          v
//!   guest <--RX queue-- turns <-- ready      host (socket, backlog)
//! ```
//!
//! A connection may be asked for at any time, also before the guest runs:
//! programs wait in the listener's queue until the driver is there, and
//! requests wait in the device until the guest has receive buffers.
//!
//! Nothing grows with what the guest does: it cannot make connections beyond
//! its ports, what a slow socket does not take is bounded by the credit of its
//! connection, and answers to nonsense wait in a short queue, behind which
//! the guest's packets have to wait too.
//!
//! System calls of its thread: `accept4`, `recvmsg`, `sendmsg`, `shutdown`,
//! `epoll_ctl`, `close`, and `read` and `write` on eventfds.

mod client;
pub mod connection;
pub mod greeting;
mod host;
mod link;
mod muxer;
pub mod packet;
mod rx;
mod sys;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    io,
    os::unix::net::{UnixListener, UnixStream},
    sync::Arc,
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use muxer::{FIRST_HOST_PORT, MAX_CONNECTIONS};

use self::{
    muxer::{LISTENER, Muxer, Turn},
    packet::{HEADER_BYTES, Header},
    rx::{Rx, Space},
};
use super::{Active, Error, Events, Kind, VirtioDevice, slices::Slices};

/// The context id of the host (virtio 1.2, section 5.10.4).
pub const HOST_CID: u64 = 2;

/// The smallest context id that a guest may have.
pub const MIN_GUEST_CID: u32 = 3;

const RX: usize = 0;
const TX: usize = 1;
/// For a change of the context id, which does not happen to a running guest. The driver's
/// buffers stay where they are.
const EVENT: usize = 2;

/// Linux keeps as many receive buffers of 4 KiB as the queue holds, and 8 events.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// `VIRTIO_VSOCK_F_STREAM`
const F_STREAM: u64 = 1;

/// The token by which the device wakes itself; no connection has port 0.
const WAKE: u64 = LISTENER + 1;

/// After so many turns or packets in a row the worker gets to look at its other events.
const BATCH: usize = 128;

/// The most data of one connection in one turn.
const TURN_BYTES: usize = 64 << 10;

/// Why a socket device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The context id belongs to someone else.
    #[error("a guest's context id cannot be {cid}: use one from {MIN_GUEST_CID} to 4294967294")]
    Cid {
        /// The id.
        cid: u32,
    },
    /// The port cannot be offered to the guest.
    #[error(
        "the guest cannot be given port {port}: use a port from 1 to {max}, each once",
        max = FIRST_HOST_PORT - 1
    )]
    Port {
        /// The port.
        port: u32,
    },
    /// The kernel refused a descriptor.
    #[error("cannot prepare the sockets of the socket device")]
    Io(#[from] io::Error),
}

/// The socket device.
pub struct Vsock {
    cid: u32,
    muxer: Muxer,
    /// Whether packets of the guest are left for later.
    waiting: bool,
    /// Written when something is left for later that no other event brings back.
    wake: EventFd,
}

impl Vsock {
    /// A device for the guest `cid`. Programs of the host connect through `listener`; the guest
    /// may connect to each of `guest_ports` once and is then joined to its socket.
    ///
    /// # Errors
    /// When the context id or a port is out of range or the kernel refuses a descriptor.
    pub fn new(
        cid: u32,
        listener: UnixListener,
        guest_ports: Vec<(u32, UnixStream)>,
    ) -> Result<Self, NewError> {
        if !(MIN_GUEST_CID..u32::MAX).contains(&cid) {
            return Err(NewError::Cid { cid });
        }
        listener.set_nonblocking(true)?;
        let mut ports = BTreeMap::new();
        for (port, socket) in guest_ports {
            let in_range = (1..FIRST_HOST_PORT).contains(&port);
            if !in_range || ports.insert(port, socket).is_some() {
                return Err(NewError::Port { port });
            }
        }
        Ok(Self {
            cid,
            muxer: Muxer::new(cid, listener, ports),
            waiting: false,
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Takes a batch of the guest's packets, or fewer when too many answers wait.
    fn take_packets(&mut self, active: &mut Active) -> Result<(), Error> {
        let memory = &active.memory;
        let queue = &mut active.queues[TX];
        let mut taken = 0;
        self.waiting = false;
        loop {
            if taken == BATCH || self.muxer.is_congested() {
                self.waiting = true;
                break;
            }
            let Some(chain) = queue.pop(memory)? else {
                break;
            };
            let head = chain.head_index();
            let mut payload = Slices::readable(TX, memory, chain)?;
            let mut header = [0; HEADER_BYTES];
            if payload.read(&mut header) < HEADER_BYTES {
                return Err(Error::BadRequest {
                    queue: TX,
                    what: "a packet is shorter than its header",
                });
            }
            payload.skip(HEADER_BYTES);
            active.counters.bytes_from_guest.add(payload.len() as u64);
            let header = Header::decode(&header);
            self.muxer.packet(&header, payload, &active.sources);
            queue.push(memory, head, 0)?;
            taken += 1;
        }
        if taken > 0 {
            queue.signal(memory)?;
        }
        Ok(())
    }

    /// Gives the guest what there is for it, as long as it has buffers.
    fn give_packets(&mut self, active: &mut Active) -> Result<(), Error> {
        let counters = Arc::clone(&active.counters);
        let (mut rx, sources) = Rx::of(active);
        for turn in 0.. {
            if !self.muxer.has_turns() {
                break;
            }
            if turn == BATCH {
                self.wake();
                break;
            }
            let Some(room) = rx.take()? else {
                break;
            };
            match self.muxer.next_turn() {
                None => rx.put_back(),
                Some(Turn::Packet(header)) => {
                    rx.give(&room, header, 0)?;
                }
                Some(Turn::Data(key, limit)) => {
                    let space = Space::collect(&mut rx, room, limit.min(TURN_BYTES))?;
                    let received = self.muxer.receive(key, space.slices.parts(), sources);
                    let (count, header) = received.unwrap_or_default();
                    counters.bytes_to_guest.add(count as u64);
                    space.give(&mut rx, header, count)?;
                }
            }
        }
        rx.signal()
    }

    /// Gives the guest what there is, and then takes packets that had to wait for that.
    fn work(&mut self, active: &mut Active) -> Result<(), Error> {
        self.give_packets(active)?;
        if self.waiting && !self.muxer.is_congested() {
            self.take_packets(active)?;
            self.waiting |= active.queues[TX].resume_kicks(&active.memory)?;
            self.give_packets(active)?;
        }
        self.wake_for_waiting();
        Ok(())
    }

    fn take_and_give(&mut self, active: &mut Active) -> Result<(), Error> {
        self.take_packets(active)?;
        self.give_packets(active)?;
        self.wake_for_waiting();
        Ok(())
    }

    /// A device that stops for an error will not speak again before it is reset: the programs
    /// of the host see that at once.
    fn hang_up_on_error(&mut self, done: Result<(), Error>) -> Result<(), Error> {
        if done.is_err() {
            self.muxer.reset();
        }
        done
    }

    fn wake_for_waiting(&self) {
        if self.waiting && !self.muxer.is_congested() {
            self.wake();
        }
    }

    fn wake(&self) {
        // It fails only when it is written already.
        let _ = self.wake.write(1);
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn config_space(&self) -> Vec<u8> {
        u64::from(self.cid).to_le_bytes().to_vec()
    }

    fn activate(&mut self, active: &mut Active) -> Result<(), Error> {
        self.muxer
            .start(&active.sources)
            .and_then(|()| active.sources.add(&self.wake, Events::IN, WAKE))
            .map_err(|source| Error::Host {
                what: "listen for connections to the guest",
                source,
            })
    }

    fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        let done = match index {
            RX => self.work(active),
            TX => self.take_and_give(active),
            _ => {
                debug_assert_eq!(index, EVENT);
                Ok(())
            }
        };
        self.hang_up_on_error(done)
    }

    fn handle_source(
        &mut self,
        token: u64,
        events: Events,
        active: &mut Active,
    ) -> Result<(), Error> {
        if token == WAKE {
            // It fails only when another wake-up was read with it.
            let _ = self.wake.read();
        } else {
            self.muxer.handle_source(token, events, &active.sources);
        }
        let done = self.work(active);
        self.hang_up_on_error(done)
    }

    fn reset(&mut self) {
        self.muxer.reset();
        self.waiting = false;
    }
}
