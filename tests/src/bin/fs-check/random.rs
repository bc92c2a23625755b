//! Random operations on one file, each compared with what memory says.

use std::path::Path;

use crate::sys::{self, Mapping};

/// How large the file may grow.
const MOST: usize = 256 << 10;
const PAGE: usize = 4096;

/// A generator that gives the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit.max(1)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| (self.next() >> 32) as u8).collect()
    }
}

/// Does `count` operations and compares.
pub(crate) fn run(directory: &Path, seed: u64, count: u64) {
    let path = directory.join(format!("random-{seed}"));
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
    let mut fd = sys::open(&path, flags, 0o644).expect("a file");
    let direct = sys::aligned(PAGE);
    let mut random = Random(2 * seed + 1);
    let mut expected: Vec<u8> = Vec::new();
    for step in 0..count {
        let offset = random.below(MOST - 20_000);
        let len = 1 + random.below(20_000);
        let what = random.below(11);
        match what {
            0 | 1 => {
                let bytes = random.bytes(len);
                assert_eq!(sys::write_at(fd, &bytes, offset as i64), Ok(len as i64));
                put(&mut expected, offset, &bytes);
            }
            2 => {
                sys::ftruncate(fd, offset as i64).expect("cut or extended");
                expected.resize(offset, 0);
            }
            3 => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                sys::fallocate(fd, mode, offset as i64, len as i64).expect("a hole");
                let end = (offset + len).min(expected.len());
                if offset < end {
                    expected[offset..end].fill(0);
                }
            }
            4 => {
                sys::fallocate(fd, 0, offset as i64, len as i64).expect("room");
                let size = expected.len().max(offset + len);
                expected.resize(size, 0);
            }
            5 if !expected.is_empty() => {
                let map = Mapping::new(fd, expected.len(), libc::MAP_SHARED).expect("a mapping");
                let offset = offset % expected.len();
                let bytes = random.bytes(len.min(expected.len() - offset));
                map.write(offset, &bytes);
                expected[offset..offset + bytes.len()].copy_from_slice(&bytes);
                if random.below(2) == 0 {
                    map.sync().expect("synced");
                }
            }
            6 if !expected.is_empty() => {
                let map = Mapping::new(fd, expected.len(), libc::MAP_SHARED).expect("a mapping");
                let mut bytes = vec![0; expected.len()];
                map.read(0, &mut bytes);
                assert!(bytes == expected, "step {step}: mapped memory differs");
            }
            7 => {
                let append = sys::open(&path, libc::O_WRONLY | libc::O_APPEND, 0).expect("open");
                let bytes = random.bytes(len.min(MOST - expected.len().min(MOST)));
                sys::write(append, &bytes).expect("appended");
                expected.extend(bytes);
                sys::close(append).expect("closed");
            }
            8 => {
                let target = offset / 2;
                let from = (offset + MOST / 2) % (expected.len() + 1);
                let len = len
                    .min(expected.len() - from)
                    .min(from.saturating_sub(target));
                let copied = sys::copy_range((fd, from as i64), (fd, target as i64), len);
                let copied = copied.expect("copied") as usize;
                if copied > 0 {
                    let bytes = expected[from..from + copied].to_vec();
                    put(&mut expected, target, &bytes);
                }
            }
            9 => {
                let open = libc::O_RDWR | libc::O_DIRECT;
                let direct_fd = sys::open(&path, open, 0).expect("open for direct I/O");
                let at = offset / PAGE * PAGE;
                direct.copy_from_slice(&random.bytes(PAGE));
                assert_eq!(sys::write_at(direct_fd, direct, at as i64), Ok(PAGE as i64));
                put(&mut expected, at, direct);
                direct.fill(0);
                let count = sys::read_at(direct_fd, direct, at as i64).expect("read directly");
                assert!(direct[..count as usize] == expected[at..at + count as usize]);
                sys::close(direct_fd).expect("closed");
            }
            _ => {
                sys::fsync(fd).expect("synced");
                sys::close(fd).expect("closed");
                fd = sys::open(&path, libc::O_RDWR, 0).expect("opened again");
            }
        }
        let mut bytes = vec![0; expected.len() + 1];
        let size = sys::read_at(fd, &mut bytes, 0).expect("read") as usize;
        assert_eq!(
            size,
            expected.len(),
            "step {step}, {what}: the size differs"
        );
        if let Some(at) = (0..size).find(|at| bytes[*at] != expected[*at]) {
            panic!(
                "step {step}, {what}: byte {at} is {}, not {}",
                bytes[at], expected[at]
            );
        }
        assert_eq!(sys::fstat(fd).expect("stat").st_size, size as i64);
    }
    sys::close(fd).expect("closed");
    sys::unlink(&path).expect("removed");
    println!("{count} operations agree");
}

fn put(expected: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if expected.len() < end {
        expected.resize(end, 0);
    }
    expected[offset..end].copy_from_slice(bytes);
}
