//! virtio-pmem (virtio 1.2, section 5.19): a file as memory.
//!
//! The VM maps the file into the guest's address space; the device only tells
//! where, and makes what the guest wrote there outlast a crash of the host.

use std::fs::File;

use vm_memory::{Bytes, GuestAddress};

use super::{Active, Chain, Error, Kind, Memory, VirtioDevice};

/// Bytes of `struct virtio_pmem_req`.
const REQUEST_BYTES: usize = 4;
/// Bytes of `struct virtio_pmem_resp`.
const RESPONSE_BYTES: u32 = 4;
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`
const T_FLUSH: u32 = 0;

/// The answer to a flush that was done.
const DONE: u32 = 0;
/// The answer to all else.
const FAILED: u32 = u32::MAX;

/// The virtio-pmem device.
pub struct Pmem {
    start: GuestAddress,
    size: u64,
    backing: Option<File>,
}

impl Pmem {
    /// A region of `size` bytes that is mapped at `start`. `backing` is the file to write back
    /// to, `None` when the guest may only read.
    pub fn new(start: GuestAddress, size: u64, backing: Option<File>) -> Self {
        Self {
            start,
            size,
            backing,
        }
    }

    /// Whoever flushes has written. What was written to a region that may only be read is nowhere,
    /// so that the flush fails and `fsync` tells the writer.
    fn answer(&self, request: Option<u32>) -> u32 {
        match (request, &self.backing) {
            (Some(T_FLUSH), Some(file)) => match file.sync_data() {
                Ok(()) => DONE,
                Err(_) => FAILED,
            },
            _ => FAILED,
        }
    }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> Kind {
        Kind::Pmem
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config_space(&self) -> Vec<u8> {
        [self.start.0.to_le_bytes(), self.size.to_le_bytes()].concat()
    }

    fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        let Active {
            memory,
            queues,
            counters,
            ..
        } = active;
        let queue = &mut queues[index];
        while let Some(chain) = queue.pop(memory)? {
            let (request, room) = parse(memory, chain.clone());
            let answer = self.answer(request).to_le_bytes();
            let written = match room {
                Some(address) if memory.write_slice(&answer, address).is_ok() => RESPONSE_BYTES,
                _ => 0,
            };
            counters.bytes_to_guest.add(u64::from(written));
            queue.push(memory, chain.head_index(), written)?;
        }
        queue.signal(memory)
    }
}

/// A request's type and where its answer goes, as far as they are there.
fn parse(memory: &Memory, chain: Chain<'_>) -> (Option<u32>, Option<GuestAddress>) {
    let mut request = None;
    let mut room = None;
    for descriptor in chain {
        if descriptor.is_write_only() {
            if room.is_none() && descriptor.len() >= RESPONSE_BYTES {
                room = Some(descriptor.addr());
            }
        } else if request.is_none() && descriptor.len() as usize >= REQUEST_BYTES {
            request = memory
                .read_obj::<u32>(descriptor.addr())
                .ok()
                .map(u32::from_le);
        }
    }
    (request, room)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::{Buffer, Rig};

    const FLUSH: [u8; 4] = [0; 4];
    const START: GuestAddress = GuestAddress(1 << 32);

    fn answer(rig: &mut Rig<Pmem>, request: &[u8]) -> Vec<u8> {
        let chain = rig.offer(0, &[Buffer::Out(request), Buffer::In(4)]);
        rig.kick(0).unwrap();
        assert_eq!(rig.used(0), [(chain.head, 4)]);
        rig.written(&chain)
    }

    #[test]
    fn the_configuration_space_tells_where_the_region_is() {
        let config = Pmem::new(START, 2 << 20, None).config_space();
        assert_eq!(config[..8], (1u64 << 32).to_le_bytes());
        assert_eq!(config[8..], (2u64 << 20).to_le_bytes());
    }

    #[test]
    fn a_flush_of_a_writable_region_reaches_the_file() {
        let file = tempfile::tempfile().unwrap();
        let mut rig = Rig::new(Pmem::new(START, 2 << 20, Some(file)));
        assert_eq!(answer(&mut rig, &FLUSH), DONE.to_le_bytes());
    }

    #[test]
    fn a_flush_that_the_host_refuses_fails() {
        let (pipe, _other_end) = nix::unistd::pipe().unwrap();
        let mut rig = Rig::new(Pmem::new(START, 2 << 20, Some(pipe.into())));
        assert_eq!(answer(&mut rig, &FLUSH), FAILED.to_le_bytes());
    }

    #[test]
    fn a_flush_of_a_read_only_region_fails() {
        let mut rig = Rig::new(Pmem::new(START, 2 << 20, None));
        assert_eq!(answer(&mut rig, &FLUSH), FAILED.to_le_bytes());
    }

    #[test]
    fn a_request_of_unknown_type_or_cut_off_fails() {
        let mut rig = Rig::new(Pmem::new(START, 2 << 20, None));
        assert_eq!(answer(&mut rig, &[1, 0, 0, 0]), FAILED.to_le_bytes());
        assert_eq!(answer(&mut rig, &[0, 0, 0]), FAILED.to_le_bytes());
    }

    #[test]
    fn a_request_without_room_is_given_back_empty() {
        let mut rig = Rig::new(Pmem::new(START, 2 << 20, None));
        rig.offer(0, &[Buffer::Out(&FLUSH)]);
        rig.offer(0, &[Buffer::Out(&FLUSH), Buffer::In(3)]);
        rig.kick(0).unwrap();
        assert_eq!(rig.used(0).iter().map(|used| used.1).max(), Some(0));
    }

    proptest! {
        #[test]
        fn only_a_flush_is_done(request in proptest::collection::vec(0u8..2, 1..9)) {
            let file = tempfile::tempfile().unwrap();
            let mut rig = Rig::new(Pmem::new(START, 2 << 20, Some(file)));
            let done = answer(&mut rig, &request) == DONE.to_le_bytes();
            prop_assert_eq!(done, request.starts_with(&FLUSH));
        }
    }
}
