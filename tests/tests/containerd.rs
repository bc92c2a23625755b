//! containerd's own client, ctr, with runc and with Bulkhead below it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use system_tests::{
    client::{
        Runtime,
        command::{feed, run},
        containerd::Programs,
        ctr::Story,
        terminal::Terminal,
        until,
    },
    container::{Bundle, FREEZE_THE_AGENT, with_the_guests_cgroups},
    guest::bin,
    steps::Who,
    tasks,
};

/// Soon, on a busy lab machine: the limit of what must not wait for anything. What waited for the
/// guest would take longer: the 32 seconds that a call has with one CPU.
const SOON: Duration = Duration::from_secs(30);

/// A shell that begins when its terminal has a size, which ctr sets after the start.
const SIZED: &str = "until stty size 2> /dev/null | grep -qv '^0'; do sleep 0.1; done; \
                     echo sized $(stty size); exec sh";

/// The events of a containerd, as `ctr events` prints them from now on.
struct Events {
    client: Child,
    file: tempfile::NamedTempFile,
}

impl Events {
    fn follow(story: &Story) -> Result<Self> {
        let file = tempfile::NamedTempFile::new()?;
        let client = story
            .containerd
            .command(&["events"])
            .stdout(Stdio::from(file.reopen()?))
            .spawn()?;
        Ok(Self { client, file })
    }

    /// The topics of `container`'s events, in order.
    fn topics(&self, container: &str) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.file.path())?;
        let ours = text
            .lines()
            .filter(|line| line.contains(&format!("\"{container}\"")));
        let topics = ours.filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with("/tasks/"))
        });
        Ok(topics.map(str::to_owned).collect())
    }

    /// Whether they tell this of `container`.
    fn tell(&self, container: &str, topic: &str) -> Result<bool> {
        Ok(self.topics(container)?.iter().any(|told| told == topic))
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

#[test]
fn a_container_lives_through_every_verb_as_with_runc() -> Result<()> {
    for runtime in Runtime::all()? {
        let story = Story::begin(runtime, Programs::Debian)?;
        let lived = every_verb(&story, runtime);
        story.tell(lived)?;
        story.end()?;
    }
    Ok(())
}

fn every_verb(story: &Story, runtime: Runtime) -> Result<()> {
    let events = Events::follow(story)?;
    hungry(story, &events)?;
    let log = story.containerd.path().join("t1.out");
    let log_uri = format!("file://{}", log.display());
    let volume = story.containerd.path().join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("given"), "by the host\n")?;
    let mount = format!(
        "type=bind,src={},dst=/volume,options=rbind:rw",
        volume.display()
    );
    let flags = [
        "-d",
        "--log-uri",
        &log_uri,
        "--memory-limit",
        "67108864",
        "--cpus",
        "0.5",
        "--mount",
        &mount,
    ];
    let script = "trap 'echo usr1' USR1; trap 'exit 5' TERM; cat /volume/given; echo error >&2; while :; do sleep 0.1; done";
    story
        .ctr(&story.run(&flags, "t1", &["sh", "-c", script]))?
        .ends_with(0)?;
    assert_eq!(story.status("t1")?, "RUNNING");
    // The streams come by ways of their own: which line is first is not said.
    until("the log", || {
        let text = fs::read_to_string(&log)?;
        Ok(text.contains("by the host\n") && text.contains("error\n"))
    })?;

    // The name is taken.
    let again = story.ctr(&["tasks", "start", "t1"])?;
    assert_ne!(again.status, 0);
    again.tells("already exists")?;

    // Execs: output, status, input, a missing program.
    let exec = |id: &'static str, command: &[&'static str]| {
        story.ctr(&[&["tasks", "exec", "--exec-id", id, "t1"], command].concat())
    };
    exec("e1", &["echo", "executed"])?.prints("executed")?;
    exec("e2", &["sh", "-c", "exit 9"])?.ends_with(9)?;
    exec("e1", &["sh", "-c", "echo kept > /volume/written"])?.ends_with(0)?;
    assert_eq!(fs::read_to_string(volume.join("written"))?, "kept\n");
    let mut command = story
        .containerd
        .command(&["tasks", "exec", "--exec-id", "e3", "t1", "cat"]);
    feed(&mut command, b"through a pipe\n")?.prints("through a pipe")?;
    let missing = exec("e4", &["absent"])?;
    assert_ne!(missing.status, 0);
    missing.tells("executable file not found in $PATH")?;

    // A terminal in an exec.
    let shell = [
        "tasks",
        "exec",
        "-t",
        "--exec-id",
        "e5",
        "t1",
        "sh",
        "-c",
        SIZED,
    ];
    let mut terminal = Terminal::start(story.containerd.command(&shell), 33, 101)?;
    terminal.shows("sized 33 101")?;
    terminal.type_in("exit 4\n")?;
    assert_eq!(terminal.end()?.0, 4);

    // Counters.
    let metrics: Value =
        serde_json::from_str(&story.text(&["tasks", "metrics", "--format", "json", "t1"])?)?;
    assert!(
        metrics["memory"]["usage"].as_u64() > Some(100_000),
        "{metrics}"
    );
    assert_eq!(metrics["memory"]["usage_limit"], 67_108_864, "{metrics}");
    assert!(metrics["cpu"]["usage_usec"].as_u64() > Some(0), "{metrics}");
    assert!(metrics["pids"]["current"].as_u64() > Some(0), "{metrics}");

    // Frozen, and thawed.
    story.ctr(&["tasks", "pause", "t1"])?.ends_with(0)?;
    assert_eq!(story.status("t1")?, "PAUSED");
    story.ctr(&["tasks", "resume", "t1"])?.ends_with(0)?;
    assert_eq!(story.status("t1")?, "RUNNING");
    let pid = story.pid("t1")?;
    story.ctr(&["tasks", "ps", "t1"])?.tells(&pid.to_string())?;
    ensure!(
        Path::new(&format!("/proc/{pid}")).exists(),
        "{pid} is no process"
    );

    // The command line has nothing of that name.
    if runtime.is_ours() {
        run(Command::new(bin("bulkhead")?).args(["delete", "--force", "t1"]))?.ends_with(0)?;
        run(Command::new(bin("bulkhead")?).arg("gc"))?.prints("")?;
        assert_eq!(story.status("t1")?, "RUNNING");
    }

    // What cannot be done is refused, and changes nothing.
    let checkpoint = story.ctr(&["tasks", "checkpoint", "t1"])?;
    assert_ne!(checkpoint.status, 0);
    if runtime.is_ours() {
        checkpoint.tells("cannot be checkpointed")?;
    }
    let deleted = story.ctr(&["tasks", "delete", "t1"])?;
    assert_ne!(deleted.status, 0);
    assert_eq!(story.status("t1")?, "RUNNING");

    // Signals: one that is caught, one that ends it.
    story
        .ctr(&["tasks", "kill", "--signal", "SIGUSR1", "t1"])?
        .ends_with(0)?;
    until("the signal", || {
        Ok(fs::read_to_string(&log)?.contains("usr1"))
    })?;
    story
        .ctr(&["tasks", "kill", "--signal", "SIGTERM", "t1"])?
        .ends_with(0)?;
    until("the end", || Ok(story.status("t1")? == "STOPPED"))?;
    let late = story.ctr(&["tasks", "kill", "--signal", "SIGTERM", "t1"])?;
    assert_ne!(late.status, 0);
    late.tells("process already finished")?;
    story.removed("t1", 5)?;
    story.ctr(&["containers", "rm", "t1"])?.ends_with(0)?;

    let expected = ["create", "start", "exec-added", "exec-started", "exit"];
    let expected: Vec<_> = expected.map(|topic| format!("/tasks/{topic}")).into();
    until("the last event", || {
        Ok(events
            .topics("t1")?
            .last()
            .is_some_and(|last| last == "/tasks/delete"))
    })?;
    let topics = events.topics("t1")?;
    assert_eq!(topics[..5], expected[..], "{topics:?}");
    let place = |topic: &str| topics.iter().position(|known| known == topic);
    assert!(
        place("/tasks/paused") < place("/tasks/resumed"),
        "{topics:?}"
    );
    Ok(())
}

/// One that runs out of the memory that it may have: it is told, counted, and goes on.
fn hungry(story: &Story, events: &Events) -> Result<()> {
    let script = "dd if=/dev/zero bs=1M count=64 2> /dev/null | tail > /dev/null; sleep 1000";
    let flags = ["-d", "--memory-limit", "33554432"];
    story
        .ctr(&story.run(&flags, "hungry", &["sh", "-c", script]))?
        .ends_with(0)?;
    until("the event", || events.tell("hungry", "/tasks/oom"))?;
    assert_eq!(story.status("hungry")?, "RUNNING");
    let metrics: Value =
        serde_json::from_str(&story.text(&["tasks", "metrics", "--format", "json", "hungry"])?)?;
    let kills = &metrics["memory_events"]["oom_kill"];
    assert!(kills.as_u64() > Some(0), "{metrics}");
    story
        .ctr(&["tasks", "rm", "-f", "hungry"])?
        .tells("non-zero exit code 137")?;
    story
        .ctr(&["containers", "rm", "hungry"])?
        .ends_with(0)
        .map(drop)
}

#[test]
fn containers_that_are_waited_for_end_as_with_runc() -> Result<()> {
    for runtime in Runtime::all()? {
        let story = Story::begin(runtime, Programs::Debian)?;
        let ended = waited_for(&story, runtime);
        story.tell(ended)?;
        story.end()?;
    }
    Ok(())
}

fn waited_for(story: &Story, runtime: Runtime) -> Result<()> {
    // Both streams, the status, and nothing left.
    let script = ["sh", "-c", "echo out; echo err >&2; exit 3"];
    let done = story.ctr(&story.run(&["--rm"], "t2", &script))?;
    done.ends_with(3)?;
    assert_eq!(
        (done.stdout.as_str(), done.stderr.as_str()),
        ("out\n", "err\n")
    );

    // A terminal.
    let shell = story.run(&["--rm", "-t"], "t3", &["sh", "-c", SIZED]);
    let mut terminal = Terminal::start(story.containerd.command(&shell), 30, 90)?;
    terminal.shows("sized 30 90")?;
    terminal.type_in("tty\n")?;
    terminal.shows("/dev/pts/0")?;
    terminal.type_in("exit 6\n")?;
    assert_eq!(terminal.end()?.0, 6);

    // A program that logs, and has all when the task is gone.
    let (logger, log) = logger(story.containerd.path())?;
    let done = story.ctr(&story.run(&["--rm", "--log-uri", &logger], "t4", &script))?;
    done.ends_with(3)?;
    let logged = fs::read_to_string(log)?;
    assert!(logged.starts_with("default t4 key value\n"), "{logged}");
    // runc's shim does not wait for the logger.
    if runtime.is_ours() {
        assert_eq!(logged, "default t4 key value\nout\nerr\n");
    }

    // A program that is missing: nothing is left of its task.
    let done = story.ctr(&story.run(&["--rm"], "t5", &["absent"]))?;
    assert_ne!(done.status, 0);
    done.tells("executable file not found in $PATH")?;
    assert_eq!(story.status("t5")?, "ABSENT");

    // What is forced away.
    story
        .ctr(&story.run(&["-d"], "t6", &["sleep", "1000"]))?
        .ends_with(0)?;
    story
        .ctr(&["tasks", "rm", "-f", "t6"])?
        .tells("non-zero exit code 137")?;
    story.ctr(&["containers", "rm", "t6"])?.ends_with(0)?;
    Ok(())
}

/// A `binary://` logger and the file that it writes.
fn logger(directory: &Path) -> Result<(String, std::path::PathBuf)> {
    let (program, log) = (directory.join("logger"), directory.join("logged"));
    let script = format!(
        "#!/bin/sh\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $1 $2\" > {log}\n\
         exec 5>&-\ncat <&3 >> {log}\ncat <&4 >> {log}\n",
        log = log.display()
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok((format!("binary://{}?key=value", program.display()), log))
}

#[test]
fn a_containerd_that_is_killed_finds_its_containers_again() -> Result<()> {
    for programs in [Programs::Debian, Programs::Testing] {
        let mut story = Story::begin(Runtime::Bulkhead, programs)?;
        let found = found_again(&mut story);
        story.tell(found)?;
        story.end()?;
    }
    Ok(())
}

fn found_again(story: &mut Story) -> Result<()> {
    let log = story.containerd.path().join("t1.out");
    let log_uri = format!("file://{}", log.display());
    let script = "echo up; trap 'exit 7' TERM; while :; do sleep 0.1; done";
    for id in ["stays", "ends", "lost"] {
        let flags = ["-d", "--log-uri", &log_uri];
        story
            .ctr(&story.run(&flags, id, &["sh", "-c", script]))?
            .ends_with(0)?;
    }
    let given = story.containerd.path().join("given");
    fs::create_dir(&given)?;
    let mount = format!(
        "type=bind,src={},dst=/given,options=rbind:rw",
        given.display()
    );
    let script = "until [ -e /given/go ]; do sleep 0.1; done; touch /given/gone; exit 9";
    story
        .ctr(&story.run(&["-d", "--mount", &mount], "leaves", &["sh", "-c", script]))?
        .ends_with(0)?;
    let ends = story.pid("ends")?;
    let lost = (story.shim("lost")?, story.pid("lost")?);
    story.containerd.kill()?;
    // One loses its shim, and there is nobody to clean up after it.
    kill(lost.0, Signal::SIGKILL)?;
    until("the machine's end", || {
        Ok(!Path::new(&format!("/proc/{}", lost.1)).exists())
    })?;
    run(Command::new(bin("bulkhead")?).arg("gc"))?.prints("lost")?;
    // One ends while nobody looks: its machine is killed. Another ends by itself.
    kill(ends, Signal::SIGKILL)?;
    fs::write(given.join("go"), "")?;
    until("its last deed", || Ok(given.join("gone").exists()))?;
    story.containerd.restart()?;
    assert_eq!(story.status("stays")?, "RUNNING");
    assert_eq!(story.status("ends")?, "STOPPED");
    assert_eq!(story.status("lost")?, "ABSENT");
    until("the end", || Ok(story.status("leaves")? == "STOPPED"))?;
    story.removed("leaves", 9)?;
    story
        .ctr(&["tasks", "exec", "--exec-id", "e1", "stays", "echo", "here"])?
        .prints("here")?;
    story.removed("ends", 137)?;
    story.ctr(&["tasks", "kill", "stays"])?.ends_with(0)?;
    until("the end", || Ok(story.status("stays")? == "STOPPED"))?;
    story.removed("stays", 7)?;
    story
        .ctr(&["containers", "rm", "stays", "ends", "leaves", "lost"])?
        .ends_with(0)?;
    Ok(())
}

#[test]
fn a_killed_machine_or_shim_ends_its_container_at_once_and_leaves_nothing() -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Debian)?;
    let ended = killed(&story);
    story.tell(ended)?;
    story.end()
}

fn killed(story: &Story) -> Result<()> {
    // The machine: the client hears of it, and the task can still be asked for and removed.
    let mut client = story
        .containerd
        .command(&story.run(&[], "t1", &["sleep", "1000"]));
    let mut client = client.stdin(Stdio::null()).spawn()?;
    until("the start", || Ok(story.status("t1")? == "RUNNING"))?;
    let machine = story.pid("t1")?;
    let begun = Instant::now();
    kill(machine, Signal::SIGKILL)?;
    let status = client.wait()?;
    assert_eq!(status.code(), Some(137));
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    story.ctr(&["containers", "rm", "t1"])?.ends_with(0)?;

    // Without a client that waits: the event comes, and the dead still answers.
    let events = Events::follow(story)?;
    story
        .ctr(&story.run(&["-d"], "t3", &["sleep", "1000"]))?
        .ends_with(0)?;
    let machine = story.pid("t3")?;
    let begun = Instant::now();
    kill(machine, Signal::SIGKILL)?;
    until("the event of its end", || events.tell("t3", "/tasks/exit"))?;
    println!("the machine's death was told after {:?}", begun.elapsed());
    assert_eq!(story.status("t3")?, "STOPPED");
    story
        .ctr(&["tasks", "kill", "--signal", "SIGKILL", "t3"])?
        .tells("process already finished")?;
    until("its end in containerd's log", || {
        let logs = story.containerd.logs();
        Ok(logs.contains("the VMM was killed by signal 9"))
    })?;
    story.removed("t3", 137)?;
    until("the event of its removal", || {
        events.tell("t3", "/tasks/delete")
    })?;
    story.ctr(&["containers", "rm", "t3"])?.ends_with(0)?;

    // The shim: containerd cleans up after it.
    story
        .ctr(&story.run(&["-d"], "t2", &["sleep", "1000"]))?
        .ends_with(0)?;
    let machine = story.pid("t2")?;
    kill(story.shim("t2")?, Signal::SIGKILL)?;
    until("the machine's end", || {
        Ok(!Path::new(&format!("/proc/{machine}")).exists())
    })?;
    until("containerd's clean-up", || {
        Ok(story.status("t2")? == "ABSENT")
    })?;
    story.ctr(&["containers", "rm", "t2"])?.ends_with(0)?;
    Ok(())
}

#[test]
fn whoever_is_killed_at_a_step_of_a_tasks_life_leaves_nothing_to_containerd() -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Debian)?;
    for (who, steps) in [
        (Who::Command, &[8][..]),
        (Who::Pod, &[12, 40, 89]),
        (Who::Vmm, &[14]),
    ] {
        let kills = tasks::kill_at_steps(&story, who, steps.iter().copied());
        let kills = story.tell(kills)?;
        // The last may be beyond the end, which is nearer when the others' turns fall otherwise.
        ensure!(
            kills == steps.len() || (kills > 0 && kills == steps.len() - 1),
            "{who:?} has only {kills} of {steps:?}"
        );
    }
    story.tell(tasks::give_up(&story))?;
    story.end()
}

#[test]
fn ten_tasks_have_one_name_one_after_the_other() -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Debian)?;
    story.tell(tasks::cycles(&story, 10))?;
    story.end()
}

#[test]
fn several_tasks_at_once_do_not_grow_and_leave_nothing() -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Debian)?;
    story.tell(tasks::at_once(&story, 3, 10))?;
    story.end()
}

#[test]
fn a_guest_that_panics_or_hangs_ends_with_a_status_and_an_event() -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Debian)?;
    let ended = panicked_and_hung(&story);
    story.tell(ended)?;
    story.end()
}

fn panicked_and_hung(story: &Story) -> Result<()> {
    let events = Events::follow(story)?;
    let exited = |id: &str| events.tell(id, "/tasks/exit");

    let script = "sleep 2; echo c > /proc/sysrq-trigger; sleep 1000";
    let flags = ["-d", "--privileged"];
    story
        .ctr(&story.run(&flags, "panics", &["sh", "-c", script]))?
        .ends_with(0)?;
    until("the panic", || Ok(story.status("panics")? == "STOPPED"))?;
    until("the event of its end", || exited("panics"))?;
    let logs = story.containerd.logs();
    ensure!(logs.contains("sysrq triggered crash"), "no last lines");
    let late = story.ctr(&["tasks", "exec", "--exec-id", "e1", "panics", "true"])?;
    assert_ne!(late.status, 0);
    story.removed("panics", 137)?;

    // One that answers nothing at all: the guest with its agent stands still.
    story
        .ctr(&story.run(&["-d"], "hangs", &["sleep", "1000"]))?
        .ends_with(0)?;
    kill(story.pid("hangs")?, Signal::SIGSTOP)?;
    let begun = Instant::now();
    assert_eq!(story.status("hangs")?, "RUNNING");
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    story
        .ctr(&["tasks", "kill", "--signal", "SIGKILL", "hangs"])?
        .ends_with(0)?;
    until("the end", || Ok(story.status("hangs")? == "STOPPED"))?;
    // The guest had ten seconds to take the signal.
    assert!(begun.elapsed() < 2 * SOON, "{:?}", begun.elapsed());
    until("the event of its end", || exited("hangs"))?;
    story.removed("hangs", 137)?;

    // Only the agent stands still.
    let bundle = Bundle::new(&["sh", "-c", FREEZE_THE_AGENT])?;
    bundle.edit(|config| {
        with_the_guests_cgroups(config);
        config["root"]["path"] = bundle.rootfs().to_string_lossy().into();
    })?;
    let config = bundle.path().join("config.json");
    let config = config.to_string_lossy();
    let log = story.containerd.path().join("frozen.out");
    let log_uri = format!("file://{}", log.display());
    let fixed = ["run", "--runtime", story.runtime, "-d"];
    let given = ["--log-uri", &log_uri, "--config", &config, "frozen"];
    story.ctr(&[&fixed[..], &given].concat())?.ends_with(0)?;
    until("its word", || Ok(fs::read_to_string(&log)? == "up\n"))?;
    assert_eq!(story.status("frozen")?, "RUNNING");
    let begun = Instant::now();
    story
        .ctr(&["tasks", "kill", "--signal", "SIGKILL", "frozen"])?
        .ends_with(0)?;
    until("the event of its end", || exited("frozen"))?;
    println!(
        "an agent that stands still: told after {:?}",
        begun.elapsed()
    );
    assert_eq!(story.status("frozen")?, "STOPPED");
    story.removed("frozen", 137)?;
    story
        .ctr(&["containers", "rm", "panics", "hangs", "frozen"])?
        .ends_with(0)?;
    Ok(())
}

#[test]
fn containerd_2_speaks_to_the_same_shim() -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Testing)?;
    story.ctr(&["version"])?.tells("2.")?;
    let spoken =
        every_verb(&story, Runtime::Bulkhead).and_then(|()| waited_for(&story, Runtime::Bulkhead));
    story.tell(spoken)?;
    story.end()
}
