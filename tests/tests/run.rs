//! `bulkhead run` as a person uses it: a container in its own virtual machine.

use std::{
    fs,
    io::{Read, Write},
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    pty::{Winsize, openpty},
    sys::{
        signal::Signal,
        termios::{LocalFlags, tcgetattr},
    },
};
use serde_json::json;
use system_tests::{client::until, container::Bundle, slow_reader};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The status of a container that runs `args`.
fn status(args: &[&str]) -> Result<i32> {
    let bundle = Bundle::new(args)?;
    let output = bundle.run()?;
    bundle.nothing_is_left()?;
    let status = output.status.code();
    status.with_context(|| format!("killed: {}", text(&output.stderr)))
}

/// The one line of a failure of bulkhead itself.
fn failure(bundle: &Bundle, output: &Output) -> Result<String> {
    let line = text(&output.stderr);
    ensure!(
        output.status.code() == Some(125),
        "{:?}: {line}",
        output.status
    );
    ensure!(line.starts_with("bulkhead: "), "{line}");
    ensure!(output.stdout.is_empty());
    bundle.nothing_is_left()?;
    Ok(line)
}

#[test]
fn a_container_runs_on_a_kernel_of_its_own() -> Result<()> {
    let bundle = Bundle::new(&["uname", "-r"])?;
    let output = bundle.run()?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let ours = nix::sys::utsname::uname()?;
    assert_ne!(
        text(&output.stdout).trim(),
        ours.release().to_string_lossy()
    );
    assert!(!output.stdout.is_empty());
    bundle.nothing_is_left()
}

#[test]
fn the_exit_status_is_the_commands() -> Result<()> {
    assert_eq!(status(&["true"])?, 0);
    assert_eq!(status(&["false"])?, 1);
    assert_eq!(status(&["sh", "-c", "exit 42"])?, 42);
    Ok(())
}

#[test]
fn a_command_that_a_signal_ended_has_128_and_its_number() -> Result<()> {
    // The first process of a pid namespace is not killed by its own signals.
    assert_eq!(status(&["sh", "-c", "sh -c 'kill -9 $$'; exit $?"])?, 137);
    Ok(())
}

#[test]
fn a_missing_program_is_127_and_one_that_cannot_be_executed_126() -> Result<()> {
    let begin = Instant::now();
    assert_eq!(status(&["true"])?, 0);
    let enough = begin.elapsed() + Duration::from_secs(5);
    let bundle = Bundle::new(&["/bin/absent"])?;
    // Nothing is waited for that only this command's end would end. A machine that is busy with
    // others may take as long, so one quick end of several is enough.
    let mut times = Vec::new();
    while times.iter().all(|time| *time >= enough) {
        ensure!(times.len() < 3, "{times:?}");
        let begin = Instant::now();
        let output = bundle.run()?;
        times.push(begin.elapsed());
        assert_eq!(output.status.code(), Some(127), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("/bin/absent"));
        bundle.nothing_is_left()?;
    }

    let bundle = Bundle::new(&["/tmp/text"])?;
    fs::write(bundle.rootfs().join("tmp/text"), "no program")?;
    fs::set_permissions(
        bundle.rootfs().join("tmp/text"),
        fs::Permissions::from_mode(0o644),
    )?;
    assert_eq!(bundle.run()?.status.code(), Some(126));
    bundle.nothing_is_left()
}

#[test]
fn bytes_of_any_value_go_in_and_come_out_on_their_own_streams() -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "cat; echo to stderr >&2"])?;
    let sent: Vec<u8> = (0..4_000_000_u32)
        .map(|i| (i * 7 + i / 251) as u8)
        .collect();
    let output = bundle.start(&[])?.feed(sent.clone())?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(
        output.stdout == sent,
        "{} bytes came back",
        output.stdout.len()
    );
    assert_eq!(text(&output.stderr), "to stderr\n");
    bundle.nothing_is_left()
}

#[test]
fn a_slow_reader_loses_no_byte_and_grows_no_memory() -> Result<()> {
    // The gibibyte is read in `long_robust.rs`: each byte crosses the same bounded buffers.
    slow_reader::reads(64 << 20)
}

#[test]
fn a_reader_that_leaves_ends_the_writer_as_a_pipe_does() -> Result<()> {
    // Not as the container's first process, which its signals do not kill.
    let bundle = Bundle::new(&["sh", "-c", "echo ready; busybox yes; exit $?"])?;
    let mut run = bundle.start(&[])?;
    run.wait_for_line("ready")?;
    drop(run.child.stdout.take());
    let status = run.child.wait()?;
    assert_eq!(status.code(), Some(128 + 13), "SIGPIPE");
    drop(run);
    bundle.nothing_is_left()
}

#[test]
fn signals_reach_the_command() -> Result<()> {
    let script =
        "trap 'exit 33' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.1; done";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    let mut run = bundle.start(&[])?;
    run.wait_for_line("ready")?;
    run.signal(Signal::SIGUSR1)?;
    run.wait_for_line("usr1")?;
    run.signal(Signal::SIGTERM)?;
    assert_eq!(run.output()?.status.code(), Some(33));
    bundle.nothing_is_left()
}

#[test]
fn a_terminal_has_its_size_and_follows_its_changes() -> Result<()> {
    let script = "stty size; until [ \"$(stty size)\" = '25 80' ]; do sleep 0.1; done; stty size; \
                  read answer; echo $answer | cat; tty=$(stty -g)";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    bundle.edit(|config| config["process"]["terminal"] = json!(true))?;
    let size = |ws_row, ws_col| Winsize {
        ws_row,
        ws_col,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = openpty(&size(40, 120), None)?;
    let end = || pty.slave.try_clone().map(Stdio::from);
    let mut child = bundle
        .command(&[])?
        .stdin(end()?)
        .stdout(end()?)
        .stderr(end()?)
        .spawn()?;
    let mut terminal = fs::File::from(pty.master.try_clone()?);
    expect(&mut terminal, "40 120")?;
    set_size(&pty.master, size(25, 80))?;
    // The terminal is not this child's controlling one, so nobody else tells it.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.id() as i32),
        Signal::SIGWINCH,
    )?;
    expect(&mut terminal, "25 80")?;
    terminal.write_all(b"yes\r")?;
    expect(&mut terminal, "yes")?;
    assert_eq!(child.wait()?.code(), Some(0));
    let mode = tcgetattr(&pty.slave)?;
    assert!(
        mode.local_flags.contains(LocalFlags::ECHO),
        "the terminal stays raw"
    );
    bundle.nothing_is_left()
}

fn expect(terminal: &mut impl Read, wanted: &str) -> Result<()> {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !text(&seen).contains(wanted) {
        ensure!(
            terminal.read(&mut byte)? == 1,
            "no {wanted:?} in {:?}",
            text(&seen)
        );
        seen.push(byte[0]);
    }
    Ok(())
}

/// As a terminal emulator does when its window changes.
fn set_size(terminal: &impl AsFd, size: Winsize) -> Result<()> {
    let terminal = Stdio::from(terminal.as_fd().try_clone_to_owned()?);
    let (rows, columns) = (size.ws_row.to_string(), size.ws_col.to_string());
    let status = Command::new("stty")
        .args(["rows", &rows, "columns", &columns])
        .stdin(terminal)
        .status()?;
    ensure!(status.success(), "stty failed");
    Ok(())
}

#[test]
fn a_name_in_use_is_refused_and_the_first_container_lives_on() -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "echo ready; cat"])?;
    let mut first = bundle.start(&[])?;
    first.wait_for_line("ready")?;
    let second = bundle.run()?;
    assert_eq!(second.status.code(), Some(125));
    assert!(
        text(&second.stderr).contains("already exists"),
        "{}",
        text(&second.stderr)
    );
    let output = first.feed(b"still here".to_vec())?;
    assert_eq!(text(&output.stdout), "still here");
    bundle.nothing_is_left()
}

#[test]
fn a_kernel_that_is_none_and_an_image_that_is_cut_are_refused() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    let busybox = bundle.path().join("kernel");
    fs::write(&busybox, "this is no kernel")?;
    let output = bundle.run_with(&["--kernel", &busybox.to_string_lossy()])?;
    let line = failure(&bundle, &output)?;
    assert!(line.contains("kernel"), "{line}");

    let image = fs::read(system_tests::guest::share("guest.img")?)?;
    let cut = bundle.path().join("cut.img");
    fs::write(&cut, &image[..image.len() / 2])?;
    let output = bundle.run_with(&["--image", &cut.to_string_lossy()])?;
    let line = failure(&bundle, &output)?;
    assert!(line.contains("truncated"), "{line}");
    Ok(())
}

#[test]
fn a_guest_that_never_boots_is_given_up_at_the_deadline() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    let kernel = bundle.path().join("sleeper");
    fs::write(&kernel, sleeper())?;
    let kernel = kernel.to_string_lossy();
    let output = bundle.run_with(&["--kernel", &kernel, "--start-timeout", "2"])?;
    let line = failure(&bundle, &output)?;
    assert!(line.contains("did not boot within 2 s"), "{line}");
    assert!(line.contains("console"), "{line}");
    Ok(())
}

/// An ELF program for the bare machine that sleeps for ever: `cli; hlt; jmp` to the `hlt`.
fn sleeper() -> Vec<u8> {
    let code = [0xfa, 0xf4, 0xeb, 0xfd];
    let at: u64 = 0x10_0000;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |elf: &mut Vec<u8>, values: &[u16]| {
        values
            .iter()
            .for_each(|value| elf.extend(value.to_le_bytes()));
    };
    let long = |elf: &mut Vec<u8>, values: &[u64]| {
        values
            .iter()
            .for_each(|value| elf.extend(value.to_le_bytes()));
    };
    half(&mut elf, &[2, 62, 1, 0]); // executable, x86-64, version
    long(&mut elf, &[at, 64, 0]); // entry, program headers, no sections
    half(&mut elf, &[0, 0, 64, 56, 1, 64, 0, 0]); // flags, sizes, one program header
    half(&mut elf, &[1, 0, 5, 0]); // loaded, readable and executable
    long(
        &mut elf,
        &[120, at, at, code.len() as u64, code.len() as u64, 4096],
    );
    elf.extend(code);
    elf
}

#[test]
fn a_small_guest_has_the_limits_of_a_host() -> Result<()> {
    let script = "ulimit -n; ulimit -u; cat /proc/sys/net/ipv4/tcp_mem";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    // More than Linux lets a process have by itself.
    let files = json!({"type": "RLIMIT_NOFILE", "hard": 2_000_000, "soft": 2_000_000});
    bundle.edit(|config| config["process"]["rlimits"] = json!([files]))?;
    let output = bundle.run()?;
    let said = String::from_utf8(output.stdout)?;
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines[..2], ["2000000", "unlimited"], "{said}");
    let tcp: Vec<u64> = lines[2].split_whitespace().flat_map(str::parse).collect();
    assert_eq!(tcp[2], 4 * tcp[1], "{said}");
    bundle.nothing_is_left()
}

#[test]
fn a_vmm_that_is_killed_ends_the_command_with_the_reason() -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "echo ready; sleep 1000"])?;
    let mut run = bundle.start(&[])?;
    run.wait_for_line("ready")?;
    nix::sys::signal::kill(run.vmm()?, Signal::SIGKILL)?;
    let line = failure(&bundle, &run.output()?)?;
    assert!(line.contains("the VMM was killed by signal 9"), "{line}");
    Ok(())
}

#[test]
fn a_command_that_is_killed_takes_its_machine_along_and_its_name_is_free_again() -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "echo ready; cat"])?;
    let mut run = bundle.start(&[])?;
    run.wait_for_line("ready")?;
    let vmm = run.vmm()?;
    run.signal(Signal::SIGKILL)?;
    run.child.wait()?;
    let vmm = Path::new("/proc").join(vmm.to_string());
    until("the VMM's end", || Ok(!vmm.exists()))?;
    assert_eq!(bundle.run()?.status.code(), Some(0));
    bundle.nothing_is_left()
}

#[test]
fn ctrl_c_at_any_moment_of_the_start_leaves_nothing() -> Result<()> {
    // The kernel drops a signal to a first process that does not catch it, so this one does.
    let command = "trap 'exit 130' INT; while :; do sleep 0.1; done";
    let bundle = Bundle::new(&["sh", "-c", command])?;
    for moment_ms in [30, 150, 400, 800, 1500, 2500] {
        let run = bundle.start(&[])?;
        std::thread::sleep(Duration::from_millis(moment_ms));
        let output = run.interrupted()?;
        let by_signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
        // Before it catches the signal, the command dies of it as any other.
        let ended = output.status.code() == Some(130) || by_signal == Some(2);
        assert!(
            ended,
            "at {moment_ms} ms: {:?} {}",
            output.status,
            text(&output.stderr)
        );
        bundle
            .nothing_is_left()
            .with_context(|| format!("at {moment_ms} ms"))?;
    }
    Ok(())
}

#[test]
fn the_trace_of_a_start_is_drawn_and_kept() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    let file = bundle.path().join("trace.json");
    let output = bundle.run_with(&["--trace"])?;
    assert!(
        text(&output.stderr).contains("process executed"),
        "{}",
        text(&output.stderr)
    );
    bundle.run_with(&[&format!("--trace={}", file.display())])?;
    let trace: serde_json::Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
    let spans = trace["spans"].as_array().context("no spans")?;
    assert!(spans.iter().any(|span| span["name"] == "kernel booted"));
    bundle.nothing_is_left()
}

#[test]
fn a_host_that_runs_machines_is_found_to_do_so() -> Result<()> {
    let program = system_tests::guest::bin("bulkhead")?;
    let output = Command::new(&program)
        .args(["check", "--start-timeout", "100"])
        .output()?;
    let report = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert!(report.contains("boots Linux"), "{report}");
    assert!(
        report.ends_with("This host runs virtual machines.\n"),
        "{report}"
    );
    Ok(())
}

#[test]
fn the_cgroup_of_another_container_is_left_alone() -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "echo here; cat"])?;
    let mut running = bundle.start(&[])?;
    running.wait_for_line("here")?;
    // Of the same name, but with a state directory of its own.
    let other = Bundle::new(&["true"])?;
    let output = other.run()?;
    let line = text(&output.stderr);
    ensure!(output.status.code() == Some(125), "{line}");
    ensure!(
        line.contains("/sys/fs/cgroup/bulkhead/web has processes of another"),
        "{line}"
    );
    drop(running.child.stdin.take());
    let output = running.output()?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    bundle.nothing_is_left()
}
