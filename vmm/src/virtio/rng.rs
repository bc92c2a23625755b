//! The entropy device (virtio 1.2, section 5.4): random bytes of the host.
//!
//! They are read from a descriptor that was opened before the jail was shut,
//! `/dev/urandom`, straight into guest memory. Linux asks for 64 bytes at a time.
//!
//! System calls of its thread: `read`, also on eventfds, and `write` on eventfds.

use std::{fs::File, io};

use vm_memory::ReadVolatile;

use super::{Active, Error, Kind, VirtioDevice, slices::Slices};

/// The most bytes that one request is given; the driver asks again when it wants more.
pub const MAX_REQUEST_BYTES: usize = 4096;

/// The driver has one request under way.
const QUEUE_SIZES: [u16; 1] = [8];

/// The entropy device.
pub struct Rng {
    source: File,
}

impl Rng {
    /// A device that gives out what it reads from `source`.
    pub fn new(source: File) -> Self {
        Self { source }
    }

    /// Fills `room` up to the bound and says with how many bytes.
    fn fill(&mut self, mut room: Slices<'_>) -> io::Result<usize> {
        room.truncate(MAX_REQUEST_BYTES);
        let mut done = 0;
        while !room.is_empty() {
            let part = &mut room.parts()[0].clone();
            let count = match self.source.read_volatile(part) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(vm_memory::VolatileMemoryError::IOError(error))
                    if error.kind() == io::ErrorKind::Interrupted =>
                {
                    continue;
                }
                Err(vm_memory::VolatileMemoryError::IOError(error)) => return Err(error),
                Err(other) => return Err(io::Error::other(other)),
            };
            room.skip(count);
            done += count;
        }
        Ok(done)
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn config_space(&self) -> Vec<u8> {
        Vec::new()
    }

    fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        let memory = &active.memory;
        let queue = &mut active.queues[index];
        while let Some(chain) = queue.pop(memory)? {
            let head = chain.head_index();
            let room = Slices::writable(index, memory, chain)?;
            let count = self.fill(room).map_err(|source| Error::Host {
                what: "read random bytes",
                source,
            })?;
            active.counters.bytes_to_guest.add(count as u64);
            // At most MAX_REQUEST_BYTES.
            queue.push(memory, head, count as u32)?;
        }
        queue.signal(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, Rig};

    fn rig() -> Rig<Rng> {
        Rig::new(Rng::new(File::open("/dev/urandom").unwrap()))
    }

    #[test]
    fn a_request_is_filled_with_random_bytes() {
        let mut rig = rig();
        let chain = rig.offer(0, &[Buffer::In(60), Buffer::In(40)]);

        rig.kick(0).unwrap();

        assert_eq!(rig.used(0), [(chain.head, 100)]);
        assert!(rig.interrupted(0));
        // Each half is all zero once in 2^320 runs.
        let bytes = rig.written(&chain);
        assert!(bytes[..50].iter().any(|&byte| byte != 0));
        assert!(bytes[60..].iter().any(|&byte| byte != 0));
    }

    #[test]
    fn a_large_request_is_given_no_more_than_the_bound() {
        let mut rig = rig();
        let chain = rig.offer(0, &[Buffer::In(3000), Buffer::In(1 << 20)]);

        rig.kick(0).unwrap();

        assert_eq!(rig.used(0), [(chain.head, MAX_REQUEST_BYTES as u32)]);
        let bytes = rig.written(&chain);
        assert!(bytes[MAX_REQUEST_BYTES..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_request_without_room_is_given_nothing() {
        let mut rig = rig();
        let chain = rig.offer(0, &[Buffer::Out(b"never read")]);
        rig.kick(0).unwrap();
        assert_eq!(rig.used(0), [(chain.head, 0)]);
    }

    #[test]
    fn a_request_outside_of_memory_stops_the_device() {
        let mut rig = rig();
        rig.offer(0, &[Buffer::In(64)]);
        rig.write_descriptor(0, 0, u64::MAX - 32, 64, 2, 0);
        assert!(matches!(
            rig.kick(0),
            Err(Error::BadRequest { queue: 0, .. })
        ));
    }

    #[test]
    fn a_source_that_ends_stops_the_device() {
        let mut rig = Rig::new(Rng::new(File::open("/dev/null").unwrap()));
        rig.offer(0, &[Buffer::In(64)]);
        assert!(matches!(rig.kick(0), Err(Error::Host { .. })));
    }
}
