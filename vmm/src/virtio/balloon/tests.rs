//! The balloon before a guest's driver.

use vm_memory::{Bytes, FileOffset, GuestRegionMmap, MmapRegion};

use super::*;
use crate::virtio::testing::{Buffer, Rig};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const REPORTING: usize = 3;

/// A page of the rig's memory that neither its rings nor its buffers use.
const PAGE: u32 = (32 << 20) / 4096;

fn rig() -> Rig<Balloon> {
    Rig::new(Balloon::new(0).unwrap())
}

fn fill(rig: &Rig<Balloon>, page: u32) {
    let address = GuestAddress(u64::from(page) * PAGE_BYTES);
    let bytes = [0xaa; PAGE_BYTES as usize];
    rig.active.memory.write_slice(&bytes, address).unwrap();
}

fn is_empty(rig: &Rig<Balloon>, page: u32) -> bool {
    let address = GuestAddress(u64::from(page) * PAGE_BYTES);
    let mut bytes = [1; PAGE_BYTES as usize];
    rig.active.memory.read_slice(&mut bytes, address).unwrap();
    bytes.iter().all(|&byte| byte == 0)
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

#[test]
fn the_wanted_size_is_told_in_pages() {
    let balloon = Balloon::new(3).unwrap();
    assert_eq!(balloon.config_space(), [0, 3, 0, 0, 0, 0, 0, 0]);
    assert!(matches!(
        Balloon::new(1 << 40),
        Err(NewError::Size {
            mib: 0x100_0000_0000
        })
    ));
}

#[test]
fn inflating_frees_the_named_pages_only() {
    let mut rig = rig();
    for page in PAGE..PAGE + 4 {
        fill(&rig, page);
    }
    rig.offer(
        INFLATE,
        &[Buffer::Out(&numbers(&[PAGE + 2, PAGE, PAGE + 1]))],
    );

    rig.kick(INFLATE).unwrap();

    assert!((PAGE..PAGE + 3).all(|page| is_empty(&rig, page)));
    assert!(!is_empty(&rig, PAGE + 3));
    assert_eq!(rig.used(INFLATE).len(), 1);
    assert!(rig.interrupted(INFLATE));
}

#[test]
fn deflating_is_answered() {
    let mut rig = rig();
    let chain = rig.offer(DEFLATE, &[Buffer::Out(&numbers(&[PAGE]))]);
    rig.kick(DEFLATE).unwrap();
    assert_eq!(rig.used(DEFLATE), [(chain.head, 0)]);
}

#[test]
fn a_page_outside_of_memory_stops_the_device() {
    let mut rig = rig();
    rig.offer(INFLATE, &[Buffer::Out(&numbers(&[u32::MAX]))]);
    assert!(matches!(
        rig.kick(INFLATE),
        Err(Error::BadRequest { queue: INFLATE, .. })
    ));
}

#[test]
fn too_many_pages_at_a_time_stop_the_device() {
    let mut rig = rig();
    let pages = vec![0; (MAX_PAGES + 1) * 4];
    rig.offer(INFLATE, &[Buffer::Out(&pages)]);
    assert!(rig.kick(INFLATE).is_err());
}

#[test]
fn reported_ranges_are_freed_and_pages_around_them_stay() {
    let mut rig = rig();
    for page in PAGE..PAGE + 4 {
        fill(&rig, page);
    }
    let chain = rig.offer(REPORTING, &[Buffer::In(1)]);
    let start = u64::from(PAGE) * PAGE_BYTES;
    rig.write_descriptor(REPORTING, chain.head, start + 1, 3 * 4096, 2, 0);

    rig.kick(REPORTING).unwrap();

    assert!(!is_empty(&rig, PAGE) && !is_empty(&rig, PAGE + 3));
    assert!(is_empty(&rig, PAGE + 1) && is_empty(&rig, PAGE + 2));
}

#[test]
fn a_report_beyond_memory_stops_the_device() {
    for (start, len) in [(63 << 20, 2 << 20), (u64::MAX - 4095, 8192)] {
        let mut rig = rig();
        let chain = rig.offer(REPORTING, &[Buffer::In(1)]);
        rig.write_descriptor(REPORTING, chain.head, start, len, 2, 0);
        assert!(rig.kick(REPORTING).is_err());
    }
}

#[test]
fn statistics_are_asked_for_by_giving_the_buffer_back() {
    let mut rig = rig();
    let monitor = rig.device.monitor();
    let mut entry = vec![4, 0];
    entry.extend(12_345_u64.to_le_bytes());
    let chain = rig.offer(STATISTICS, &[Buffer::Out(&entry)]);
    rig.kick(STATISTICS).unwrap();
    assert_eq!(monitor.latest().unwrap().free, Some(12_345));
    assert!(rig.used(STATISTICS).is_empty());

    monitor.refresh();
    assert!(rig.poll(0));

    assert_eq!(rig.used(STATISTICS), [(chain.head, 0)]);
    assert!(rig.interrupted(STATISTICS));
}

#[test]
fn a_driver_without_statistics_has_its_reporting_queue_one_place_earlier() {
    let features = F_PAGE_REPORTING;
    assert_eq!(role(2, features), Some(Role::Reporting));
    assert_eq!(role(3, features), None);
}

#[test]
fn the_driver_s_actual_size_is_kept() {
    let mut rig = rig();
    rig.device.write_config(&[1, 2, 3, 4], &mut rig.active);
    rig.device.write_config(&[9; 3], &mut rig.active);
    assert_eq!(rig.device.config_space(), [0, 0, 0, 0, 1, 2, 3, 4]);
    assert_eq!(rig.device.driver_fields(), 4..8);
}

#[test]
fn pages_of_a_shared_file_are_freed_in_the_file() {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(1 << 20).unwrap();
    let mapping = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 1 << 20);
    let region = GuestRegionMmap::new(mapping.unwrap(), GuestAddress(0)).unwrap();
    let memory = Memory::from_regions(vec![region]).unwrap();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    memory.write_slice(&[1; 8192], GuestAddress(4096)).unwrap();
    assert_eq!(blocks(), 16);

    let freed = free(&memory, 0, GuestAddress(0), 1 << 20).unwrap();

    assert_eq!((freed, blocks()), (1 << 20, 0));
    assert_eq!(memory.read_obj::<u64>(GuestAddress(4096)).unwrap(), 0);
}
