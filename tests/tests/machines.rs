//! Machines of unusual sizes and kernels, hosts that cannot run one, and input that is none.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use rootfs_builder::{
    erofs,
    tree::{Node, Tree},
};
use serde_json::{Value, json};
use system_tests::{
    container::Bundle,
    guest::{Guest, Plan, bin, share},
};

/// The first frame above 4 GiB.
const HIGH_FRAME: u64 = 1 << 20;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The one line of a failure of bulkhead itself.
fn refusal(output: &Output) -> Result<String> {
    let line = text(&output.stderr);
    ensure!(
        output.status.code() == Some(125),
        "{:?}: {line}",
        output.status
    );
    ensure!(
        line.starts_with("bulkhead: ") && output.stdout.is_empty(),
        "{line}"
    );
    Ok(line)
}

#[test]
fn a_compressed_kernel_boots() -> Result<()> {
    let bundle = Bundle::new(&["echo", "unpacked"])?;
    let kernel = share("bzImage")?;
    let mut magic = [0; 4];
    magic.copy_from_slice(&fs::read(&kernel)?[0x202..0x206]);
    assert_eq!(&magic, b"HdrS");
    let output = bundle.run_with(&["--kernel", &kernel.to_string_lossy()])?;
    assert_eq!(
        text(&output.stdout),
        "unpacked\n",
        "{}",
        text(&output.stderr)
    );

    let cut = bundle.path().join("cut");
    fs::write(&cut, &fs::read(&kernel)?[..100_000])?;
    let line = refusal(&bundle.run_with(&["--kernel", &cut.to_string_lossy()])?)?;
    assert!(line.contains("is it truncated"), "{line}");
    bundle.nothing_is_left()
}

#[test]
fn memory_on_both_sides_of_the_hole_below_4_gib_is_seen_and_used() -> Result<()> {
    let mut guest = Guest::start(Plan {
        cpus: 4,
        memory_mib: 5000,
        ..Plan::default()
    })?;
    assert_eq!(guest.sh("grep -c ^processor /proc/cpuinfo")?, "4\n");
    let total = number(&guest.sh("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?)?;
    assert!(total > 4750 * 1024 && total < 5000 * 1024, "{total} KiB");

    let high = "awk '$4 == \"Normal\" { high = 1 } high && $1 == \"start_pfn:\" { print $2; exit }' /proc/zoneinfo";
    assert_eq!(number(&guest.sh(high)?)?, HIGH_FRAME);
    let free = "awk '$4 == \"Normal\" { high = 1 } high && $1 == \"nr_free_pages\" { print $2; exit }' /proc/zoneinfo";
    let before = number(&guest.sh(free)?)?;
    guest.sh(
        "mount -t tmpfs none /mnt; dd if=/dev/urandom of=/mnt/a bs=1M count=32; cp /mnt/a /mnt/b",
    )?;
    guest.sh("cmp /mnt/a /mnt/b")?;
    let taken = before.saturating_sub(number(&guest.sh(free)?)?);
    // Two copies of 32 MiB in pages, but for what lay free on lists of a processor.
    assert!(taken > 15_000, "only {taken} pages above 4 GiB were taken");
    Ok(())
}

fn number(printed: &str) -> Result<u64> {
    let number = printed.trim().parse();
    number.with_context(|| format!("{printed:?} is no number"))
}

#[test]
fn a_container_has_32_processors() -> Result<()> {
    let script = "grep -c ^processor /proc/cpuinfo; busybox nproc";
    let bundle = Bundle::new(&["sh", "-c", &format!("busybox {script}")])?;
    let output = bundle.run_with(&["--cpus", "32", "--memory", "512m"])?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "32\n32\n");
    bundle.nothing_is_left()
}

#[test]
fn a_guest_whose_agent_is_dead_is_given_up_at_the_deadline_with_its_last_lines() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    let init = r#"#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
echo "<3>nobody is at home" > /dev/kmsg
exec /bin/busybox sleep 1000
"#;
    let image = image(bundle.path(), init)?;
    let output = bundle.run_with(&["--image", &image, "--start-timeout", "40"])?;
    let lines = refusal(&output)?;
    assert!(
        lines.contains("the guest did not boot within 40 s"),
        "{lines}"
    );
    assert!(lines.contains("nobody is at home"), "{lines}");
    bundle.nothing_is_left()
}

#[test]
fn a_guest_that_panics_while_it_boots_is_told_with_its_last_lines() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    let image = image(bundle.path(), "#!/bin/busybox sh\nexit 7\n")?;
    let lines = refusal(&bundle.run_with(&["--image", &image])?)?;
    assert!(
        lines.contains("the virtual machine ended while it booted"),
        "{lines}"
    );
    assert!(
        lines.contains("Attempted to kill init! exitcode=0x00000700"),
        "{lines}"
    );
    bundle.nothing_is_left()
}

/// An image whose first process is a script.
fn image(directory: &Path, init: &str) -> Result<String> {
    let script = directory.join("init");
    fs::write(&script, init)?;
    let program = |source: &Path| Node::File {
        mode: 0o755,
        source: source.to_owned(),
    };
    let mut tree = Tree::new();
    for name in ["bin", "dev"] {
        tree.add(name, Node::Directory { mode: 0o755 })?;
    }
    tree.add("bin/busybox", program(Path::new("/bin/busybox")))?;
    tree.add("init", program(&script))?;
    let image = directory.join("init.img");
    erofs::build(&tree, [0; 16], &image)?;
    Ok(image.to_string_lossy().into_owned())
}

#[test]
fn a_host_whose_kvm_is_missing_or_forbidden_is_told_what_to_do() -> Result<()> {
    // Where anybody may execute it.
    let directory = tempfile::tempdir()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let program = directory.path().join("bulkhead");
    fs::copy(bin("bulkhead")?, &program)?;
    fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o600))?;

    let check = |launcher: &[&str]| -> Result<String> {
        let mut command = Command::new(launcher[0]);
        let output = command
            .args(&launcher[1..])
            .arg(&program)
            .arg("check")
            .output()?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        Ok(text(&output.stdout))
    };
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let report = check(&nobody)?;
    assert!(
        report.contains("MISSING  /dev/kvm cannot open /dev/kvm"),
        "{report}"
    );
    assert!(report.contains("run as root or join the group"), "{report}");
    assert!(report.contains("Permission denied"), "{report}");
    assert!(
        report.ends_with("This host does not run virtual machines.\n"),
        "{report}"
    );

    let hide = "mount -t tmpfs none /dev && exec \"$@\"";
    let without = ["unshare", "--mount", "sh", "-c", hide, "sh"];
    let report = check(&without)?;
    assert!(
        report.contains("this kernel has no KVM; load kvm_amd or kvm_intel"),
        "{report}"
    );

    // A container says the same, and leaves nothing.
    let bundle = Bundle::new(&["true"])?;
    let hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec \"$@\"";
    let run = bundle.command(&[])?;
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", hide, "sh"])
        .arg(run.get_program())
        .args(run.get_args())
        .output()?;
    let line = refusal(&output)?;
    assert!(line.contains("this kernel has no KVM"), "{line}");
    bundle.nothing_is_left()
}

#[test]
fn bad_input_is_refused_in_one_line_and_leaves_nothing() -> Result<()> {
    type Change = fn(&mut Value);
    let configurations: [(Change, &str); 5] = [
        (|config| config["ociVersion"] = json!("3.0.0"), "3.0.0"),
        (|config| config["root"]["path"] = json!("absent"), "absent"),
        (
            |config| config["process"]["args"] = json!([]),
            "process.args",
        ),
        (
            |config| config["linux"]["resources"]["memory"]["limit"] = json!(0),
            "linux.resources.memory.limit",
        ),
        (|config| config["root"] = json!("rootfs"), "config.json"),
    ];
    for (change, wanted) in configurations {
        let bundle = Bundle::new(&["true"])?;
        bundle.edit(change)?;
        refused(&bundle, &bundle.run()?, wanted)?;
    }

    let bundle = Bundle::new(&["true"])?;
    let host = "more than this host's";
    for (flag, value, wanted) in [
        ("--memory", "0", "--memory"),
        ("--memory", "1m", "at least 64 MiB"),
        ("--memory", "900000g", host),
        ("--cpus", "33", "1 to 32"),
        ("--kernel", "/absent/kernel", "/absent/kernel"),
        ("--image", "/absent/image", "/absent/image"),
    ] {
        refused(&bundle, &bundle.run_with(&[flag, value])?, wanted)?;
    }
    for id in ["..", "a/b", "", "a b", &"a".repeat(300)] {
        let run = bundle.command(&[])?;
        let mut arguments: Vec<_> = run.get_args().collect();
        arguments.pop();
        let output = Command::new(run.get_program())
            .args(arguments)
            .arg(id)
            .output()?;
        refused(&bundle, &output, "")?;
    }

    let path = bundle.path().join("config.json");
    fs::write(&path, "{\"ociVersion\": 1.0.2}")?;
    refused(&bundle, &bundle.run()?, "line 1")?;
    fs::remove_file(&path)?;
    refused(&bundle, &bundle.run()?, "runc spec")?;
    let output = bundle.run_with(&["--bundle", "/absent/bundle"])?;
    refused(&bundle, &output, "/absent/bundle")
}

fn refused(bundle: &Bundle, output: &Output, wanted: &str) -> Result<()> {
    let line = refusal(output)?;
    ensure!(line.lines().count() == 1, "more than a line: {line}");
    ensure!(line.contains(wanted), "{wanted:?} is not in {line}");
    ensure!(!line.contains("panicked"), "{line}");
    bundle.nothing_is_left()
}
