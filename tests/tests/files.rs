//! A directory of the host as a guest finds it.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use system_tests::{
    guest::{Guest, Plan},
    host::sh,
    scratch,
};
use tempfile::TempDir;
use vmm::config::{DeviceConfig, Resource};

/// A guest that has mounted a directory on /mnt.
fn share(read_only: bool) -> Result<(TempDir, Guest)> {
    let directory = scratch::directory()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    fs::write(directory.path().join("greeting"), "from the host\n")?;
    let share = DeviceConfig::Fs {
        tag: "files".to_owned(),
        directory: Resource::Path(directory.path().into()),
        read_only,
    };
    let mut guest = Guest::start(Plan {
        devices: vec![share],
        ..Plan::default()
    })?;
    guest.sh("mkdir -p /mnt /tmp && mount -t virtiofs files /mnt")?;
    Ok((directory, guest))
}

fn mode_and_owner(path: &Path) -> Result<(u32, u32, u32)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()))
}

#[test]
fn the_guest_works_with_files_as_on_its_own_disk() -> Result<()> {
    let (directory, mut guest) = share(false)?;
    let root = directory.path();
    assert_eq!(guest.sh("cat /mnt/greeting")?, "from the host\n");

    // Written, read back without the cache, and moved.
    guest.sh("dd if=/dev/urandom of=/mnt/big bs=256k count=12")?;
    let sum = guest.sh("md5sum < /mnt/big")?;
    guest.sh("echo 3 > /proc/sys/vm/drop_caches")?;
    assert_eq!(guest.sh("md5sum < /mnt/big")?, sum);
    guest.sh("mkdir -p /mnt/a/b && mv /mnt/big /mnt/a/b/moved && [ ! -e /mnt/big ]")?;
    assert_eq!(fs::metadata(root.join("a/b/moved"))?.len(), 3 << 20);

    // Cut, appended to, linked, owned.
    guest.sh("truncate -s 5 /mnt/greeting; echo more >> /mnt/greeting")?;
    assert_eq!(fs::read_to_string(root.join("greeting"))?, "from more\n");
    guest.sh("ln /mnt/greeting /mnt/hard; ln -s greeting /mnt/soft; cat /mnt/soft")?;
    assert_eq!(fs::metadata(root.join("hard"))?.nlink(), 2);
    assert_eq!(fs::read_link(root.join("soft"))?, Path::new("greeting"));
    guest.sh("chown 12:34 /mnt/hard && chmod 4751 /mnt/hard")?;
    assert_eq!(mode_and_owner(&root.join("greeting"))?, (0o4751, 12, 34));

    // A pipe is the guest's own, a device is no one's.
    assert_eq!(
        guest.sh("mkfifo /mnt/p; echo through > /mnt/p & cat /mnt/p")?,
        "through\n"
    );
    guest.sh("! mknod /mnt/device b 8 0")?;

    // Programs run from it, and many names are listed.
    guest.sh("cp /bin/busybox /mnt/busybox; /mnt/busybox true")?;
    guest.sh("for i in $(seq 30); do echo $i > /mnt/a/$i; done")?;
    assert_eq!(guest.sh("ls /mnt/a | wc -l")?.trim(), "31");
    guest.sh("rm -r /mnt/a")?;
    assert!(!root.join("a").exists());

    // All that holds after it was mounted anew.
    guest.sh("umount /mnt && mount -t virtiofs files /mnt && /mnt/busybox true")?;
    Ok(())
}

#[test]
fn what_the_host_changes_the_guest_sees_change() -> Result<()> {
    let (directory, mut guest) = share(false)?;
    let file = directory.path().join("greeting");
    let read = "sleep 1.1; cat /mnt/greeting";
    assert_eq!(guest.sh("cat /mnt/greeting")?, "from the host\n");

    fs::write(&file, "changed\n")?;
    assert_eq!(guest.sh(read)?, "changed\n");

    let other = directory.path().join("other");
    fs::write(&other, "put in its place\n")?;
    fs::rename(&other, &file)?;
    assert_eq!(guest.sh(read)?, "put in its place\n");

    fs::remove_file(&file)?;
    guest.sh("sleep 1.1; [ ! -e /mnt/greeting ]")?;
    fs::write(&file, "again\n")?;
    assert_eq!(guest.sh(read)?, "again\n");

    assert_eq!(guest.sh("ls /mnt")?, "greeting\n");
    fs::write(directory.path().join("second"), "")?;
    assert_eq!(guest.sh("sleep 1.1; echo $(ls /mnt)")?, "greeting second\n");
    Ok(())
}

#[test]
fn a_link_leads_into_the_guests_own_files_and_not_the_hosts() -> Result<()> {
    let (directory, mut guest) = share(false)?;
    let secret = tempfile::NamedTempFile::new()?;
    fs::write(secret.path(), "the host's")?;
    symlink(secret.path(), directory.path().join("out"))?;
    guest.sh("[ -L /mnt/out ] && ! cat /mnt/out")?;
    guest.sh("[ \"$(ls -a /mnt/..)\" = \"$(ls -a /)\" ]")?;
    Ok(())
}

#[test]
fn a_read_only_directory_stays_as_it_is() -> Result<()> {
    let (directory, mut guest) = share(true)?;
    assert_eq!(guest.sh("cat /mnt/greeting")?, "from the host\n");
    for change in [
        "echo x > /mnt/new",
        "echo x >> /mnt/greeting",
        "rm /mnt/greeting",
        "mkdir /mnt/directory",
        "mv /mnt/greeting /mnt/moved",
        "ln /mnt/greeting /mnt/hard",
        "chmod 777 /mnt/greeting",
        "touch /mnt/greeting",
    ] {
        guest.sh(&format!(
            "! {{ {change}; }} 2> /tmp/error && grep -q Read-only /tmp/error"
        ))?;
    }
    assert_eq!(fs::read_dir(directory.path())?.count(), 1);
    let greeting = directory.path().join("greeting");
    assert_eq!(fs::read_to_string(greeting)?, "from the host\n");
    Ok(())
}

/// Differences between a share and a disk that are meant; see docs/decisions/0030.
const MEANT: [&str; 2] = ["device node", "trusted"];

#[test]
fn each_call_gives_what_it_gives_on_a_disk() -> Result<()> {
    let directory = scratch::directory()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let program = scratch::program(env!("CARGO_BIN_EXE_fs-check"), directory.path())?;
    let disk = scratch::ext4(128 << 20)?;
    let mut guest = Guest::start(Plan {
        devices: vec![
            DeviceConfig::Fs {
                tag: "files".to_owned(),
                directory: Resource::Path(directory.path().into()),
                read_only: false,
            },
            DeviceConfig::Blk {
                disk: Resource::Path(disk.path().into()),
                read_only: false,
                serial: String::new(),
            },
        ],
        ..Plan::default()
    })?;
    guest.sh(
        "mkdir -p /mnt /disk /tmp && mount -t virtiofs files /mnt && mount -t ext4 /dev/vda /disk",
    )?;
    guest.sh("mkdir -p /mnt/rules /disk/rules")?;
    let run = |arguments: &str| format!("{} {arguments}", program.command("/mnt"));

    let on_disk = guest.sh(&run("rules /disk/rules"))?;
    let on_share = guest.sh(&run("rules /mnt/rules"))?;
    let mut section = "";
    let mut differences = Vec::new();
    ensure!(on_disk.lines().count() == on_share.lines().count());
    for (disk, share) in on_disk.lines().zip(on_share.lines()) {
        if disk.starts_with('#') {
            section = disk;
        } else if disk != share && !MEANT.contains(&disk.split(':').next().unwrap_or(disk)) {
            differences.push(format!("{section}: {share:?} instead of {disk:?}"));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    ensure!(on_share.lines().count() > 300, "{on_share}");

    for seed in [1, 2] {
        guest.sh(&run(&format!("random /mnt {seed} 150")))?;
    }
    guest.sh(&run("listing /mnt 400"))?;
    Ok(())
}

/// A directory below which what is mounted spreads to copies of its mount; it is unmounted at last.
struct Shared(TempDir);

impl Shared {
    fn new() -> Result<Self> {
        let none: Option<&str> = None;
        let shared = Self(scratch::directory()?);
        let path = shared.0.path();
        mount(Some(path), path, none, MsFlags::MS_BIND, none)?;
        mount(none, path, none, MsFlags::MS_PRIVATE, none)?;
        mount(none, path, none, MsFlags::MS_SHARED, none)?;
        Ok(shared)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // What is below goes with it; there is nobody to tell.
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn mounts_come_and_go_while_the_guest_runs() -> Result<()> {
    let none: Option<&str> = None;
    let shared = Shared::new()?;
    let volume = shared.path("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("below"), "")?;
    let disk = scratch::ext4(16 << 20)?;
    let mut guest = Guest::start(Plan {
        devices: vec![DeviceConfig::Fs {
            tag: "files".to_owned(),
            directory: Resource::Path(shared.path("")),
            read_only: false,
        }],
        ..Plan::default()
    })?;
    guest.sh("mkdir -p /mnt /tmp && mount -t virtiofs files /mnt && ls /mnt/volume/below")?;

    // A disk of the host's, by loop device, appears in place of what is there.
    let device = scratch::Loop::new(disk.path())?;
    mount(
        Some(device.path()),
        &volume,
        Some("ext4"),
        MsFlags::empty(),
        none,
    )?;
    fs::write(volume.join("file"), "mounted\n")?;
    guest.sh("sleep 1.1; [ ! -e /mnt/volume/below ] && cat /mnt/volume/file")?;
    assert_eq!(
        guest.sh("stat -f -c %S /mnt/volume")?,
        guest.sh("stat -f -c %S /mnt/volume/file")?
    );
    guest.sh("find /mnt > /dev/null")?;
    guest.sh("exec 5<>/mnt/volume/file; echo written >&5; cat /mnt/volume/file")?;

    // In use, so only lazily; the guest has errors then and nothing hangs.
    umount2(&volume, MntFlags::MNT_DETACH)?;
    assert_eq!(guest.sh("sleep 1.1; ls /mnt/volume")?, "below\n");
    guest.sh("! sh -c 'echo more >&5' 2> /tmp/error && grep -q Stale /tmp/error")?;
    guest.sh("exec 5>&-; true")?;
    // Nothing holds the disk: it can go.
    device.detach().context("the disk is still in use")?;
    Ok(())
}

#[test]
fn volumes_that_are_swapped_by_a_link_are_seen_within_a_second() -> Result<()> {
    let (directory, mut guest) = share(false)?;
    let volume = directory.path().join("config");
    let publish = |generation: u32| -> Result<()> {
        // As kubelet does it: a new directory, a new link, and one rename.
        let data = volume.join(format!("..{generation}"));
        fs::create_dir_all(&data)?;
        fs::write(data.join("key"), format!("value {generation}\n"))?;
        symlink(format!("..{generation}"), volume.join("..data_tmp"))?;
        fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
        if generation > 1 {
            fs::remove_dir_all(volume.join(format!("..{}", generation - 1)))?;
        }
        Ok(())
    };
    fs::create_dir(&volume)?;
    publish(1)?;
    symlink("..data/key", volume.join("key"))?;
    assert_eq!(guest.sh("cat /mnt/config/key")?, "value 1\n");
    for generation in 2..5 {
        publish(generation)?;
        let read = "sleep 1; cat /mnt/config/key; ls /mnt/config";
        assert_eq!(guest.sh(read)?, format!("value {generation}\nkey\n"));
    }
    Ok(())
}

#[test]
fn a_full_disk_is_an_error_of_the_write() -> Result<()> {
    let shared = Shared::new()?;
    let small = shared.path("small");
    fs::create_dir(&small)?;
    mount(
        Some("small"),
        &small,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=256k,nr_inodes=6"),
    )?;
    let mut guest = Guest::start(Plan {
        devices: vec![DeviceConfig::Fs {
            tag: "files".to_owned(),
            directory: Resource::Path(small.clone()),
            read_only: false,
        }],
        ..Plan::default()
    })?;
    guest.sh("mkdir -p /mnt /tmp && mount -t virtiofs files /mnt")?;
    guest.sh("! dd if=/dev/zero of=/mnt/big bs=64k count=16 2> /tmp/error && grep -q 'No space' /tmp/error")?;
    guest.sh("rm /mnt/big; touch /mnt/1 /mnt/2 /mnt/3 && ! touch /mnt/4 /mnt/5 /mnt/6 2> /tmp/error && grep -q 'No space' /tmp/error")?;
    guest.sh("rm /mnt/*; echo fits > /mnt/small; cat /mnt/small")?;
    drop(guest);
    umount2(&small, MntFlags::MNT_DETACH)?;
    Ok(())
}

/// An overlay whose directories get other numbers whenever the host forgets them.
struct Overlay(TempDir);

impl Overlay {
    fn new() -> Result<Self> {
        let made = Self(scratch::directory()?);
        let top = made.0.path().display();
        sh(&format!(
            "cd {top}; mkdir -p low/a/b low/c memory merged; mount -t tmpfs none memory; \
             mkdir memory/up memory/work; mount -t overlay none \
             -o lowerdir=low,upperdir=memory/up,workdir=memory/work,xino=off merged"
        ))?;
        Ok(made)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("merged")
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        for name in ["merged", "memory"] {
            let _ = umount2(&self.0.path().join(name), MntFlags::MNT_DETACH);
        }
    }
}

#[test]
fn a_directory_that_the_host_forgot_and_numbers_anew_is_the_same() -> Result<()> {
    let overlay = Overlay::new()?;
    let numbers = || -> Result<Vec<u64>> {
        let names = ["a", "a/b", "c"].iter();
        names
            .map(|name| Ok(fs::metadata(overlay.path().join(name))?.ino()))
            .collect()
    };
    let forget = || sh("sync; echo 3 > /proc/sys/vm/drop_caches");
    let before = numbers()?;
    forget()?;
    ensure!(
        numbers()? != before,
        "the overlay's numbers stay, so this shows nothing"
    );
    let mut guest = Guest::start(Plan {
        devices: vec![DeviceConfig::Fs {
            tag: "files".to_owned(),
            directory: Resource::Path(overlay.path()),
            read_only: false,
        }],
        ..Plan::default()
    })?;
    guest.sh("mkdir -p /mnt && mount -t virtiofs files /mnt; \
         for d in /mnt/a/b /mnt/c; do mount -t tmpfs none $d && touch $d/inside; done")?;
    for _ in 0..2 {
        forget()?;
        assert_eq!(
            guest.sh("sleep 1.2; cat /mnt/* 2> /dev/null; echo /mnt/a/b/* /mnt/c/*")?,
            "/mnt/a/b/inside /mnt/c/inside\n"
        );
    }
    Ok(())
}
