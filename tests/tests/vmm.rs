//! The VMM alone, with a guest that is nothing but a shell: how it ends, what
//! its control socket does, and that its jail holds and hinders nothing.

use std::{
    fs,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{net::UnixListener, process::ExitStatusExt},
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};
use system_tests::guest::{Guest, Plan};
use vmm::{
    config::{DeviceConfig, Resource},
    control::message::{Counters, State},
};

fn disk(path: &Path) -> DeviceConfig {
    DeviceConfig::Blk {
        disk: Resource::Path(path.into()),
        read_only: false,
        serial: String::new(),
    }
}

fn make_disk(path: &Path) -> Result<()> {
    Ok(fs::File::create(path)?.set_len(8 << 20)?)
}

#[test]
fn the_exit_status_tells_how_the_guest_ended() -> Result<()> {
    for (command, code) in [("poweroff -f", 0), ("reboot -f", 3)] {
        let mut guest = Guest::start(Plan::default())?;
        guest.tell(command)?;
        assert_eq!(guest.end()?.code(), Some(code), "{command}");
    }
    Ok(())
}

#[test]
fn a_guest_that_panics_resets() -> Result<()> {
    let mut guest = Guest::start(Plan::default())?;
    guest.tell("echo c > /proc/sysrq-trigger")?;
    let code = guest.end()?.code();
    assert!(matches!(code, Some(3 | 4)), "{code:?}");
    Ok(())
}

#[test]
fn a_killed_vmm_leaves_no_process() -> Result<()> {
    let mut guest = Guest::start(Plan::default())?;
    let pid = guest.vmm().pid();
    guest.vmm().kill()?;
    assert_eq!(guest.end()?.signal(), Some(9));
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    Ok(())
}

#[test]
fn a_paused_guest_stands_still() -> Result<()> {
    let mut guest = Guest::start(Plan {
        cpus: 2,
        ..Plan::default()
    })?;
    let mut control = guest.control()?;
    assert_eq!(control.status()?.state, State::Running);

    control.pause()?;
    assert_eq!(control.status()?.state, State::Paused);
    guest.tell("echo awake")?;
    assert!(!guest.prints_within(Duration::from_millis(500))?);

    control.resume()?;
    assert!(guest.sh("true")?.contains("awake"));
    control.stop()?;
    assert_eq!(guest.end()?.code(), Some(0));
    Ok(())
}

#[test]
fn exits_and_requests_are_counted() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("disk");
    make_disk(&path)?;
    let mut guest = Guest::start(Plan {
        devices: vec![disk(&path)],
        ..Plan::default()
    })?;
    let mut control = guest.control()?;
    let of_disk = |counters: &Counters| {
        let disk = counters.devices.iter().find(|device| device.kind == "blk");
        disk.map(|disk| disk.counted.clone())
            .context("there is no disk")
    };

    let before = of_disk(&control.counters()?)?;
    guest.sh("dd if=/dev/vda of=/dev/null bs=4k count=256 iflag=direct")?;
    let counters = control.counters()?;
    let after = of_disk(&counters)?;

    assert!(after.bytes_to_guest - before.bytes_to_guest >= 256 * 4096);
    assert!(after.requests - before.requests >= 256);
    assert!(counters.exits.values().sum::<u64>() > 0);
    assert!(!counters.trace.is_empty());
    Ok(())
}

#[test]
fn a_disk_comes_and_goes_while_the_guest_runs() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("disk");
    make_disk(&path)?;
    let mut guest = Guest::start(Plan::default())?;
    let mut control = guest.control()?;
    let file = fs::File::options().read(true).write(true).open(&path)?;
    let device = DeviceConfig::Blk {
        disk: Resource::Fd(0),
        read_only: false,
        serial: "later".to_owned(),
    };

    // Without its descriptor it cannot be.
    control.add_device(device.clone(), &[]).unwrap_err();
    let slot = control.add_device(device, &[file.as_fd()])?;
    guest.sh("echo 1 > /sys/bus/pci/rescan")?;
    guest.sh("until [ -b /dev/vda ]; do sleep 0.1; done")?;
    assert_eq!(guest.sh("echo $(cat /sys/block/vda/serial)")?, "later\n");
    guest.sh("echo written by the guest | dd of=/dev/vda bs=512 conv=sync,fsync")?;
    assert!(fs::read(&path)?.starts_with(b"written by the guest"));

    guest.sh("echo 1 > /sys/block/vda/device/../remove")?;
    control.remove_device(slot)?;
    control.remove_device(slot).unwrap_err();
    guest.sh("echo 1 > /sys/bus/pci/rescan; [ ! -b /dev/vda ]")?;
    Ok(())
}

#[test]
fn a_device_of_any_other_kind_can_be_added() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let image = directory.path().join("image");
    fs::File::create(&image)?.set_len(4 << 20)?;
    let socket = UnixListener::bind(directory.path().join("vsock.sock"))?;
    let null = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    let image = fs::File::options().read(true).write(true).open(&image)?;
    let random = fs::File::open("/dev/urandom")?;
    let kinds: [(DeviceConfig, BorrowedFd<'_>); 5] = [
        (
            DeviceConfig::Rng {
                source: Resource::Fd(0),
            },
            random.as_fd(),
        ),
        (DeviceConfig::Balloon { inflate_mib: 0 }, null.as_fd()),
        (
            DeviceConfig::Console {
                output: Resource::Fd(0),
                input: None,
            },
            null.as_fd(),
        ),
        (
            DeviceConfig::Pmem {
                file: Resource::Fd(0),
                read_only: false,
            },
            image.as_fd(),
        ),
        (
            DeviceConfig::Vsock {
                cid: 3,
                listener: Resource::Fd(0),
                guest_ports: Vec::new(),
            },
            socket.as_fd(),
        ),
    ];
    let mut guest = Guest::start(Plan::default())?;
    let mut control = guest.control()?;
    for (device, fd) in kinds {
        control.add_device(device, &[fd])?;
    }
    guest.sh("echo 1 > /sys/bus/pci/rescan")?;
    let devices = control.status()?.devices;
    let unused: Vec<_> = devices.iter().filter(|device| !device.in_use).collect();
    assert!(
        unused.is_empty(),
        "{unused:?}\n{}",
        guest.sh("ls /dev; dmesg | tail -n 20")?
    );
    guest.sh("dd if=/dev/hwrng of=/dev/null bs=64 count=1")?;
    guest.sh("dd if=/dev/zero of=/dev/pmem0 bs=64k count=1 conv=fsync")?;
    Ok(())
}

#[test]
fn a_shared_directory_is_refused_while_the_guest_runs() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = fs::File::open(directory.path())?;
    let mut guest = Guest::start(Plan::default())?;
    let device = DeviceConfig::Fs {
        tag: "late".to_owned(),
        directory: Resource::Fd(0),
        read_only: false,
    };
    let error = guest
        .control()?
        .add_device(device, &[file.as_fd()])
        .unwrap_err();
    assert!(
        error.to_string().contains("from the VM's start on"),
        "{error}"
    );
    guest.sh("true")?;
    Ok(())
}

#[test]
fn every_thread_of_a_running_vm_is_confined() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("disk");
    make_disk(&path)?;
    let shared = directory.path().join("shared");
    fs::create_dir(&shared)?;
    let share = DeviceConfig::Fs {
        tag: "shared".to_owned(),
        directory: Resource::Path(shared.clone()),
        read_only: false,
    };
    let vsock = DeviceConfig::Vsock {
        cid: 3,
        listener: Resource::Path(directory.path().join("vsock.sock")),
        guest_ports: Vec::new(),
    };
    let rng = DeviceConfig::Rng {
        source: Resource::Path("/dev/urandom".into()),
    };
    let balloon = DeviceConfig::Balloon { inflate_mib: 0 };
    let devices = vec![disk(&path), share, vsock, rng, balloon];
    let mut guest = Guest::start(Plan {
        cpus: 2,
        devices,
        ..Plan::default()
    })?;

    assert_eq!(
        confined_threads(guest.vmm().pid())?,
        [
            "bulkhead-vmm",
            "vcpu-0",
            "vcpu-1",
            "virtio-balloon",
            "virtio-blk",
            "virtio-console",
            "virtio-fs",
            "virtio-rng",
            "virtio-vsock",
        ]
    );

    // It works for all that.
    guest.sh("mkdir /mnt/shared; mount -t virtiofs shared /mnt/shared")?;
    guest.sh("echo from the guest > /mnt/shared/file; chown 5:6 /mnt/shared/file")?;
    assert_eq!(fs::read_to_string(shared.join("file"))?, "from the guest\n");
    guest.sh("dd if=/dev/zero of=/dev/vda bs=64k count=16 conv=fsync")?;
    guest.sh("dd if=/dev/hwrng of=/dev/null bs=64 count=4")?;
    Ok(())
}

/// The names of the process's threads, each of which is confined.
fn confined_threads(pid: u32) -> Result<Vec<String>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(entry?.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default()
                .trim_start_matches(':')
                .trim()
                .to_owned()
        };
        let name = field("Name");
        assert_eq!(field("Seccomp:"), "2", "{name}");
        assert_eq!(field("NoNewPrivs"), "1", "{name}");
        assert_eq!(field("CapBnd"), "0000000000000000", "{name}");
        let effective = u64::from_str_radix(&field("CapEff"), 16)?;
        assert_eq!(
            effective != 0,
            name == "virtio-fs",
            "{name}: {effective:#x}"
        );
        assert_eq!(field("CapPrm"), field("CapEff"), "{name}");
        // KVM's own, which runs no code of the process.
        if !name.starts_with("kvm-") {
            threads.push(name);
        }
    }
    threads.sort();
    Ok(threads)
}

#[test]
fn whatever_a_guest_does_with_shared_files_is_within_the_jail() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let share = DeviceConfig::Fs {
        tag: "shared".to_owned(),
        directory: Resource::Path(directory.path().into()),
        read_only: false,
    };
    let mut guest = Guest::start(Plan {
        devices: vec![share],
        ..Plan::default()
    })?;
    guest.sh("mount -t virtiofs shared /mnt && cd /mnt")?;
    for command in [
        "echo one > a; echo two >> a; cat a; wc -c a",
        "truncate -s 100000 a; truncate -s 3 a; fallocate -l 65536 b",
        "chmod 4711 a; chown 12:34 a; touch -d 2001-02-03 a; stat a",
        "ln -s a link; readlink link; chown -h 5:5 link; ln a hard; mkfifo fifo",
        "mkdir -p d/e/f; cp -a a d/e/f/; mv d/e g; find . | wc -l; ls -laR",
        "df .; sync; sync -d a; sync -f a",
        "dd if=/dev/zero of=big bs=1M count=3; dd if=big of=/dev/null bs=64k; rm big",
        "echo x > old; echo y > new; mv new old; cat old",
        "(echo held; rm old; cat) < old; [ ! -e old ]",
        "ls missing; cat missing; rmdir g; mkdir g; true",
        "busybox cp /bin/busybox . && chmod 755 busybox && ./busybox true",
        "rm -rf g d a b link hard fifo busybox; [ -z \"$(ls)\" ]",
        "cd / && umount /mnt && mount -t virtiofs shared /mnt && umount /mnt",
    ] {
        guest.sh(command)?;
    }
    assert_eq!(fs::read_dir(directory.path())?.count(), 0);
    Ok(())
}

#[test]
fn a_vm_without_a_shared_directory_sees_no_file_at_all() -> Result<()> {
    let mut guest = Guest::start(Plan::default())?;
    let pid = guest.vmm().pid();
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root/"))?.count(), 0);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    // Its user is nobody else's.
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let own = 0x7800_0000 + pid;
    assert!(
        status.contains(&format!("Uid:\t{own}\t{own}\t{own}\t{own}\n")),
        "{status}"
    );
    Ok(())
}
