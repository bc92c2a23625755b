//! Files and disks, beside QEMU: its virtiofsd, and its virtio-blk with io_uring and a thread of
//! its own.
//!
//! One guest does everything, once in a virtual machine of ours and once in QEMU's, in turns. It
//! prints what it measured by its own clock. All data is in the host's memory, so that the
//! machines are compared and not a disk.

mod guest;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::report::Report;
use guest::{Bench, Vmm};

/// Files of the tree that is unpacked: a twentieth of what a tree of sources has, as the lab's
/// processor is emulated twice.
const FILES: usize = 1_000;
/// Guests of each that are measured; their clocks repeat, and each takes minutes in the lab.
const TURNS: usize = 1;
/// How many there are in a directory.
const FILES_PER_DIRECTORY: usize = 100;
/// Their sizes in turn, 3 KiB on average.
const SIZES: [usize; 5] = [500, 1000, 2000, 4000, 8000];

/// What the disk and the large file have.
const DISK_BYTES: usize = 64 << 20;

/// The guest's first process. `BENCH_TREE` and `BENCH_DISK` come by the kernel's command line.
const SCRIPT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t tmpfs tmp /tmp
/bin/busybox mount -t virtiofs bench /mnt
exec > /dev/hvc0 2>&1
b=/bin/busybox
now() { read -r up _ < /proc/uptime; echo "$up"; }
timed() {
    name=$1; shift
    begin=$(now); "$@"; status=$?; end=$(now)
    echo "time $name $begin $end $status"
}
job() {
    name=$1; shift
    /bin/fio --name="$name" --thread --ioengine=psync --direct=1 --bs=4k --randseed=7 --norandommap \
        --minimal "$@" > /tmp/out 2>/tmp/err || $b cat /tmp/err
    $b sed "s/^/fio /" /tmp/out
}
$b mkdir /mnt/tree
timed fs.untar $b tar xf "$BENCH_TREE" -C /mnt/tree
echo 3 > /proc/sys/vm/drop_caches
timed fs.read_tree $b tar cf /dev/null -C /mnt/tree .
job fs.randread --filename=/mnt/large --rw=randread --number_ios=1000 --size=64m
job fs.randwrite --filename=/mnt/large --rw=randwrite --number_ios=1000 --size=64m
job fs.seqread --filename=/mnt/large --rw=read --bs=128k --direct=0 --size=32m
job blk.randread_qd1 --filename="$BENCH_DISK" --rw=randread --ioengine=io_uring --iodepth=1 --number_ios=1000
job blk.randread_qd32 --filename="$BENCH_DISK" --rw=randread --ioengine=io_uring --iodepth=32 --number_ios=4000
job blk.randwrite_qd1 --filename="$BENCH_DISK" --rw=randwrite --ioengine=io_uring --iodepth=1 --number_ios=1000
job blk.seqread --filename="$BENCH_DISK" --rw=read --bs=128k --ioengine=io_uring --iodepth=4 --size=32m
echo done
$b reboot -f
"#;

/// Takes [`TURNS`] of each, in turns.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let tree = dir.path().join("tree.tar");
    write_tree(&tree)?;
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0xa5; DISK_BYTES])?;
    let bench = Bench::new(dir.path(), SCRIPT, &tree, &disk)?;
    let (mut ours, mut peer) = (Figures::default(), Figures::default());
    for _ in 0..TURNS {
        ours.add(&run(&bench, Vmm::Ours)?)?;
        peer.add(&run(&bench, Vmm::Qemu)?)?;
    }
    for (name, unit) in [
        ("fs.untar", "s"),
        ("fs.read_tree", "s"),
        ("fs.randread", "/s"),
        ("fs.randwrite", "/s"),
        ("fs.seqread", "/s"),
        ("blk.randread_qd1", "/s"),
        ("blk.randread_qd32", "/s"),
        ("blk.randwrite_qd1", "/s"),
        ("blk.seqread", "/s"),
    ] {
        let by = match name.starts_with("fs.") {
            true => "qemu virtiofsd",
            false => "qemu virtio-blk",
        };
        report.compare((name, unit), ours.of(name)?, (by, peer.of(name)?));
    }
    report.remark(format!(
        "fs.untar: {FILES} files; ratios of seconds should be below 1, of operations a second above"
    ));
    Ok(())
}

/// Runs the guest with a fresh shared directory and returns what it printed.
fn run(bench: &Bench, vmm: Vmm) -> Result<String> {
    let shared = tempfile::tempdir_in("/dev/shm")?;
    fs::write(shared.path().join("large"), vec![0x5a; DISK_BYTES])?;
    let started = std::time::Instant::now();
    let printed = bench.run(vmm, shared.path())?;
    eprintln!("storage: {vmm:?} took {:?}:\n{printed}", started.elapsed());
    let unpacked = fs::read_dir(shared.path().join("tree"))?.count();
    ensure!(
        unpacked == FILES / FILES_PER_DIRECTORY && printed.contains("\ndone"),
        "the guest has not done all of its work: {printed}"
    );
    Ok(printed)
}

/// What was measured, by name.
#[derive(Default)]
struct Figures(BTreeMap<String, Vec<f64>>);

impl Figures {
    /// Adds what one guest printed.
    fn add(&mut self, printed: &str) -> Result<()> {
        for line in printed.lines() {
            let bad = || format!("the guest printed {line:?}");
            let (name, value) = if let Some(line) = line.strip_prefix("time ") {
                let words: Vec<&str> = line.split_whitespace().collect();
                let [name, begin, end, "0"] = words[..] else {
                    anyhow::bail!(bad());
                };
                let begin: f64 = begin.parse().with_context(bad)?;
                (name, end.parse::<f64>().with_context(bad)? - begin)
            } else if let Some(line) = line.strip_prefix("fio ") {
                let fields: Vec<&str> = line.split(';').collect();
                // fio's terse format, version 3: operations a second of reads and of writes
                let (Some(name), Some(error)) = (fields.get(2), fields.get(4)) else {
                    continue;
                };
                ensure!(*error == "0", bad());
                let at = if name.contains("write") { 48 } else { 7 };
                let value = fields.get(at).with_context(bad)?;
                (*name, value.parse().with_context(bad)?)
            } else {
                continue;
            };
            self.0.entry(name.to_owned()).or_default().push(value);
        }
        Ok(())
    }

    fn of(&self, name: &str) -> Result<&[f64]> {
        let figures = self.0.get(name);
        Ok(figures.with_context(|| format!("no guest measured {name}"))?)
    }
}

/// An archive of [`FILES`] files.
fn write_tree(path: &Path) -> Result<()> {
    let mut archive = std::io::BufWriter::new(File::create(path)?);
    let contents: Vec<u8> = (0..SIZES[4]).map(|i| (i * 7) as u8).collect();
    for i in 0..FILES {
        let directory = format!("directory-{:03}", i / FILES_PER_DIRECTORY);
        if i % FILES_PER_DIRECTORY == 0 {
            archive.write_all(&header(&format!("{directory}/"), 0, b'5')?)?;
        }
        let size = SIZES[i % SIZES.len()];
        archive.write_all(&header(&format!("{directory}/file-{i:05}"), size, b'0')?)?;
        archive.write_all(&contents[..size])?;
        archive.write_all(&[0; 512][..size.next_multiple_of(512) - size])?;
    }
    archive.write_all(&[0; 1024])?;
    Ok(archive.flush()?)
}

/// A head in the format of POSIX (ustar).
fn header(name: &str, size: usize, kind: u8) -> Result<[u8; 512]> {
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(
        100,
        if kind == b'5' {
            b"0000755\0"
        } else {
            b"0000644\0"
        },
    );
    put(108, b"0001750\0");
    put(116, b"0001750\0");
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, b"14000000000\0");
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}
