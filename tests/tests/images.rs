//! Container images as people use them: from a layout or a registry, as memory that all machines
//! share, and hostile ones.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::stat::{Mode, SFlag, makedev, mknod},
    unistd::{Pid, mkfifo},
};
use rootfs_builder::digest::Digest;
use serde_json::{Value, json};
use system_tests::{
    client::{terminal::Terminal, until},
    guest::{Guest, Plan},
    image::{Host, Layout, Packing},
    scratch,
};
use vmm::config::{DeviceConfig, Resource};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a container printed, which ended with 0.
fn printed(output: &Output) -> Result<String> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(text(output))
}

fn set_xattr(path: &Path, name: &str, value: &str) -> Result<()> {
    let set = Command::new("setfattr")
        .args(["-h", "-n", name, "-v", value])
        .arg(path)
        .status()
        .context("cannot run setfattr; is attr installed?")?;
    ensure!(set.success(), "setfattr fails");
    Ok(())
}

/// The lower layer of what follows.
fn lower(root: &Path) -> Result<()> {
    for name in ["etc", "data", "dev", "srv"] {
        fs::create_dir(root.join(name))?;
    }
    let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd)?;
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nwww:x:34:\nlogs:x:50:web\n",
    )?;
    fs::write(root.join("etc/gone"), "gone")?;
    fs::write(root.join("etc/stays"), "stays")?;
    fs::write(root.join("data/old"), "old")?;
    fs::write(root.join("srv/tool"), "#!/bin/sh\nid -u\n")?;
    fs::set_permissions(root.join("srv/tool"), fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The upper one: it hides, replaces, and has everything that an inode can have.
fn upper(root: &Path) -> Result<()> {
    for name in ["etc", "data", "dev"] {
        fs::create_dir(root.join(name))?;
    }
    fs::write(root.join("etc/.wh.gone"), "")?;
    fs::write(root.join("data/.wh..wh..opq"), "")?;
    fs::write(root.join("data/new"), "new")?;
    fs::hard_link(root.join("data/new"), root.join("data/again"))?;
    symlink("new", root.join("data/link"))?;
    mkfifo(&root.join("data/pipe"), Mode::from_bits_truncate(0o600))?;
    let mode = Mode::from_bits_truncate(0o640);
    mknod(&root.join("data/null"), SFlag::S_IFCHR, mode, makedev(1, 3))?;
    chown(root.join("data/new"), Some(1234), Some(70_000))?;
    fs::set_permissions(root.join("data/new"), fs::Permissions::from_mode(0o4750))?;
    set_xattr(&root.join("data/new"), "user.note", "hello")?;
    // cap_net_raw=ep
    let capability = "0x0100000200200000000000000000000000000000";
    set_xattr(&root.join("data/again"), "security.capability", capability)?;
    Ok(())
}

fn layered() -> Result<Layout> {
    let mut layout = Layout::with_shell()?;
    layout.layer(Packing::Plain, lower)?;
    layout.layer(Packing::Zstd, upper)?;
    layout.save(&json!({
        "Cmd": ["/bin/sh", "-c", "echo the image says so"],
        "Env": ["PATH=/bin", "COLOUR=red"],
        "WorkingDir": "/data",
        "User": "web",
    }))?;
    Ok(layout)
}

#[test]
fn an_image_runs_with_all_that_its_layers_and_the_flags_say() -> Result<()> {
    let layout = layered()?;
    let host = Host::new()?;
    let image = layout.location();
    let says = printed(&host.run(&[&image])?)?;
    assert_eq!(says, "the image says so\n");

    let looks = "cd /; find data etc/gone etc/stays 2>/dev/null | sort; \
         stat -c '%n %a %u:%g %h %F %Y' data/new data/null data/pipe; \
         stat -c %t,%T data/null; readlink data/link; [ data/new -ef data/again ] && echo same; \
         getfattr -d -m - data/new 2>/dev/null; \
         echo more >> data/new; cat data/new data/again; \
         rm etc/stays; ls etc/stays 2>&1; true";
    let says = printed(&host.run(&["-u", "0", &image, "/bin/sh", "-c", looks])?)?;
    let wanted = "data\ndata/again\ndata/link\ndata/new\ndata/null\ndata/pipe\netc/stays\n\
         data/new 4750 1234:70000 2 regular file 1600000000\n\
         data/null 640 0:0 1 character special file 1600000000\n\
         data/pipe 600 0:0 1 fifo 1600000000\n\
         1,3\nnew\nsame\n";
    assert!(says.starts_with(wanted), "{says}");
    assert!(says.contains("newmore\n"), "{says}");
    assert!(says.contains("ls: etc/stays: No such file"), "{says}");

    // Nothing of that is in the image.
    let shared = scratch::directory()?;
    fs::write(shared.path().join("file"), "of the host\n")?;
    let volume = format!("{}:/srv/host:ro", shared.path().display());
    let script = "id -u; id -g; id -G; pwd; hostname; echo $COLOUR $SHAPE; cat etc/stays /srv/host/file; \
         touch /srv/host/x 2>&1; touch /x 2>&1; touch /tmp/x /cache/x && echo written; \
         df -m /cache | tail -n 1; grep CapBnd /proc/self/status; cd /sys/fs/cgroup; cat cpu.max memory.max";
    let flags = [
        "--rm",
        "--name",
        "web",
        "-w",
        "/",
        "-e",
        "SHAPE=round",
        "--hostname",
        "box",
        "-v",
        &volume,
        "--tmpfs",
        "/cache:size=1m,mode=1777",
        "--read-only",
        "--cap-drop",
        "all",
        "-m",
        "128m",
        "--cpus",
        "0.5",
        "--network",
        "none",
        "--entrypoint",
        "/bin/sh",
    ];
    let says = printed(&host.run(&[&flags[..], &[&image, "-c", script]].concat())?)?;
    let wanted = "33\n34\n34 50\n/\nbox\nred round\nstaysof the host\n\
         touch: /srv/host/x: Read-only file system\ntouch: /x: Read-only file system\nwritten\n";
    assert!(says.starts_with(wanted), "{says}");
    let end = "CapBnd:\t0000000000000000\n50000 100000\n134217728\n";
    assert!(says.ends_with(end), "{says}");

    // More than the guest's memory takes, and less than is asked for.
    let disk = "dd if=/dev/zero of=/big bs=1M count=90 2>&1; stat -c %s /big; df -m / | tail -n 1";
    let flags = ["--storage-opt", "size=80m", "-u", "0:0", "-m", "40m"];
    let says = printed(&host.run(&[&flags[..], &[&image, "/bin/sh", "-c", disk]].concat())?)?;
    assert!(says.contains("No space left on device"), "{says}");
    let size: u64 = says
        .lines()
        .find_map(|line| line.parse().ok())
        .context("no size")?;
    assert!((60 << 20..80 << 20).contains(&size), "{says}");
    let output = host.run(&["-u", "nobody", &image])?;
    assert_eq!(output.status.code(), Some(125));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("\"nobody\""), "{said}");
    has_a_terminal(&host, &image)
}

/// Its shell is typed into, sees how large the terminal is, and how large it becomes.
fn has_a_terminal(host: &Host, image: &str) -> Result<()> {
    let shell = host.run_command(&["-it", "--rm", "-u", "0", image, "/bin/sh"])?;
    let mut terminal = Terminal::start(shell, 30, 90)?;
    terminal.type_in("stty size; echo $((6 * 7))\r")?;
    terminal.shows("30 90")?;
    terminal.shows("42")?;
    terminal.resize(25, 70)?;
    until("the terminal's new size", || {
        terminal.type_in("stty size\r")?;
        terminal.shows_soon("25 70")
    })?;
    terminal.type_in("exit 7\r")?;
    let (status, shown) = terminal.end()?;
    ensure!(status == 7, "ended with {status}: {shown:?}");
    Ok(())
}

/// `Rss` and `Pss` of the mapping of a file in a process, in KiB.
fn mapped_kib(pid: Pid, file: &Path) -> Result<(u64, u64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let name = file.file_name().context("no name")?.to_string_lossy();
    let mut lines = smaps.lines().skip_while(|line| !line.ends_with(&*name));
    ensure!(lines.next().is_some(), "{name} is not mapped:\n{smaps}");
    let mut field = |wanted: &str| -> Result<u64> {
        let line = lines
            .find(|line| line.starts_with(wanted))
            .context("no field")?;
        let kib = line.split_whitespace().nth(1).context("no number")?;
        Ok(kib.parse()?)
    };
    Ok((field("Rss:")?, field("Pss:")?))
}

#[test]
fn machines_have_an_image_once_in_memory_and_tell_when_it_is_cut_off() -> Result<()> {
    const KIB: u64 = 12 << 10;
    let mut layout = Layout::with_shell()?;
    layout.layer(Packing::Plain, |root| {
        fs::copy(
            scratch::noise((KIB as usize) << 10)?.path(),
            root.join("noise"),
        )?;
        Ok(())
    })?;
    layout.save(&json!({"Env": ["PATH=/bin"]}))?;
    let host = Host::new()?;
    host.bulkhead("pull", &[&layout.location(), "--name", "noise"])?;
    // A file that is mapped by DAX fills no page cache of the guest.
    let script = "cached() { awk '/^Cached:/ {print $2}' /proc/meminfo; }; before=$(cached); \
         md5sum /noise; [ $(($(cached) - before)) -lt 2000 ] && echo read; for i in $(seq 200); do sleep 1; done";
    let args = ["noise", "/bin/sh", "-c", script];
    let mut machines = [host.container(&args)?, host.container(&args)?];
    for machine in &mut machines {
        machine.wait_for_line("read")?;
    }
    let file = host.disk()?;
    // And one of another image.
    let calm = Layout::with_shell()?;
    calm.save(&json!({"Env": ["PATH=/bin"]}))?;
    let shared = scratch::directory()?;
    let volume = format!("{}:/shared", shared.path().display());
    let script = "echo up; until [ -e /shared/go ]; do sleep 0.1; done; ls -R /bin /etc > /dev/null && echo on";
    let mut other = host.container(&["-v", &volume, &calm.location(), "/bin/sh", "-c", script])?;
    other.wait_for_line("up")?;
    let [first, second] = [
        mapped_kib(machines[0].vmm()?, &file)?,
        mapped_kib(machines[1].vmm()?, &file)?,
    ];
    println!(
        "each maps {} and {} KiB, and has a part of {} and {}",
        first.0, second.0, first.1, second.1
    );
    assert!(first.0 >= KIB && second.0 >= KIB);
    // Two who share all have half each.
    assert!(first.1 + second.1 <= first.0.max(second.0) * 21 / 20);

    // Whoever may write to the store cuts the image off. The next page that a guest wants of it is
    // in no memory: the machine says so and ends, and no other does.
    let whole = fs::metadata(&file)?.len();
    fs::File::options().write(true).open(&file)?.set_len(4096)?;
    for machine in machines {
        let output = machine.output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("an image that is cut off: {} {said:?}", output.status);
        assert!(!output.status.success());
        assert!(said.contains("the file of an image was cut off"), "{said}");
        let named = format!("{} was cut off", file.display());
        let lengths = format!("4096 bytes of {whole} are left");
        assert!(said.contains(&named) && said.contains(&lengths), "{said}");
        assert!(said.contains("bulkhead rmi"), "{said}");
    }
    // The next one is told before it starts.
    let said = host.refusal("run", &args)?;
    assert!(said.contains("changed") && said.contains("rmi"), "{said}");
    fs::write(shared.path().join("go"), "")?;
    let output = other.output()?;
    assert_eq!(printed(&output)?, "on\n");
    host.nothing_is_left()
}

#[test]
fn what_a_guest_writes_to_an_image_ends_in_the_guest() -> Result<()> {
    let mut layout = Layout::new()?;
    layout.layer(Packing::Plain, |root| {
        Ok(fs::write(root.join("file"), "as it was")?)
    })?;
    layout.save(&json!({}))?;
    let host = Host::new()?;
    host.bulkhead("pull", &[&layout.location()])?;
    let disk = host.disk()?;
    let before = Digest::of(&fs::read(&disk)?);
    let mut guest = Guest::start(Plan {
        devices: vec![DeviceConfig::Pmem {
            file: Resource::Path(disk.clone()),
            read_only: true,
        }],
        ..Plan::default()
    })?;
    guest.sh("mount -t erofs -o ro,dax=always /dev/pmem0 /mnt")?;
    for attempt in [
        // By way of the guest's cache, and by its processor at the memory itself.
        "dd if=/dev/zero of=/dev/pmem0 bs=4k count=64 conv=fsync,notrunc",
        "dd if=/dev/zero of=/dev/pmem0 bs=4k count=64 oflag=direct conv=notrunc",
        "umount /mnt; mount -t erofs -o rw /dev/pmem0 /mnt; echo x > /mnt/file",
    ] {
        // What the guest believes of it is the guest's.
        let outcome = guest.sh(&format!("{attempt} 2>&1; echo status $?"))?;
        println!("{attempt}: {outcome:?}");
        let after = Digest::of(&fs::read(&disk)?);
        ensure!(after == before, "{attempt}: the image changed");
    }
    // It reads what was there, too.
    sum_in(&mut guest, &disk, before)?;
    drop(guest);

    // By the guest's mapping of the memory itself, past its cache: on a file system that takes
    // writes, which an image's does not.
    let writable = scratch::ext4(16 << 20)?;
    let files = scratch::directory()?;
    fs::write(files.path().join("target"), vec![7; 1 << 20])?;
    let filled = Command::new("/sbin/mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-O", "^has_journal", "-d"])
        .arg(files.path())
        .arg(writable.path())
        .output()?;
    ensure!(filled.status.success(), "mkfs.ext4: {}", text(&filled));
    let before = Digest::of(&fs::read(writable.path())?);
    let mut guest = Guest::start(Plan {
        devices: vec![DeviceConfig::Pmem {
            file: Resource::Path(writable.path().into()),
            read_only: true,
        }],
        ..Plan::default()
    })?;
    for attempt in [
        "mount -t ext4 -o dax /dev/pmem0 /mnt; grep pmem0 /proc/mounts",
        "dd if=/dev/zero of=/mnt/target bs=4k count=16 conv=notrunc",
        "umount /mnt; sync",
    ] {
        let outcome = guest.sh(&format!("{attempt} 2>&1; echo status $?"));
        // A guest that stumbles over it harms itself alone.
        println!("{attempt}: {outcome:?}");
        let after = Digest::of(&fs::read(writable.path())?);
        ensure!(after == before, "{attempt}: the file changed");
        if outcome.is_err() {
            break;
        }
    }
    Ok(())
}

/// What the guest reads of the image.
fn sum_in(guest: &mut Guest, disk: &Path, before: Digest) -> Result<()> {
    let length = fs::metadata(disk)?.len() / 4096;
    let sum = guest.sh(&format!(
        "dd if=/dev/pmem0 bs=4k count={length} iflag=direct 2>/dev/null | sha256sum"
    ))?;
    assert_eq!(sum.split(' ').next(), Some(&*before.hex()));
    Ok(())
}

/// A file system that can check every page of a file that is read.
struct Verity {
    place: tempfile::TempDir,
    _file: tempfile::NamedTempFile,
}

impl Verity {
    fn new() -> Result<Self> {
        let file = scratch::ext4(64 << 20)?;
        let tuned = Command::new("/sbin/tune2fs")
            .args(["-O", "verity"])
            .arg(file.path())
            .output()?;
        ensure!(tuned.status.success(), "tune2fs: {}", text(&tuned));
        let place = scratch::directory()?;
        let mounted = Command::new("mount")
            .args(["-o", "loop"])
            .arg(file.path())
            .arg(place.path())
            .status()?;
        ensure!(mounted.success(), "mount fails");
        Ok(Self { place, _file: file })
    }
}

impl Drop for Verity {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.place.path())
            .status();
    }
}

#[test]
fn where_the_file_system_can_it_checks_every_page_of_an_image() -> Result<()> {
    let layout = Layout::with_shell()?;
    layout.save(&json!({"Cmd": ["/bin/echo", "checked"]}))?;
    let verity = Verity::new()?;
    let host = Host::with_store(verity.place.path().join("images"))?;
    let image = layout.location();
    assert_eq!(printed(&host.run(&[&image])?)?, "checked\n");
    let list: Value = serde_json::from_str(&host.bulkhead("images", &["--format", "json"])?)?;
    assert!(list[0]["verity"].is_string(), "{list}");
    let error = fs::File::options()
        .write(true)
        .open(host.disk()?)
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    // Another file in its place is none that the kernel checks.
    let copy = fs::read(host.disk()?)?;
    fs::remove_file(host.disk()?)?;
    fs::write(host.store().join("copy"), copy)?;
    let place = host
        .kept()?
        .into_iter()
        .find(|path| path.ends_with("record.json"));
    let place = place.context("no record")?.with_file_name("disk.erofs");
    fs::rename(host.store().join("copy"), place)?;
    let said = host.refusal("run", &[&image])?;
    assert!(said.contains("changed since it was made"), "{said}");
    Ok(())
}

#[test]
fn images_come_by_every_transport_and_are_the_same() -> Result<()> {
    let mut layout = Layout::with_shell()?;
    layout.layer(Packing::Gzip, |root| Ok(fs::write(root.join("x"), "x")?))?;
    layout.save(&json!({"Cmd": ["/bin/echo", "here"]}))?;
    let place = scratch::directory()?;
    let at = |name: &str| place.path().join(name).display().to_string();
    let skopeo = |to: &str| -> Result<()> {
        let copied = Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy"])
            .args([&layout.location(), to])
            .output()
            .context("cannot run skopeo; is it installed?")?;
        let said = String::from_utf8_lossy(&copied.stderr).into_owned();
        ensure!(copied.status.success(), "skopeo fails: {said}");
        Ok(())
    };
    // A store of podman's own, which skopeo reads.
    let storage = format!(
        "containers-storage:[vfs@{}+{}]example.org/stored:1",
        at("graph"),
        at("run")
    );
    let archives = [
        format!("oci-archive:{}", at("oci.tar")),
        format!("docker-archive:{}:example.org/saved:1", at("docker.tar")),
        format!("oci:{}:stored", at("layout")),
        storage.clone(),
    ];
    let host = Host::new()?;
    host.bulkhead("pull", &[&layout.location()])?;
    for location in &archives {
        skopeo(location)?;
        let id = host.bulkhead("pull", &[location])?;
        let list: Value = serde_json::from_str(&host.bulkhead("images", &["--format", "json"])?)?;
        ensure!(
            list.to_string()
                .contains(id.trim().trim_start_matches("sha256:")),
            "{location}: {id:?} in {list}"
        );
    }
    assert_eq!(printed(&host.run(&["example.org/saved:1"])?)?, "here\n");
    // By names that are not there, which are told with what is, or where it was looked for.
    for (location, why) in [
        (format!("oci:{}", at("none")), "none/index.json"),
        (format!("oci:{}:none", at("layout")), "there are: stored"),
        (format!("oci-archive:{}", at("none.tar")), "none.tar"),
        (
            format!("oci-archive:{}", at("docker.tar")),
            "index.json in /",
        ),
        (
            format!("docker-archive:{}:none:1", at("docker.tar")),
            "there are: example.org/saved:1",
        ),
        (
            format!("docker-archive:{}", at("oci.tar")),
            "manifest.json in /",
        ),
        (
            storage.replace("stored", "none"),
            "skopeo cannot copy containers-storage:",
        ),
    ] {
        let said = host.refusal("pull", &[&location])?;
        assert!(said.contains(why), "{location}: {said}");
    }
    // By a program that is not there, and from a daemon that does not run.
    let mut pull = host.command("pull", &[&storage])?;
    let output = pull.env("PATH", "/nonexistent").output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(125));
    assert!(said.contains("package skopeo"), "{said}");
    let said = host.refusal("pull", &["docker-daemon:example.org/app:1"])?;
    assert!(
        said.contains("skopeo cannot copy docker-daemon:example.org/app:1"),
        "{said}"
    );
    Ok(())
}

#[test]
fn hostile_and_broken_layers_are_refused_and_nothing_is_left() -> Result<()> {
    let host = Host::new()?;
    let outside = scratch::directory()?;
    let archive = |arguments: &[&str], make: &dyn Fn(&Path) -> Result<()>| -> Result<Vec<u8>> {
        let root = scratch::directory()?;
        make(root.path())?;
        let output = Command::new("tar")
            .args(["-cP", "-C"])
            .arg(root.path())
            .args(arguments)
            .output()?;
        ensure!(output.status.success(), "tar fails");
        Ok(output.stdout)
    };
    let file = |root: &Path| Ok(fs::write(root.join("x"), "evil")?);
    let outside_link = |root: &Path| Ok(symlink(outside.path(), root.join("link"))?);
    let climbing = archive(&["--transform=s,^,../../../../tmp/,", "x"], &file)?;
    let mut through = archive(&["link"], &outside_link)?;
    // The second archive's members behind the first one's.
    through.truncate(512);
    through.extend(archive(&["--transform=s,^,link/,", "x"], &file)?);
    let twice = [&archive(&["x"], &file)?[..1024], &archive(&["x"], &file)?].concat();
    let mut truncated = archive(&["x"], &file)?;
    truncated.truncate(514);
    let mut vast = archive(&["x"], &file)?;
    vast[124..136].copy_from_slice(b"77777777777\0");
    vast[148..156].copy_from_slice(b"        ");
    let sum: u32 = vast[..512].iter().map(|byte| u32::from(*byte)).sum();
    vast[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());

    for (layer, why) in [
        (climbing, "leads out of the image"),
        (through, "link/x"),
        (twice, "is there twice"),
        (truncated, "cannot be unpacked"),
        (vast, "cannot be unpacked"),
        (b"no archive at all".repeat(100), "no tar archive"),
    ] {
        let mut layout = Layout::new()?;
        layout.packed(Packing::Gzip, &layer)?;
        layout.save(&json!({"Cmd": ["/x"]}))?;
        let said = host.refusal("run", &[&layout.location()])?;
        assert!(
            said.contains("layer 1") && said.contains(why),
            "{why}: {said}"
        );
        assert!(host.kept()?.is_empty(), "{why}: {:?}", host.kept()?);
    }
    let mut layout = Layout::new()?;
    layout.layer(Packing::Gzip, |root| Ok(fs::write(root.join("x"), "x")?))?;
    layout.save(&json!({"Cmd": ["/x"]}))?;
    let path = layout.last_layer()?;
    let bytes = fs::read(&path)?;
    fs::write(&path, &bytes[..bytes.len() - 7])?;
    let said = host.refusal("run", &[&layout.location()])?;
    assert!(said.contains("truncated"), "{said}");
    assert!(host.kept()?.is_empty());
    assert_eq!(fs::read_dir(outside.path())?.count(), 0);

    let said = host.refusal("run", &["--pull", "never", "example.org/none"])?;
    assert!(said.contains("example.org/none"), "{said}");
    Ok(())
}
