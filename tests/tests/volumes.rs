//! What a container has of the host besides its root: files that the host changes, mounts within
//! mounts, memory with a size, and what happens when any of it is full or gone.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use system_tests::{
    client::command,
    container::{Bundle, Run},
    scratch,
};

/// How soon the container must see what the host changed: a second, as what it remembers is valid
/// for less (`vmm`'s own tests), and what a machine that is busy with others needs for a command.
const SOON: Duration = Duration::from_secs(10);

fn sh(script: &str) -> Result<()> {
    command::run(Command::new("sh").args(["-ec", script]))?.text()?;
    Ok(())
}

/// A mount of the configuration.
fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

/// A shell in a container, which is told line by line.
struct Shell(Run);

impl Shell {
    /// Runs a script and returns what it printed.
    fn say(&mut self, script: &str) -> Result<String> {
        let stdin = self.0.child.stdin.as_mut().context("no stdin")?;
        writeln!(stdin, "{{ {script}\n}} 2>&1; echo; echo said")?;
        Ok(self.0.lines_until("said")?.join("\n").trim_end().to_owned())
    }

    /// Asks until the answer is the one that is wanted.
    fn soon(&mut self, script: &str, wanted: &str) -> Result<()> {
        let begin = Instant::now();
        loop {
            let said = self.say(script)?;
            if said == wanted {
                return Ok(());
            }
            ensure!(
                begin.elapsed() < SOON,
                "{script}: after {:?} {said:?}, not {wanted:?}",
                begin.elapsed()
            );
        }
    }
}

#[test]
fn what_the_host_does_with_volumes_the_container_sees() -> Result<()> {
    let place = scratch::directory()?;
    let at = |name: &str| place.path().join(name);
    for name in [
        "config",
        "config/..first",
        "config/..second",
        "tree",
        "tree/inner",
        "small",
        "thin",
        "loop",
    ] {
        fs::create_dir(at(name))?;
    }
    for (name, content) in [
        ("hosts", "127.0.0.1 first\n"),
        ("resolv.conf", "nameserver 192.0.2.1\n"),
        ("config/..first/token", "one"),
        ("config/..second/token", "two"),
        ("tree/file", "outer"),
    ] {
        fs::write(at(name), content)?;
    }
    // As kubelet lays a configMap out.
    symlink("..first", at("config/..data"))?;
    symlink("..data/token", at("config/token"))?;
    sh(&format!(
        "cd {}; mount -t tmpfs -o size=1m none small; mount -t tmpfs none tree/inner; \
         echo inner > tree/inner/file; mount --make-shared tree/inner; \
         mount -t tmpfs -o size=3m none thin; truncate -s 16M thin/disk; \
         mkfs.ext4 -qF -O ^has_journal thin/disk; mount -o loop thin/disk loop; head -c 1m /dev/urandom > loop/full; sync",
        place.path().display()
    ))?;
    let _mounts = Mounts(place.path());

    let bundle = Bundle::new(&["/bin/sh"])?;
    bundle.edit(|config| {
        let mounts = config["mounts"].as_array_mut();
        if let Some(mounts) = mounts {
            for mount in mounts.iter_mut() {
                if mount["destination"] == "/dev/shm" {
                    mount["options"] = json!(["nosuid", "mode=1777", "size=3m"]);
                }
            }
            mounts.extend([
                bind(&at("hosts"), "/etc/hosts", &["rbind"]),
                bind(&at("resolv.conf"), "/etc/resolv.conf", &["rbind", "ro"]),
                bind(&at("config"), "/config", &["rbind", "ro"]),
                bind(&at("tree"), "/tree", &["rbind", "rslave"]),
                bind(&at("tree"), "/alone", &["bind", "ro"]),
                bind(&at("small"), "/small", &["rbind"]),
                bind(&at("loop"), "/loop", &["rbind"]),
                json!({"destination": "/memory", "type": "tmpfs", "source": "tmpfs",
                    "options": ["size=2m"]}),
                json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": []}),
            ]);
        }
        config["root"]["readonly"] = json!(false);
        config["linux"]["readonlyPaths"] = json!([]);
    })?;
    let mut shell = Shell(bundle.start(&[])?);

    // Files that were mounted alone: written in place by the host they change; one that is put
    // into the place of another is another, as it is with every bind mount.
    assert_eq!(
        shell.say("cat /etc/hosts /etc/resolv.conf")?,
        "127.0.0.1 first\nnameserver 192.0.2.1"
    );
    fs::write(at("hosts"), "127.0.0.1 second and longer\n")?;
    fs::write(at("resolv.conf"), "nameserver 192.0.2.2\n")?;
    shell.soon("cat /etc/hosts", "127.0.0.1 second and longer")?;
    shell.soon("cat /etc/resolv.conf", "nameserver 192.0.2.2")?;
    writeln!(
        File::options().append(true).open(at("hosts"))?,
        "192.0.2.9 added"
    )?;
    shell.soon(
        "cat /etc/hosts",
        "127.0.0.1 second and longer\n192.0.2.9 added",
    )?;
    fs::write(at("new"), "127.0.0.1 third\n")?;
    fs::rename(at("new"), at("hosts"))?;
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(
        shell.say("head -n 1 /etc/hosts")?,
        "127.0.0.1 second and longer"
    );
    let said = shell.say("echo x >> /etc/resolv.conf")?;
    assert!(said.contains("Read-only file system"), "{said}");
    shell.say("echo '192.0.2.8 by the container' > /etc/hosts; cat /etc/hosts")?;

    // A volume whose content is swapped by a link.
    assert_eq!(shell.say("cat /config/token")?, "one");
    symlink("..second", at("config/..data_tmp"))?;
    fs::rename(at("config/..data_tmp"), at("config/..data"))?;
    fs::remove_dir_all(at("config/..first"))?;
    shell.soon("cat /config/token", "two")?;

    // Mounts within mounts, and those that come later.
    assert_eq!(
        shell.say("cat /tree/file /tree/inner/file | tr -d '\\n'")?,
        "outerinner"
    );
    assert_eq!(shell.say("ls /alone/inner")?, "");
    let said = shell.say("touch /alone/x /tree/inner/y; ls /tree/inner")?;
    assert!(
        said.contains("/alone/x: Read-only") && said.ends_with("file\ny"),
        "{said}"
    );
    sh(&format!(
        "cd {}/tree/inner; mkdir later; mount -t tmpfs none later; echo late > later/file",
        place.path().display()
    ))?;
    shell.soon("cat /tree/inner/later/file", "late")?;

    // Memory has the size that was asked for, and what is full says so.
    let size = "awk '{print $2}'";
    assert_eq!(
        shell.say(&format!("df -k /dev/shm | tail -n 1 | /bin/busybox {size}"))?,
        "3072"
    );
    for full in ["/dev/shm", "/memory", "/small"] {
        let said = shell.say(&format!(
            "dd if=/dev/zero of={full}/big bs=64k count=600; rm {full}/big"
        ))?;
        assert!(said.contains("No space left on device"), "{full}: {said}");
    }

    // What is gone is an error, and nothing hangs.
    fs::write(at("small/open"), "still here")?;
    shell.soon("cat /small/open", "still here")?;
    shell.say("exec 5< /small/open")?;
    fs::remove_file(at("small/open"))?;
    assert_eq!(shell.say("cat <&5; exec 5<&-")?, "still here");
    shell.soon(
        "cat /small/open",
        "cat: can't open '/small/open': No such file or directory",
    )?;
    // The disk below it promises more than there is.
    let begin = Instant::now();
    let said =
        shell.say("dd if=/dev/zero of=/loop/big bs=64k count=100 conv=fsync; echo status $?")?;
    println!(
        "a disk without room below it: {said:?} after {:?}",
        begin.elapsed()
    );
    let errno = ["Input/output error", "No space left on device"];
    assert!(
        errno.iter().any(|errno| said.contains(errno)) && said.ends_with("status 1"),
        "{said}"
    );

    // And a disk that is cut off under it.
    fs::File::options()
        .write(true)
        .open(at("thin/disk"))?
        .set_len(64 << 10)?;
    sh("echo 3 > /proc/sys/vm/drop_caches")?;
    let begin = Instant::now();
    let said = shell.say("echo 3 > /proc/sys/vm/drop_caches; cat /loop/full; echo status $?")?;
    ensure!(
        said.contains("Input/output error") || said.contains("Structure needs cleaning"),
        "{said}"
    );
    assert!(said.ends_with("status 1"), "{said}");
    assert!(begin.elapsed() < Duration::from_secs(60));

    drop(shell.0.child.stdin.take());
    ensure!(shell.0.output()?.status.success());
    sh(&format!(
        "umount {}/tree/inner/later",
        place.path().display()
    ))?;
    bundle.nothing_is_left()?;
    // What the container wrote went to the file that it has, which has no name any more.
    assert_eq!(fs::read_to_string(at("hosts"))?, "127.0.0.1 third\n");
    Ok(())
}

#[test]
fn a_mount_stays_while_the_host_works_on_the_directory_below_it() -> Result<()> {
    const DROP: &str = "echo 3 > /proc/sys/vm/drop_caches";
    let place = scratch::directory()?;
    let at = |name: &str| place.path().join(name);
    fs::create_dir(at("volume"))?;
    fs::write(at("volume/file"), "volume")?;
    fs::write(at("hosts"), "hosts")?;
    let bundle = Bundle::new(&["/bin/sh"])?;
    let root = bundle.rootfs();
    for directory in ["etc", "data", "deep/er/data"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::write(root.join("etc/hosts"), "below")?;
    // With numbers of files that come from two file systems, and change when they are copied up.
    let (root, top) = (root.display(), place.path().display());
    sh(&format!(
        "cd {top}; mkdir low memory; cp -a {root}/. low/; mount -t tmpfs none memory; \
         mkdir memory/up memory/work; \
         mount -t overlay none -o lowerdir=low,upperdir=memory/up,workdir=memory/work,xino=off {root}"
    ))?;
    let overlay = [bundle.rootfs(), at("memory")].map(Unmounted);
    bundle.edit(|config| {
        if let Some(mounts) = config["mounts"].as_array_mut() {
            mounts.extend([
                bind(&at("hosts"), "/etc/hosts", &["rbind"]),
                bind(&at("volume"), "/data", &["rbind"]),
                bind(&at("volume"), "/deep/er/data", &["rbind"]),
            ]);
        }
        config["root"]["readonly"] = json!(false);
        config["linux"]["readonlyPaths"] = json!([]);
    })?;
    let mut shell = Shell(bundle.start(&[])?);
    let all = "hostsvolumevolume";
    let mut look = |guest: &str, wanted: &str| -> Result<()> {
        let look = "cat /etc/hosts /data/file /deep/er/data/file 2> /dev/null";
        // Names are believed for a second.
        let said = shell.say(&format!("{guest} sleep 1.2; {look}"))?;
        ensure!(said == wanted, "{guest}: {said:?}");
        Ok(())
    };
    look("", all)?;
    look(&format!("{DROP};"), all)?;
    let touched = "touch etc/hosts data deep deep/er deep/er/data; chmod 700 data; chown 5 etc; \
         echo more > etc/more; echo less > deep/er/less";
    for host in [DROP, &format!("cd {root}; {touched}"), DROP] {
        sh(host)?;
        look("", all)?;
        look(&format!("{DROP};"), all)?;
    }
    // What it is mounted on is gone: so is the mount, as in every namespace of the host's.
    sh(&format!(
        "cd {root}; echo -n other > new; mv new etc/hosts; mv data old; mkdir data"
    ))?;
    look("", "othervolume")?;

    drop(shell.0.child.stdin.take());
    ensure!(shell.0.output()?.status.success());
    drop(overlay);
    bundle.nothing_is_left()?;
    Ok(())
}

/// Something that is unmounted with the value.
struct Unmounted(PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// What is mounted below a directory; it goes with the value.
struct Mounts<'a>(&'a Path);

impl Drop for Mounts<'_> {
    fn drop(&mut self) {
        for name in ["tree/inner", "small", "loop", "thin"] {
            let _ = Command::new("umount")
                .args(["-R", "-l"])
                .arg(self.0.join(name))
                .output();
        }
    }
}
