//! Packets of the guest.

use std::{
    io,
    time::{Duration, Instant},
};

use vm_memory::{Address, Bytes};

use super::{
    header::{HEADER_BYTES, Header, MAX_FRAME},
    rx::Way,
    sys::{MAX_PIECES, Pieces},
    tap,
};
use crate::virtio::{Chain, Error, Memory};

/// The transmit queue of a pair at work.
pub(super) struct Tx {
    pieces: Pieces,
    features: u64,
}

/// Why no more packets are sent for now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// There are no more.
    All,
    /// The tap takes no more.
    Full,
    /// The limit is reached for so long.
    Limited(Duration),
    /// The interface is gone; what the guest sends is dropped.
    Gone,
}

/// A packet whose frame lies in [`Tx::pieces`].
struct Packet {
    header: [u8; HEADER_BYTES],
    frame_len: usize,
}

impl Tx {
    pub(super) fn new(memory: Memory, features: u64) -> Self {
        Self {
            pieces: Pieces::new(memory),
            features,
        }
    }

    /// Sends what the guest has put into its queue.
    pub(super) fn transmit(&mut self, way: Way<'_>) -> Result<Sent, Error> {
        let mut end = Sent::All;
        loop {
            if let Some(limiter) = way.limiter
                && let Err(wait) = limiter.admit(Instant::now())
            {
                end = Sent::Limited(wait);
                break;
            }
            let Some(chain) = way.queue.pop(way.memory)? else {
                break;
            };
            let head = chain.head_index();
            let sent = match self.collect(way.memory, chain) {
                Some(packet) => {
                    let sent = self.send(&way, &packet);
                    if let (Ok(true), Some(limiter)) = (&sent, way.limiter.as_mut()) {
                        limiter.spend(packet.frame_len);
                    }
                    sent
                }
                None => Ok(false),
            };
            match sent {
                Ok(true) => {}
                Ok(false) => way.counters.dropped.add(1),
                Err(Sent::Full) => {
                    way.queue.unpop();
                    end = Sent::Full;
                    break;
                }
                Err(other) => {
                    way.counters.dropped.add(1);
                    end = other;
                }
            }
            way.queue.push(way.memory, head, 0)?;
        }
        way.queue.signal(way.memory)?;
        Ok(end)
    }

    /// Takes what the guest has put into its queue and sends nothing.
    pub(super) fn discard(way: Way<'_>) -> Result<Sent, Error> {
        while let Some(chain) = way.queue.pop(way.memory)? {
            way.counters.dropped.add(1);
            way.queue.push(way.memory, chain.head_index(), 0)?;
        }
        way.queue.signal(way.memory)?;
        Ok(Sent::All)
    }

    /// Sends one packet, or tells why not; false when the host does not want this one.
    fn send(&mut self, way: &Way<'_>, packet: &Packet) -> Result<bool, Sent> {
        let sent = loop {
            match self.pieces.write_to(way.tap.file(), &packet.header) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                sent => break sent,
            }
        };
        match sent {
            Ok(_) => {
                let bytes = packet.frame_len;
                way.counters.bytes_from_guest.add(bytes as u64);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Sent::Full),
            Err(error) if tap::is_gone(&error) => Err(Sent::Gone),
            Err(_) => Ok(false),
        }
    }

    /// Lays a packet's frame out and checks its header; nothing when either is not as it should be.
    fn collect<'m>(&mut self, memory: &'m Memory, chain: Chain<'m>) -> Option<Packet> {
        self.pieces.clear();
        let mut header = [0; HEADER_BYTES];
        let mut have = 0;
        let mut frame_len = 0;
        for (count, descriptor) in chain.enumerate() {
            if descriptor.is_write_only() || count > MAX_PIECES {
                return None;
            }
            let (mut at, mut len) = (descriptor.addr(), descriptor.len() as usize);
            let now = len.min(HEADER_BYTES - have);
            if now > 0 {
                memory.read_slice(&mut header[have..have + now], at).ok()?;
                have += now;
                at = at.checked_add(now as u64)?;
                len -= now;
            }
            frame_len += len;
            if frame_len > MAX_FRAME {
                return None;
            }
            if len > 0 {
                self.pieces.add(at, len).ok()?;
            }
        }
        if have < HEADER_BYTES {
            return None;
        }
        let header = Header::parse(&header, self.features, frame_len).ok()?;
        Some(Packet {
            header: header.encode(),
            frame_len,
        })
    }
}
