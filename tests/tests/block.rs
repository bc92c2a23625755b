//! Disks of the host in containers: file systems in image files and on block devices, and the
//! devices themselves.

use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};
use system_tests::{
    client::{
        containerd::{Containerd, Programs},
        images::BUSYBOX,
        leftovers::Leftovers,
        until,
    },
    container::Bundle,
    scratch::{self, Loop},
};

/// An ext4 of this size, in bytes, has room for everything here.
const DISK: u64 = 32 << 20;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Adds mounts to a bundle's own.
fn mount(bundle: &Bundle, mounts: &[Value]) -> Result<()> {
    bundle.edit(|config| {
        if let Some(all) = config["mounts"].as_array_mut() {
            all.extend_from_slice(mounts);
        }
    })
}

/// Runs a program of the host that must succeed.
fn host(program: &str, args: &[&Path]) -> Result<String> {
    let output = Command::new(program).args(args).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    let told = text(&output.stdout) + &text(&output.stderr);
    ensure!(output.status.success(), "{program} {args:?}: {told}");
    Ok(told)
}

/// Fails unless a file system is as a kernel leaves it that unmounted it.
fn is_clean(image: &Path) -> Result<()> {
    host("/sbin/e2fsck", &["-fn".as_ref(), image]).map(drop)
}

/// What a file of the ext4 in `image` holds.
fn kept(image: &Path, file: &str) -> Result<String> {
    let output = Command::new("/sbin/debugfs")
        .args(["-R", &format!("cat {file}")])
        .arg(image)
        .output()
        .context("cannot run debugfs")?;
    Ok(text(&output.stdout))
}

/// An EROFS with a file `hello`.
fn erofs() -> Result<tempfile::NamedTempFile> {
    let tree = tempfile::tempdir()?;
    fs::write(tree.path().join("hello"), "from an image\n")?;
    let image = tempfile::NamedTempFile::new()?;
    host(
        "mkfs.erofs",
        &["--quiet".as_ref(), image.path(), tree.path()],
    )?;
    Ok(image)
}

#[test]
fn image_files_are_mounted_by_the_guest_and_written_back() -> Result<()> {
    let (disk, image) = (scratch::ext4(DISK)?, erofs()?);
    let script = "cat /image/hello && echo kept > /data/file && \
                  busybox dd if=/dev/zero of=/data/zeros bs=1M count=8 2> /dev/null && \
                  ! echo no > /image/hello && \
                  busybox grep -E ' /(data|image) ' /proc/mounts | busybox cut -d' ' -f1-3";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    mount(
        &bundle,
        &[
            json!({"destination": "/data", "type": "ext4", "source": disk.path(), "options": ["loop", "rw"]}),
            json!({"destination": "/image", "type": "erofs", "source": image.path(), "options": ["loop", "ro"]}),
        ],
    )?;
    let output = bundle.run()?;
    let told = text(&output.stdout);
    ensure!(
        output.status.code() == Some(0),
        "{told}{}",
        text(&output.stderr)
    );
    ensure!(told.starts_with("from an image\n"), "{told}");
    ensure!(
        told.contains(" /data ext4") && told.contains(" /image erofs"),
        "{told}"
    );
    is_clean(disk.path())?;
    ensure!(kept(disk.path(), "/file")? == "kept\n");
    bundle.nothing_is_left()
}

#[test]
fn what_a_detached_container_wrote_is_there_when_it_has_ended() -> Result<()> {
    let disk = scratch::ext4(DISK)?;
    let bundle = Bundle::new(&["sh", "-c", "echo kept > /data/file"])?;
    let data = json!({"destination": "/data", "type": "ext4", "source": disk.path()});
    mount(&bundle, &[data])?;
    let null = || std::process::Stdio::null();
    let mut run = bundle.command(&["--detach"])?;
    ensure!(
        run.stdin(null())
            .stdout(null())
            .stderr(null())
            .status()?
            .success()
    );
    let root = bundle.path().join("state");
    let bulkhead = |args: &[&str]| -> Result<String> {
        let program = system_tests::guest::bin("bulkhead")?;
        let output = Command::new(program)
            .arg("--root")
            .arg(&root)
            .args(args)
            .output()?;
        ensure!(
            output.status.success(),
            "{args:?}: {}",
            text(&output.stderr)
        );
        Ok(text(&output.stdout))
    };
    until("the container's end", || {
        let state: Value = serde_json::from_str(&bulkhead(&["state", "web"])?)?;
        Ok(state["status"] == "stopped")
    })?;
    until("the file", || Ok(kept(disk.path(), "/file")? == "kept\n"))?;
    bulkhead(&["delete", "web"])?;
    is_clean(disk.path())?;
    bundle.nothing_is_left()
}

#[test]
fn a_file_system_is_written_by_one_machine() -> Result<()> {
    let disk = scratch::ext4(DISK)?;
    let data = json!({"destination": "/data", "type": "ext4", "source": disk.path()});
    let first = Bundle::new(&["sh", "-c", "echo here; cat"])?;
    mount(&first, std::slice::from_ref(&data))?;
    let mut running = first.start(&[])?;
    running.wait_for_line("here")?;
    let second = Bundle::new(&["true"])?;
    mount(&second, &[data])?;
    second.edit(|config| config["linux"]["cgroupsPath"] = json!("/bulkhead/second"))?;
    let refused = second.run()?;
    let line = text(&refused.stderr);
    ensure!(refused.status.code() == Some(125), "{line}");
    let named = line.contains(&*disk.path().to_string_lossy());
    ensure!(named && line.contains("another machine has it"), "{line}");
    drop(running.child.stdin.take());
    let output = running.output()?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    let output = second.run()?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    first.nothing_is_left()
}

#[test]
fn a_block_device_is_used_as_its_rule_says() -> Result<()> {
    let file = scratch::noise(1 << 20)?;
    let device = Loop::new(file.path())?;
    let number = fs::metadata(device.path())?.rdev();
    let given = |access: &str, script: &str| -> Result<String> {
        let bundle = Bundle::new(&["sh", "-c", script])?;
        bundle.edit(|config| {
            let number = json!({"type": "b", "major": major(number), "minor": minor(number)});
            let mut node = number.clone();
            node["path"] = json!("/dev/given");
            let mut rule = number;
            rule["allow"] = json!(true);
            rule["access"] = json!(access);
            config["linux"]["devices"] = json!([node]);
            if let Some(rules) = config["linux"]["resources"]["devices"].as_array_mut() {
                rules.push(rule);
            }
        })?;
        let output = bundle.run()?;
        bundle.nothing_is_left()?;
        let told = text(&output.stdout) + &text(&output.stderr);
        ensure!(output.status.success(), "{told}");
        Ok(told)
    };
    let sum = host("sha256sum", &[file.path()])?;
    let sum = sum.split(' ').next().unwrap_or_default();
    let read = given(
        "r",
        "busybox sha256sum /dev/given; ! echo no 2> /dev/null > /dev/given",
    )?;
    ensure!(read.starts_with(sum), "{read}");
    given("rw", "echo written > /dev/given")?;
    let now = fs::read(file.path())?;
    ensure!(now.starts_with(b"written\n"), "{:?}", &now[..16]);
    device.detach()
}

#[test]
fn disks_that_cannot_be_had_are_named() -> Result<()> {
    let refused = |mount: Value| -> Result<String> {
        let bundle = Bundle::new(&["true"])?;
        self::mount(&bundle, &[mount])?;
        let output = bundle.run()?;
        let line = text(&output.stderr);
        ensure!(output.status.code() == Some(125), "{line}");
        bundle.nothing_is_left()?;
        Ok(line)
    };
    let line = refused(json!({"destination": "/d", "type": "ext4", "source": "/nonexistent/i"}))?;
    ensure!(
        line.contains("/nonexistent/i") && line.contains("No such file"),
        "{line}"
    );
    let line = refused(json!({"destination": "/d", "type": "xfs", "source": "/dev/null"}))?;
    ensure!(line.contains("xfs") && line.contains("ext4"), "{line}");
    // The guest finds out that there is none.
    let noise = scratch::noise(1 << 20)?;
    let line = refused(json!({"destination": "/d", "type": "ext4", "source": noise.path()}))?;
    ensure!(line.contains("/d") && line.contains("ext4"), "{line}");
    Ok(())
}

/// A container's root by containerd's snapshotter of that name, and what its mount says.
fn root_of(containerd: &Containerd, snapshotter: &str, runtime: &str) -> Result<String> {
    let name = format!("{snapshotter}-{}", runtime.replace('.', "-"));
    let script = "grep ' / ' /proc/mounts && echo kept > /file && cat /file";
    let told = containerd.ctr(&[
        "run",
        "--rm",
        "--runtime",
        runtime,
        "--snapshotter",
        snapshotter,
        BUSYBOX,
        &name,
        "sh",
        "-c",
        script,
    ])?;
    let told = told.text()?.to_owned();
    ensure!(told.ends_with("kept"), "{snapshotter}, {runtime}: {told}");
    Ok(told)
}

#[test]
fn a_root_of_each_of_containerds_snapshotters_of_disks_is_had_as_by_runc() -> Result<()> {
    for name in ["dm-thin-pool", "erofs"] {
        scratch::module(name)?;
    }
    let pool = scratch::ThinPool::new(256 << 20)?;
    let place = scratch::directory()?;
    let devmapper = format!(
        r#"
[plugins."io.containerd.snapshotter.v1.devmapper"]
  root_path = "{}"
  pool_name = "{}"
  base_image_size = "64MB"
  fs_type = "ext4"
"#,
        place.path().display(),
        pool.name()
    );
    let containerd = Containerd::start_with(Programs::Testing, &devmapper)?;
    containerd.import("default", &[BUSYBOX])?;
    let runc = "io.containerd.runc.v2";
    let ours = "io.containerd.bulkhead.v2";
    let story = || -> Result<()> {
        // A thin device is a disk of the machine.
        let told = root_of(&containerd, "devmapper", runc)?;
        ensure!(told.starts_with("/dev/mapper/"), "{told}");
        let before = Leftovers::now()?;
        let told = root_of(&containerd, "devmapper", ours)?;
        ensure!(
            told.starts_with("/dev/vd") && told.contains(" / ext4 rw"),
            "{told}"
        );
        before.are_all()?;
        // Layers of EROFS lie under an overlay of the host's, and that is shared.
        let told = root_of(&containerd, "erofs", runc)?;
        ensure!(told.contains(" / overlay rw"), "{told}");
        let before = Leftovers::now()?;
        let told = root_of(&containerd, "erofs", ours)?;
        ensure!(told.contains(" / virtiofs rw"), "{told}");
        before.are_all()
    };
    let told = story().with_context(|| containerd.logs());
    drop(containerd);
    told
}

#[test]
fn a_root_of_the_blockfile_snapshotter_is_a_disk() -> Result<()> {
    let containerd = Containerd::start_from(Programs::Testing)?;
    containerd.import("default", &[BUSYBOX])?;
    let before = Leftovers::now()?;
    let ctr = |args: &[&str]| containerd.ctr(args);
    let story = || -> Result<()> {
        let run = [
            "run",
            "--runtime",
            "io.containerd.bulkhead.v2",
            "--snapshotter",
            "blockfile",
        ];
        let script = "grep ' / ' /proc/mounts && echo kept > /file && sync";
        let told = ctr(&[&run[..], &[BUSYBOX, "first", "sh", "-c", script]].concat())?;
        let told = told.text()?.to_owned();
        ensure!(told.contains(" / ext4 rw"), "{told}");
        // The same snapshot again: what was written is there.
        let again = ctr(&["tasks", "start", "first"])?;
        ensure!(again.text()?.contains(" / ext4 rw"));
        ctr(&["containers", "delete", "first"])?.text()?;
        let read_only = ctr(&[
            &run[..],
            &[
                "--read-only",
                "--rm",
                BUSYBOX,
                "second",
                "sh",
                "-c",
                "cat /file; ! touch /other",
            ],
        ]
        .concat())?;
        ensure!(
            read_only.status != 0 || !read_only.text()?.contains("kept"),
            "snapshots are apart"
        );
        Ok(())
    };
    story().with_context(|| containerd.logs())?;
    before.are_all().with_context(|| containerd.logs())
}
