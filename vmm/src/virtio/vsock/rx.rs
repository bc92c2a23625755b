//! The receive queue: the guest's buffers, each with room for one packet.

use super::{
    RX,
    packet::{HEADER_BYTES, Header},
    sys,
};
use crate::virtio::{Active, ActiveQueue, Error, Memory, Sources, slices::Slices};

/// The receive queue at work.
pub(super) struct Rx<'a> {
    queue: &'a mut ActiveQueue,
    memory: &'a Memory,
    /// Whether the driver has not been told of all that it was given.
    unsignalled: bool,
}

/// One buffer of the guest.
pub(super) struct Room<'a> {
    head: u16,
    /// Header and data.
    slices: Slices<'a>,
}

impl<'a> Rx<'a> {
    /// The receive queue of a running device, and what its sockets are watched with.
    pub(super) fn of(active: &'a mut Active) -> (Self, &'a Sources) {
        let rx = Self {
            queue: &mut active.queues[RX],
            memory: &active.memory,
            unsignalled: false,
        };
        (rx, &active.sources)
    }

    /// Takes the next buffer. When there is none, the driver is asked to say when there is.
    pub(super) fn take(&mut self) -> Result<Option<Room<'a>>, Error> {
        let chain = match self.queue.pop(self.memory)? {
            None if self.queue.ready() && self.queue.resume_kicks(self.memory)? => {
                self.queue.pop(self.memory)?
            }
            chain => chain,
        };
        let Some(chain) = chain else {
            return Ok(None);
        };
        let head = chain.head_index();
        let slices = Slices::writable(RX, self.memory, chain)?;
        if slices.len() <= HEADER_BYTES {
            return Err(Error::BadRequest {
                queue: RX,
                what: "a receive buffer has no room for a header and data",
            });
        }
        Ok(Some(Room { head, slices }))
    }

    /// Puts the buffer that was taken last back.
    pub(super) fn put_back(&mut self) {
        self.queue.unpop();
    }

    /// Gives a buffer to the guest with a packet, whose data are in their place: the first of
    /// the `len` bytes that there are. Says how many they are.
    pub(super) fn give(
        &mut self,
        room: &Room<'_>,
        header: Header,
        len: usize,
    ) -> Result<usize, Error> {
        let len = len.min(room.slices.len() - HEADER_BYTES);
        // A chain has less than 4 GiB.
        let header = Header {
            len: len as u32,
            ..header
        };
        room.slices.write(&header.encode());
        let bytes = (HEADER_BYTES + len) as u32;
        self.unsignalled = true;
        self.queue.push(self.memory, room.head, bytes)?;
        Ok(len)
    }

    /// Tells the driver of what it was given.
    pub(super) fn signal(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.unsignalled) {
            self.queue.signal(self.memory)?;
        }
        Ok(())
    }
}

/// Room for data that may need more than one buffer.
pub(super) struct Space<'a> {
    /// Where the data goes; not empty.
    pub(super) slices: Slices<'a>,
    rooms: Vec<Room<'a>>,
}

impl<'a> Space<'a> {
    /// Takes buffers, `first` being taken already, for up to `limit` bytes.
    pub(super) fn collect(rx: &mut Rx<'a>, first: Room<'a>, limit: usize) -> Result<Self, Error> {
        let mut space = Self {
            slices: Slices::new(),
            rooms: Vec::new(),
        };
        space.add(first);
        while space.slices.len() < limit && space.slices.parts().len() < sys::MAX_PIECES {
            let Some(room) = rx.take()? else {
                break;
            };
            space.add(room);
        }
        space.slices.truncate(limit);
        Ok(space)
    }

    fn add(&mut self, room: Room<'a>) {
        let mut data = room.slices.clone();
        data.skip(HEADER_BYTES);
        self.slices.append(data);
        self.rooms.push(room);
    }

    /// Gives the first `count` bytes to the guest, in as many packets as they need, and puts
    /// the other buffers back.
    pub(super) fn give(self, rx: &mut Rx<'a>, header: Header, count: usize) -> Result<(), Error> {
        let mut left = count;
        for room in &self.rooms {
            if left == 0 {
                rx.put_back();
            } else {
                left -= rx.give(room, header, left)?;
            }
        }
        Ok(())
    }
}
