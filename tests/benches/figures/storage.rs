//! Files and disks, beside QEMU: its virtiofsd, and its virtio-blk with io_uring and a thread of
//! its own.
//!
//! There are three parts: a tree of files that is unpacked and read, one large file, and a disk. A
//! guest does each, in a virtual machine of ours and in QEMU's, in turns. It prints what it measured
//! by its own clock. All data is in the host's memory, so that the machines are compared and not a
//! disk. The tree that is unpacked to a shared directory is there as an image too, as memory of the
//! guest; that has no peer but the shared directory.

mod guest;
mod tree;

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::RUNS;
use crate::report::Report;
use guest::{Bench, Disks, Vmm};

/// What the disk and the large file have.
const DISK_BYTES: usize = 64 << 20;

/// How a guest's first process begins. Nothing is printed to a console: its driver spins until the
/// host has taken what it prints, and an emulated processor leaves its fast path at each turn of that.
const BEGIN: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t tmpfs tmp /tmp
b=/bin/busybox
now() { $b adjtimex | $b awk '/tv_sec/ {s=$2} /tv_usec/ {u=$2} END {printf "%d.%06d", s, u}'; }
timed() {
    name=$1; shift
    begin=$(now); "$@"; status=$?; end=$(now)
    echo "time $name $begin $end $status"
}
$b mount -t virtiofs bench /mnt && exec > /mnt/output 2>&1 || $b reboot -f
echo begin
"#;

const END: &str = "
echo done
$b poweroff -f
";

/// `BENCH_TREE` and `BENCH_IMAGE` come by the kernel's command line. The guest forgets by and by
/// what it had in its caches, and tells the host; that is over when reading begins.
const TREE: &str = r#"
$b mkdir /mnt/tree
timed fs.untar $b tar xf "$BENCH_TREE" -C /mnt/tree
echo 3 > /proc/sys/vm/drop_caches
$b sleep 2
cd /mnt/tree
timed fs.read_tree $b tar cf /dev/null directory-0[01]?
if [ -n "$BENCH_IMAGE" ]; then
    $b mount -t erofs -o ro,dax=always "$BENCH_IMAGE" /image
    cd /image
    timed fs.image_read $b tar cf /dev/null directory-0[01]?
fi
cd /
"#;

/// One fio has all jobs, one after the other, because it takes long to start. What is read for the
/// first time goes to memory that the guest has not used before, and costs the host that memory too;
/// what is read again does not, and is asked for again, as each job begins without a cache.
const FILE: &str = r#"
fio="/bin/fio --clocksource=clock_gettime --thread --direct=1 --bs=4k --size=32m --randseed=7 \
    --norandommap --runtime=20 --minimal"
large=--filename=/mnt/large
$fio --ioengine=psync \
    --name=fs.randread --stonewall $large --rw=randread --number_ios=1000 \
    --name=fs.randwrite --stonewall $large --rw=randwrite --number_ios=1000 \
    --name=fs.seqread --stonewall $large --rw=read --bs=128k --direct=0 \
    --name=fs.seqread_again --stonewall $large --rw=read --bs=128k --direct=0 \
    --name=fs.seqwrite --stonewall $large --rw=write --bs=128k --direct=0 \
    || echo fio failed
"#;

/// As [`FILE`]; `BENCH_DISK` comes by the kernel's command line.
const DISK: &str = r#"
fio="/bin/fio --clocksource=clock_gettime --thread --direct=1 --bs=4k --size=32m --randseed=7 \
    --norandommap --runtime=20 --minimal"
disk=--filename=$BENCH_DISK
$fio --ioengine=io_uring \
    --name=blk.randread_qd1 --stonewall $disk --rw=randread --number_ios=1000 \
    --name=blk.randread_qd32 --stonewall $disk --rw=randread --iodepth=32 --number_ios=4000 \
    --name=blk.randwrite_qd1 --stonewall $disk --rw=randwrite --number_ios=1000 \
    --name=blk.randwrite_qd32 --stonewall $disk --rw=randwrite --iodepth=32 --number_ios=4000 \
    --name=blk.seqread_qd1 --stonewall $disk --rw=read --bs=128k \
    --name=blk.seqread_qd32 --stonewall $disk --rw=read --bs=128k --iodepth=32 \
    --name=blk.seqwrite_qd1 --stonewall $disk --rw=write --bs=128k \
    --name=blk.seqwrite_qd32 --stonewall $disk --rw=write --bs=128k --iodepth=32 \
    || echo fio failed
"#;

/// What one part measures, and in what.
type Figures = [(&'static str, &'static str)];

const TREE_FIGURES: &Figures = &[("fs.untar", "s"), ("fs.read_tree", "s")];

const FILE_FIGURES: &Figures = &[
    ("fs.randread", "/s"),
    ("fs.randwrite", "/s"),
    ("fs.seqread", "/s"),
    ("fs.seqread_again", "/s"),
    ("fs.seqwrite", "/s"),
];

const DISK_FIGURES: &Figures = &[
    ("blk.randread_qd1", "/s"),
    ("blk.randread_qd32", "/s"),
    ("blk.randwrite_qd1", "/s"),
    ("blk.randwrite_qd32", "/s"),
    ("blk.seqread_qd1", "/s"),
    ("blk.seqread_qd32", "/s"),
    ("blk.seqwrite_qd1", "/s"),
    ("blk.seqwrite_qd32", "/s"),
];

/// The tree: one guest of each, as that takes minutes and their clocks repeat.
pub(crate) fn tree(report: &mut Report) -> Result<()> {
    let guests = Guests {
        script: TREE,
        files: tree::FILES,
        turns: 1,
    };
    let (ours, peer) = guests.run()?;
    compare(report, TREE_FIGURES, "qemu virtiofsd", (&ours, &peer))?;
    let shared = ("virtio-fs", ours.of("fs.read_tree")?);
    report.compare(("fs.image_read", "s"), ours.of("fs.image_read")?, shared);
    report.remark(format!(
        "fs.untar: {} files, fs.read_tree: {} of them; ratios of seconds should be below 1; \
         fs.image_read: the same as an image in memory, beside the shared directory",
        tree::FILES,
        tree::READ_FILES
    ));
    Ok(())
}

/// A large file in a shared directory.
pub(crate) fn file(report: &mut Report) -> Result<()> {
    let (ours, peer) = Guests::with(FILE).run()?;
    compare(report, FILE_FIGURES, "qemu virtiofsd", (&ours, &peer))
}

/// A disk.
pub(crate) fn disk(report: &mut Report) -> Result<()> {
    let (ours, peer) = Guests::with(DISK).run()?;
    compare(report, DISK_FIGURES, "qemu virtio-blk", (&ours, &peer))
}

fn compare(
    report: &mut Report,
    figures: &Figures,
    by: &'static str,
    (ours, peer): (&Measured, &Measured),
) -> Result<()> {
    for (name, unit) in figures {
        report.compare((name, unit), ours.of(name)?, (by, peer.of(name)?));
    }
    Ok(())
}

/// What the guests of one part do.
struct Guests {
    script: &'static str,
    /// How many files are there to be unpacked.
    files: usize,
    /// How many guests there are of each.
    turns: usize,
}

impl Guests {
    /// Those that unpack nothing.
    fn with(script: &'static str) -> Self {
        Self {
            script,
            files: tree::FILES_PER_DIRECTORY,
            turns: RUNS,
        }
    }

    /// What ours and what QEMU's measured.
    fn run(&self) -> Result<(Measured, Measured)> {
        let dir = tempfile::tempdir_in("/dev/shm")?;
        let path = |name| dir.path().join(name);
        let disks = Disks {
            tree: path("tree.tar"),
            disk: path("disk"),
            image: path("tree.erofs"),
        };
        tree::archive(&disks.tree, self.files)?;
        tree::image(dir.path(), &disks.image, self.files.min(tree::READ_FILES))?;
        fs::write(&disks.disk, vec![0xa5; DISK_BYTES])?;
        let script = [BEGIN, self.script, END].concat();
        let bench = Bench::new(dir.path(), &script, disks)?;
        let (mut ours, mut peer) = (Measured::default(), Measured::default());
        for _ in 0..self.turns {
            ours.add(&run(&bench, Vmm::Ours)?)?;
            peer.add(&run(&bench, Vmm::Qemu)?)?;
        }
        Ok((ours, peer))
    }
}

/// Runs the guest with a fresh shared directory and returns what it printed.
fn run(bench: &Bench, vmm: Vmm) -> Result<String> {
    let shared = tempfile::tempdir_in("/dev/shm")?;
    fs::write(shared.path().join("large"), vec![0x5a; DISK_BYTES])?;
    let started = std::time::Instant::now();
    let ended = bench.run(vmm, shared.path());
    let printed = fs::read_to_string(shared.path().join("output"))
        .with_context(|| format!("the guest tells nothing, and its console {ended:?}"))?;
    ended.with_context(|| format!("the guest got so far: {printed}"))?;
    eprintln!("storage: {vmm:?} took {:.1?}", started.elapsed());
    ensure!(
        printed.contains("\ndone"),
        "the guest has not done all of its work: {printed}"
    );
    Ok(printed)
}

/// What was measured, by name.
#[derive(Default)]
struct Measured(BTreeMap<String, Vec<f64>>);

impl Measured {
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
            } else if let Some(line) = line.strip_prefix("3;fio-") {
                let fields: Vec<&str> = line.split(';').collect();
                // fio's terse format, version 3: operations a second of reads and of writes
                let (Some(name), Some(error)) = (fields.get(1), fields.get(3)) else {
                    continue;
                };
                ensure!(*error == "0", bad());
                let at = if name.contains("write") { 47 } else { 6 };
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
