use std::{
    io::{Read, Seek, Write},
    os::unix::fs::MetadataExt,
};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;
use crate::virtio::testing::{Buffer, Rig};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const DISK_BYTES: usize = 64 * 1024;

fn disk() -> (File, Vec<u8>) {
    let contents: Vec<u8> = (0..DISK_BYTES).map(|i| (i / 512 + i) as u8).collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&contents).unwrap();
    (file, contents)
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = file.try_clone().unwrap();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn rig(file: &File, read_only: bool) -> Rig<Blk> {
    let settings = Settings {
        read_only,
        serial: "disk-of-twenty-and-more".to_owned(),
    };
    Rig::new(Blk::new(file.try_clone().unwrap(), &settings).unwrap())
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()[..]].concat()
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &count.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// Does one request and returns its status and the data before it.
fn request(rig: &mut Rig<Blk>, kind: u32, sector: u64, out: &[u8], room: usize) -> (u8, Vec<u8>) {
    let header = header(kind, sector);
    let mut buffers = vec![Buffer::Out(&header)];
    if !out.is_empty() {
        buffers.push(Buffer::Out(out));
    }
    if room > 0 {
        buffers.push(Buffer::In(room));
    }
    buffers.push(Buffer::In(1));
    let chain = rig.offer(0, &buffers);
    rig.kick(0).unwrap();
    let used = rig.used(0);
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].0, chain.head);
    let mut written = rig.written(&chain);
    let status = written.pop().unwrap();
    let expected = match (kind, status) {
        (IN, OK) => room,
        (GET_ID, OK) => room.min(20),
        _ => 0,
    };
    assert_eq!(used[0].1 as usize, expected + 1);
    (status, written)
}

#[test]
fn what_is_written_is_read_back_and_on_the_disk() {
    let (file, mut expected) = disk();
    let mut rig = rig(&file, false);
    let data: Vec<u8> = (0..4096).map(|i| (i * 7) as u8).collect();
    assert_eq!(request(&mut rig, OUT, 24, &data, 0).0, OK);
    assert_eq!(request(&mut rig, IN, 24, &[], 4096), (OK, data.clone()));
    assert_eq!(request(&mut rig, FLUSH, 0, &[], 0).0, OK);
    expected[24 * 512..24 * 512 + 4096].copy_from_slice(&data);
    assert_eq!(contents(&file), expected);
}

#[test]
fn the_configuration_space_tells_the_size() {
    let (file, _) = disk();
    let rig = rig(&file, false);
    let config = rig.device.config_space();
    assert_eq!(config.len(), 60);
    assert_eq!(config[..8], 128u64.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[34..36], 1u16.to_le_bytes());
    assert_eq!(config[36..40], MAX_RANGE_SECTORS.to_le_bytes());
    assert_eq!(config[56], 1);
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let (file, expected) = disk();
    let mut rig = rig(&file, false);
    let header = header(IN, 2);
    let chain = rig.offer(
        0,
        &[
            Buffer::Out(&header[..3]),
            Buffer::Out(&header[3..]),
            Buffer::In(100),
            Buffer::In(413),
        ],
    );
    rig.kick(0).unwrap();
    assert_eq!(rig.used(0), [(chain.head, 513)]);
    let written = rig.written(&chain);
    assert_eq!(written[..512], expected[1024..1536]);
    assert_eq!(written[512], OK);

    let data = [7; 512];
    let first = [&super::tests::header(OUT, 3)[..], &data[..200]].concat();
    let chain = rig.offer(
        0,
        &[
            Buffer::Out(&first),
            Buffer::Out(&data[200..]),
            Buffer::In(1),
        ],
    );
    rig.kick(0).unwrap();
    assert_eq!(rig.written(&chain), [OK]);
    assert_eq!(contents(&file)[3 * 512..4 * 512], data);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let (file, before) = disk();
    let mut rig = rig(&file, true);
    assert_eq!(rig.device.features() & F_RO, F_RO);
    assert_eq!(rig.device.features() & (F_DISCARD | F_WRITE_ZEROES), 0);
    assert_eq!(request(&mut rig, OUT, 0, &[1; 512], 0).0, IO_ERROR);
    assert_eq!(
        request(&mut rig, DISCARD, 0, &range(0, 8, 0), 0).0,
        IO_ERROR
    );
    assert_eq!(
        request(&mut rig, WRITE_ZEROES, 0, &range(0, 8, 0), 0).0,
        IO_ERROR
    );
    assert_eq!(request(&mut rig, FLUSH, 0, &[], 0).0, OK);
    assert_eq!(contents(&file), before);
}

#[test]
fn a_transfer_past_the_end_is_an_io_error() {
    let (file, before) = disk();
    let mut rig = rig(&file, false);
    assert_eq!(request(&mut rig, IN, 127, &[], 512).0, OK);
    assert_eq!(request(&mut rig, IN, 128, &[], 512).0, IO_ERROR);
    assert_eq!(request(&mut rig, IN, 127, &[], 1024).0, IO_ERROR);
    assert_eq!(request(&mut rig, IN, u64::MAX, &[], 512).0, IO_ERROR);
    assert_eq!(request(&mut rig, OUT, 128, &[1; 512], 0).0, IO_ERROR);
    assert_eq!(
        request(&mut rig, OUT, u64::MAX / 512, &[1; 512], 0).0,
        IO_ERROR
    );
    assert_eq!(contents(&file), before);
}

#[test]
fn a_transfer_of_no_whole_sector_is_an_io_error() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    assert_eq!(request(&mut rig, IN, 0, &[], 511).0, IO_ERROR);
    assert_eq!(request(&mut rig, OUT, 0, &[1; 513], 0).0, IO_ERROR);
}

#[test]
fn a_transfer_of_nothing_succeeds() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    assert_eq!(request(&mut rig, IN, 0, &[], 0).0, OK);
    assert_eq!(request(&mut rig, OUT, 0, &[], 0).0, OK);
}

#[test]
fn a_disk_that_became_shorter_is_an_io_error() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    file.set_len(512).unwrap();
    assert_eq!(request(&mut rig, IN, 8, &[], 512).0, IO_ERROR);
    assert_eq!(request(&mut rig, IN, 0, &[], 1024).0, IO_ERROR);
    assert_eq!(request(&mut rig, IN, 0, &[], 512).0, OK);
}

#[test]
fn the_serial_number_is_cut_at_twenty_bytes() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    let (status, id) = request(&mut rig, GET_ID, 0, &[], 20);
    assert_eq!((status, &id[..]), (OK, &b"disk-of-twenty-and-m"[..]));
    assert_eq!(request(&mut rig, GET_ID, 0, &[], 4), (OK, b"disk".to_vec()));
}

#[test]
fn a_request_of_unknown_type_is_unsupported() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, u32::MAX] {
        assert_eq!(request(&mut rig, kind, 0, &[], 512).0, UNSUPPORTED);
    }
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let (file, mut expected) = disk();
    let mut rig = rig(&file, false);
    let blocks = file.metadata().unwrap().blocks();
    let both = [range(0, 8, 0), range(64, 16, 0)].concat();
    assert_eq!(request(&mut rig, DISCARD, 0, &both, 0).0, OK);
    assert_eq!(
        request(&mut rig, WRITE_ZEROES, 0, &range(100, 3, 0), 0).0,
        OK
    );
    assert_eq!(
        request(&mut rig, WRITE_ZEROES, 0, &range(110, 2, 1), 0).0,
        OK
    );
    for sectors in [0..8, 64..80, 100..103, 110..112] {
        expected[sectors.start * 512..sectors.end * 512].fill(0);
    }
    assert_eq!(contents(&file), expected);
    assert!(file.metadata().unwrap().blocks() < blocks);
}

#[test]
fn malformed_ranges_change_nothing() {
    let (file, before) = disk();
    let mut rig = rig(&file, false);
    for kind in [DISCARD, WRITE_ZEROES] {
        for (data, status) in [
            (vec![], IO_ERROR),
            (vec![0; 15], IO_ERROR),
            (range(0, 1, 0).repeat(17), IO_ERROR),
            (range(127, 2, 0), IO_ERROR),
            (range(u64::MAX, 1, 0), IO_ERROR),
            (range(0, u32::MAX, 0), IO_ERROR),
            ([range(0, 8, 0), range(128, 8, 0)].concat(), IO_ERROR),
            (range(0, 8, 4), UNSUPPORTED),
        ] {
            assert_eq!(request(&mut rig, kind, 0, &data, 0).0, status);
        }
    }
    assert_eq!(contents(&file), before);
}

#[test]
fn a_cut_off_header_is_an_io_error() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    let chain = rig.offer(0, &[Buffer::Out(&[0; 15]), Buffer::In(513)]);
    rig.kick(0).unwrap();
    assert_eq!(rig.used(0), [(chain.head, 1)]);
    assert_eq!(rig.written(&chain)[512], IO_ERROR);
    let chain = rig.offer(0, &[Buffer::In(513)]);
    rig.kick(0).unwrap();
    assert_eq!(rig.written(&chain)[512], IO_ERROR);
}

#[test]
fn a_request_without_a_status_byte_stops_the_device() {
    let (file, before) = disk();
    let mut rig = rig(&file, false);
    let header = header(OUT, 0);
    rig.offer(0, &[Buffer::Out(&header), Buffer::Out(&[1; 512])]);
    assert!(matches!(
        rig.kick(0),
        Err(Error::BadRequest { queue: 0, .. })
    ));
    assert_eq!(contents(&file), before);
}

#[test]
fn a_buffer_outside_of_memory_is_an_io_error() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    let header = header(IN, 0);
    let chain = rig.offer(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
    rig.write_descriptor(0, chain.head + 1, 1 << 40, 512, 3, chain.head + 2);
    rig.kick(0).unwrap();
    assert_eq!(rig.written(&chain)[512], IO_ERROR);
}

#[test]
fn an_indirect_table_that_goes_in_circles_ends() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    let header = header(IN, 0);
    let chain = rig.offer(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
    rig.write_descriptor(0, chain.head + 2, 0x20_0000, 1, 3, chain.head + 1);
    rig.kick(0).unwrap();
    assert_eq!(rig.used(0).len(), 1);
}

/// Offers a read of `segments` times 256 bytes, described by an indirect table.
fn offer_segments(rig: &mut Rig<Blk>, segments: u64) {
    const TABLE: u64 = 0x200_0000;
    const DATA: u64 = 0x210_0000;
    let (next, write) = (1u16, 2u16);
    let memory = rig.active.memory.clone();
    let describe = |index: u64, (address, len, flags): (u64, u32, u16)| {
        let at = TABLE + 16 * index;
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        let following = index as u16 + 1;
        memory.write_obj(following, GuestAddress(at + 14)).unwrap();
    };
    memory
        .write_slice(&header(IN, 0), GuestAddress(DATA))
        .unwrap();
    describe(0, (DATA, 16, next));
    for segment in 1..=segments {
        describe(segment, (DATA + 0x1000 * segment, 256, next | write));
    }
    describe(segments + 1, (DATA + 16, 1, write));
    let chain = rig.offer(0, &[Buffer::In(1)]);
    let indirect = 4;
    let bytes = 16 * (segments as u32 + 2);
    rig.write_descriptor(0, chain.head, TABLE, bytes, indirect, 0);
}

#[test]
fn a_request_has_as_many_segments_as_the_driver_was_told_and_no_more() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    offer_segments(&mut rig, u64::from(MAX_SEGMENTS));
    rig.kick(0).unwrap();
    assert_eq!(rig.used(0), [(0, 254 * 256 + 1)]);
    offer_segments(&mut rig, u64::from(MAX_SEGMENTS) + 2);
    rig.kick(0).unwrap_err();
}

#[test]
fn many_requests_make_one_interrupt() {
    let (file, _) = disk();
    let mut rig = rig(&file, false);
    let header = header(IN, 0);
    for _ in 0..16 {
        rig.offer(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
    }
    rig.kick(0).unwrap();
    assert_eq!(rig.used(0).len(), 16);
    assert_eq!(rig.active.counters.read().interrupts, 1);
}

#[test]
fn only_files_and_block_devices_are_disks() {
    let settings = Settings::default();
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(Blk::new(null, &settings), Err(disk::Error::Kind)));
    let empty = tempfile::tempfile().unwrap();
    assert!(matches!(
        Blk::new(empty, &settings),
        Err(disk::Error::Size(0))
    ));
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(512).unwrap();
    let read_only = File::open(named.path()).unwrap();
    assert!(matches!(
        Blk::new(read_only, &settings),
        Err(disk::Error::Access)
    ));
}

/// A disk with a ring, on whatever file system the file is.
fn ring_rig(file: &File) -> Rig<Blk> {
    let mut blk = Blk::new(file.try_clone().unwrap(), &Settings::default()).unwrap();
    let ring = Ring::new(file.try_clone().unwrap(), QUEUE_SIZE);
    blk.ring = Some(ring.expect("the kernel lets us have an io_uring"));
    Rig::new(blk)
}

/// A disk that is in memory.
fn memory_disk(bytes: u64) -> File {
    let memory = memfd_create(c"disk", MFdFlags::MFD_CLOEXEC);
    let file = File::from(memory.unwrap());
    file.set_len(bytes).unwrap();
    file
}

#[test]
fn what_comes_together_for_a_disk_in_memory_is_done_at_once_and_one_interrupt() {
    let blk = Blk::new(memory_disk(1 << 20), &Settings::default()).unwrap();
    let mut rig = Rig::new(blk.with_ring());
    let header = header(IN, 0);
    for _ in 0..16 {
        rig.offer(0, &[Buffer::Out(&header), Buffer::In(4096), Buffer::In(1)]);
    }
    rig.kick(0).unwrap();
    assert_eq!(rig.used(0).len(), 16);
    assert_eq!(rig.active.counters.read().interrupts, 1);
}

#[test]
fn a_driver_that_asks_for_much_at_once_is_told_on_the_way() {
    let blk = Blk::new(memory_disk(4 << 20), &Settings::default()).unwrap();
    let mut rig = Rig::new(blk.with_ring());
    let header = header(IN, 0);
    let chain = rig.offer(
        0,
        &[Buffer::Out(&header), Buffer::In(512 << 10), Buffer::In(1)],
    );
    for _ in 1..4 {
        rig.offer_again(0, &chain);
    }
    rig.kick(0).unwrap();
    assert_eq!(rig.used(0).len(), 4);
    assert_eq!(rig.active.counters.read().interrupts, 2);
}

/// The chains given back, after as many as there were on offer.
fn all_used(rig: &mut Rig<Blk>, count: usize) -> Vec<(u16, u32)> {
    let mut used = rig.used(0);
    while used.len() < count {
        assert!(rig.poll(5000), "the ring goes on");
        used.extend(rig.used(0));
    }
    used
}

#[test]
fn requests_that_come_together_are_all_done_by_the_ring() {
    let (file, before) = disk();
    let mut rig = ring_rig(&file);
    let mut chains = Vec::new();
    for i in 0..8 {
        let read = header(IN, i * 8);
        chains.push(rig.offer(
            0,
            &[
                Buffer::Out(&read),
                Buffer::In(1000),
                Buffer::In(3096),
                Buffer::In(1),
            ],
        ));
        let write = header(OUT, 64 + i * 8);
        let data = [i as u8; 4096];
        rig.offer(0, &[Buffer::Out(&write), Buffer::Out(&data), Buffer::In(1)]);
    }
    let past_the_end = header(IN, 128);
    let refused = rig.offer(
        0,
        &[Buffer::Out(&past_the_end), Buffer::In(512), Buffer::In(1)],
    );
    rig.kick(0).unwrap();
    let used = all_used(&mut rig, 17);
    assert_eq!(used.len(), 17);
    for (i, chain) in chains.iter().enumerate() {
        let written = rig.written(chain);
        assert_eq!(written[..4096], before[i * 4096..(i + 1) * 4096]);
        assert_eq!(written[4096], OK);
        assert!(used.contains(&(chain.head, 4097)));
    }
    assert_eq!(rig.written(&refused)[512], IO_ERROR);
    let after = contents(&file);
    assert_eq!(after[..32 * 1024], before[..32 * 1024]);
    for i in 0..8 {
        assert_eq!(after[(8 + i) * 4096..(9 + i) * 4096], [i as u8; 4096]);
    }
}

#[test]
fn requests_that_go_on_where_another_ends_are_done_as_one() {
    let (file, expected) = disk();
    let mut rig = ring_rig(&file);
    let headers: Vec<_> = (0..8).map(|i| header(IN, 8 * i)).collect();
    let chains: Vec<_> = headers
        .iter()
        .map(|header| rig.offer(0, &[Buffer::Out(header), Buffer::In(4096), Buffer::In(1)]))
        .collect();
    let data = vec![0x77; 4096];
    let ends: Vec<_> = [120, 121]
        .map(|sector| header(OUT, sector))
        .iter()
        .map(|header| {
            rig.offer(
                0,
                &[
                    Buffer::Out(header),
                    Buffer::Out(&data[..512]),
                    Buffer::In(1),
                ],
            )
        })
        .collect();
    rig.kick(0).unwrap();
    all_used(&mut rig, 10);
    for (i, chain) in chains.iter().enumerate() {
        let written = rig.written(chain);
        assert_eq!(written[..4096], expected[i * 4096..][..4096]);
        assert_eq!(written[4096], OK);
    }
    assert!(ends.iter().all(|chain| rig.written(chain) == [OK]));
    assert_eq!(contents(&file)[120 * 512..122 * 512], data[..1024]);
}

#[test]
fn of_requests_done_as_one_only_those_fail_that_would_alone() {
    let (file, expected) = disk();
    let mut rig = ring_rig(&file);
    file.set_len(2 * 4096 + 512).unwrap();
    let headers: Vec<_> = (0..4).map(|i| header(IN, 8 * i)).collect();
    let chains: Vec<_> = headers
        .iter()
        .map(|header| rig.offer(0, &[Buffer::Out(header), Buffer::In(4096), Buffer::In(1)]))
        .collect();
    rig.kick(0).unwrap();
    all_used(&mut rig, 4);
    for (i, chain) in chains.iter().enumerate() {
        let written = rig.written(chain);
        let status = if i < 2 { OK } else { IO_ERROR };
        assert_eq!(written.last(), Some(&status), "{i}");
        assert!(i >= 2 || written[..4096] == expected[i * 4096..][..4096]);
    }
}

#[test]
fn the_ring_tells_of_an_end_that_moved() {
    let (file, _) = disk();
    let mut rig = ring_rig(&file);
    file.set_len(1024).unwrap();
    let header = header(IN, 0);
    let mut offer = |room| rig.offer(0, &[Buffer::Out(&header), Buffer::In(room), Buffer::In(1)]);
    let (short, long) = (offer(1024), offer(2048));
    rig.kick(0).unwrap();
    all_used(&mut rig, 2);
    assert_eq!(rig.written(&short)[1024], OK);
    assert_eq!(rig.written(&long)[2048], IO_ERROR);
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let (file, _) = disk();
    let mut rig = ring_rig(&file);
    let header = header(IN, 0);
    for _ in 0..16 {
        rig.offer(0, &[Buffer::Out(&header), Buffer::In(4096), Buffer::In(1)]);
    }
    rig.kick(0).unwrap();
    rig.device.reset();
    assert!(rig.device.ring.as_ref().unwrap().is_idle());
}
