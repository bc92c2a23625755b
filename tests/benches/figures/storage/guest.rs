//! A guest that runs a script, in a virtual machine of ours or of QEMU's.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rootfs_builder::erofs;
use rootfs_builder::tree::{Node, Tree};
use serde_json::json;
use system_tests::guest::{bin, share};

/// Whose virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vmm {
    Ours,
    Qemu,
}

/// Enough memory that nothing is measured of the guest's lack of it.
const MEMORY_MIB: u64 = 512;

/// How long one guest may take.
const PATIENCE: Duration = Duration::from_secs(150);

/// A guest and its disks.
pub(super) struct Bench {
    dir: PathBuf,
    root: PathBuf,
    disks: Disks,
}

/// The files that are disks of the guest.
pub(super) struct Disks {
    /// An archive, read-only.
    pub(super) tree: PathBuf,
    /// What is read and written.
    pub(super) disk: PathBuf,
    /// An EROFS image; in our guest, it is memory.
    pub(super) image: PathBuf,
}

impl Bench {
    /// A guest of busybox and fio whose first process is `script`; everything is put into `dir`.
    pub(super) fn new(dir: &Path, script: &str, disks: Disks) -> Result<Self> {
        Ok(Self {
            dir: dir.to_owned(),
            root: image(dir, script)?,
            disks,
        })
    }

    /// Runs it to its end with `shared` as its directory, and returns what it printed.
    pub(super) fn run(&self, vmm: Vmm, shared: &Path) -> Result<String> {
        let output = self.dir.join("output");
        File::create(&output)?;
        let mut progress = Progress::of(vmm, shared);
        match vmm {
            Vmm::Ours => self.ours(shared, &output, &mut progress)?,
            Vmm::Qemu => self.qemu(shared, &output, &mut progress)?,
        }
        fs::read_to_string(&output).context("cannot read what the guest printed")
    }

    fn ours(&self, shared: &Path, output: &Path, progress: &mut Progress) -> Result<()> {
        let path = |path: &Path| json!({ "path": path });
        let cmdline = shim::sandbox::cmdline();
        let config = json!({
            "boot": {
                "kernel": path(&share("vmlinux")?),
                "image": path(&self.root),
                "cmdline": format!("{cmdline} {CMDLINE}"),
            },
            "memory_mib": MEMORY_MIB,
            "devices": [
                {"kind": "console", "output": path(output)},
                {"kind": "fs", "tag": "bench", "directory": path(shared)},
                {"kind": "blk", "disk": path(&self.disks.tree), "read_only": true},
                {"kind": "blk", "disk": path(&self.disks.disk)},
                {"kind": "pmem", "file": path(&self.disks.image), "read_only": true},
            ],
        });
        let file = self.dir.join("ours.json");
        serde_json::to_writer(File::create(&file)?, &config)?;
        let mut command = Command::new(bin("bulkhead-vmm")?);
        command.arg("--config").arg(&file).stdin(Stdio::null());
        let vmm = command.spawn().context("cannot start bulkhead-vmm")?;
        finish(Running(vmm), progress)
    }

    /// QEMU's microvm with PCI, as its devices need fewest exits there.
    fn qemu(&self, shared: &Path, output: &Path, progress: &mut Progress) -> Result<()> {
        let socket = self.dir.join("virtiofsd.sock");
        let _ = fs::remove_file(&socket);
        let mut daemon = Command::new("/usr/lib/qemu/virtiofsd");
        daemon
            .arg(format!("--socket-path={}", socket.display()))
            .args(["-o", &format!("source={}", shared.display())])
            .args(["-o", "sandbox=chroot", "-o", "cache=auto", "-o", "xattr"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(self.dir.join("virtiofsd.log"))?);
        let _daemon = Running(daemon.spawn().context("cannot start virtiofsd")?);
        let started = Instant::now();
        while !socket.exists() {
            ensure!(started.elapsed() < PATIENCE, "virtiofsd makes no socket");
            std::thread::sleep(Duration::from_millis(10));
        }

        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-m",
            &MEMORY_MIB.to_string(),
        ])
        .args([
            "-M",
            "microvm,pcie=on,rtc=on,pit=off,isa-serial=off,memory-backend=ram",
        ])
        .arg("-object")
        .arg(format!(
            "memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on"
        ))
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(share("vmlinux")?)
        .args(["-append", QEMU_CMDLINE])
        .args(["-object", "iothread,id=io"]);
        qemu.arg("-chardev")
            .arg(format!("file,id=out,path={}", output.display()));
        qemu.args([
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtconsole,chardev=out",
        ]);
        for (id, file, more) in [
            ("root", &self.root, "readonly=on"),
            ("tree", &self.disks.tree, "readonly=on"),
            ("disk", &self.disks.disk, "readonly=off"),
        ] {
            let file = file.display();
            qemu.arg("-drive").arg(format!(
                "id={id},if=none,format=raw,aio=io_uring,{more},file={file}"
            ));
            qemu.arg("-device")
                .arg(format!("virtio-blk-pci,drive={id},iothread=io"));
        }
        qemu.arg("-chardev")
            .arg(format!("socket,id=fs,path={}", socket.display()));
        qemu.args([
            "-device",
            "vhost-user-fs-pci,chardev=fs,tag=bench,queue-size=512",
        ]);
        qemu.stdin(Stdio::null());
        finish(
            Running(qemu.spawn().context("cannot start QEMU")?),
            progress,
        )
    }
}

const CMDLINE: &str = "BENCH_TREE=/dev/vda BENCH_DISK=/dev/vdb BENCH_IMAGE=/dev/pmem1";

const QEMU_CMDLINE: &str = "quiet console=ttynull 8250.nr_uarts=0 panic=-1 reboot=t \
     root=/dev/vda rootfstype=erofs ro init=/init BENCH_TREE=/dev/vdb BENCH_DISK=/dev/vdc";

/// A process that is killed and reaped when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for a guest that powers off when it has done what it should; one that panics resets.
fn finish(mut vmm: Running, progress: &mut Progress) -> Result<()> {
    let started = Instant::now();
    loop {
        progress.show();
        if let Some(status) = vmm.0.try_wait()? {
            ensure!(status.code() == Some(0), "the guest ended badly: {status}");
            return Ok(());
        }
        ensure!(started.elapsed() < PATIENCE, "the guest does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What a guest prints, shown as it comes.
struct Progress {
    vmm: Vmm,
    output: PathBuf,
    shown: usize,
    started: Instant,
}

impl Progress {
    fn of(vmm: Vmm, shared: &Path) -> Self {
        Self {
            vmm,
            output: shared.join("output"),
            shown: 0,
            started: Instant::now(),
        }
    }

    /// Shows the lines that came since the last call.
    fn show(&mut self) {
        // at first it is not there
        let printed = fs::read_to_string(&self.output).unwrap_or_default();
        let new = printed.get(self.shown..).unwrap_or_default();
        let Some(end) = new.rfind('\n') else {
            return;
        };
        for line in new[..end].lines() {
            let (vmm, after) = (self.vmm, self.started.elapsed());
            // fio's lines have a hundred fields
            eprintln!("storage: {vmm:?} after {after:.1?}: {line:.60}");
        }
        self.shown += end + 1;
    }
}

/// A root file system of busybox, fio with its libraries, and the script.
fn image(dir: &Path, script: &str) -> Result<PathBuf> {
    let init = dir.join("init");
    fs::write(&init, script)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let mut tree = Tree::new();
    for path in [
        "bin", "dev", "image", "lib", "lib64", "mnt", "proc", "sys", "tmp",
    ] {
        tree.add(path, Node::Directory { mode: 0o755 })?;
    }
    let mut program = |to: &str, source: &Path| {
        let source = fs::canonicalize(source)?;
        tree.add(
            to,
            Node::File {
                mode: 0o755,
                source,
            },
        )?;
        anyhow::Ok(())
    };
    program("init", &init)?;
    program("bin/busybox", Path::new("/bin/busybox"))?;
    program("bin/fio", Path::new("/usr/bin/fio"))?;
    let libraries = Command::new("ldd")
        .arg("/usr/bin/fio")
        .output()
        .context("cannot run ldd")?;
    for word in String::from_utf8(libraries.stdout)?.split_whitespace() {
        let path = Path::new(word);
        let Some(name) = path.file_name().filter(|_| path.is_absolute()) else {
            continue;
        };
        let name = name.to_string_lossy();
        // the loader's own directory, and the one where it looks for all others
        let to = if name.starts_with("ld-linux") {
            "lib64"
        } else {
            "lib"
        };
        program(&format!("{to}/{name}"), path)?;
    }
    let image = dir.join("bench.img");
    erofs::build(&tree, [0; 16], &image)?;
    Ok(image)
}
