//! A directory of the host as a guest finds it.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use anyhow::Result;
use system_tests::guest::{Guest, Plan};
use tempfile::TempDir;
use vmm::config::{DeviceConfig, Resource};

/// A guest that has mounted a directory on /mnt.
fn share(read_only: bool) -> Result<(TempDir, Guest)> {
    let directory = tempfile::tempdir()?;
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
