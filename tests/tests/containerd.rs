//! containerd's own client, ctr, with runc and with Bulkhead below it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use system_tests::client::{
    Runtime,
    command::Done,
    containerd::{Containerd, Programs},
    images::BUSYBOX,
    leftovers::Leftovers,
    terminal::Terminal,
    until,
};

/// Soon, on a busy lab machine: the limit of what must not wait for anything.
const SOON: Duration = Duration::from_secs(10);

/// A shell that begins when its terminal has a size, which ctr sets after the start.
const SIZED: &str = "until stty size 2> /dev/null | grep -qv '^0'; do sleep 0.1; done; \
                     echo sized $(stty size); exec sh";

/// A containerd with the image, and what the host had before.
struct Story {
    containerd: Containerd,
    runtime: &'static str,
    before: Leftovers,
}

impl Story {
    fn begin(runtime: Runtime, programs: Programs) -> Result<Self> {
        let containerd = Containerd::start_from(programs)?;
        containerd.import("default", &[BUSYBOX])?;
        let runtime = match runtime {
            Runtime::Runc => "io.containerd.runc.v2",
            Runtime::Bulkhead => "io.containerd.bulkhead.v2",
        };
        Ok(Self {
            containerd,
            runtime,
            before: Leftovers::now()?,
        })
    }

    /// Runs a command of ctr.
    fn ctr(&self, args: &[&str]) -> Result<Done> {
        self.containerd.ctr(args)
    }

    /// Runs a command of ctr that succeeds, and returns what it printed.
    fn text(&self, args: &[&str]) -> Result<String> {
        Ok(self.ctr(args)?.text()?.to_owned())
    }

    /// The arguments of `ctr run` for this runtime.
    fn run<'a>(&self, flags: &[&'a str], id: &'a str, command: &[&'a str]) -> Vec<&'a str>
    where
        Self: 'a,
    {
        let fixed = ["run", "--runtime", self.runtime];
        [&fixed[..], flags, &[BUSYBOX, id], command].concat()
    }

    /// What `ctr tasks ls` says of a task.
    fn status(&self, id: &str) -> Result<String> {
        let list = self.text(&["tasks", "ls"])?;
        let line = list
            .lines()
            .find(|line| line.starts_with(&format!("{id} ")));
        let status = line.and_then(|line| line.split_whitespace().nth(2));
        Ok(status.unwrap_or("ABSENT").to_owned())
    }

    /// The pid of a task on the host.
    fn pid(&self, id: &str) -> Result<Pid> {
        let list = self.text(&["tasks", "ls"])?;
        let line = list
            .lines()
            .find(|line| line.starts_with(&format!("{id} ")));
        let pid = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(Pid::from_raw(pid.context("no such task")?.parse()?))
    }

    /// Removes a task that has ended with this status, which ctr tells in words.
    fn removed(&self, id: &str, status: u32) -> Result<()> {
        let told = format!("non-zero exit code {status}");
        self.ctr(&["tasks", "delete", id])?.tells(&told).map(drop)
    }

    /// Ends with a host as it was; runc leaves the namespace's cgroup.
    fn end(self) -> Result<()> {
        if self.runtime != "io.containerd.bulkhead.v2" {
            return Ok(());
        }
        self.before
            .are_all()
            .with_context(|| self.containerd.logs())
    }

    /// Fails with the logs.
    fn tell<T>(&self, result: Result<T>) -> Result<T> {
        result.with_context(|| self.containerd.logs())
    }
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
    let mut story = Story::begin(Runtime::Bulkhead, Programs::Debian)?;
    let found = found_again(&mut story);
    story.tell(found)?;
    story.end()
}

fn found_again(story: &mut Story) -> Result<()> {
    let log = story.containerd.path().join("t1.out");
    let log_uri = format!("file://{}", log.display());
    let script = "echo up; trap 'exit 7' TERM; while :; do sleep 0.1; done";
    for id in ["stays", "ends"] {
        let flags = ["-d", "--log-uri", &log_uri];
        story
            .ctr(&story.run(&flags, id, &["sh", "-c", script]))?
            .ends_with(0)?;
    }
    let ends = story.pid("ends")?;
    story.containerd.kill()?;
    // One ends while nobody looks: its machine is killed.
    kill(ends, Signal::SIGKILL)?;
    story.containerd.restart()?;
    assert_eq!(story.status("stays")?, "RUNNING");
    assert_eq!(story.status("ends")?, "STOPPED");
    story
        .ctr(&["tasks", "exec", "--exec-id", "e1", "stays", "echo", "here"])?
        .prints("here")?;
    story.removed("ends", 137)?;
    story.ctr(&["tasks", "kill", "stays"])?.ends_with(0)?;
    until("the end", || Ok(story.status("stays")? == "STOPPED"))?;
    story.removed("stays", 7)?;
    story
        .ctr(&["containers", "rm", "stays", "ends"])?
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

    // The shim: containerd cleans up after it.
    story
        .ctr(&story.run(&["-d"], "t2", &["sleep", "1000"]))?
        .ends_with(0)?;
    let machine = story.pid("t2")?;
    let status = fs::read_to_string(format!("/proc/{machine}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let shim = Pid::from_raw(parent.context("no parent")?.trim().parse()?);
    kill(shim, Signal::SIGKILL)?;
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
fn containerd_2_speaks_to_the_same_shim() -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Testing)?;
    let spoken = containerd_2(&story);
    story.tell(spoken)?;
    story.end()
}

fn containerd_2(story: &Story) -> Result<()> {
    story.ctr(&["version"])?.tells("2.")?;
    let script = ["sh", "-c", "echo out; echo err >&2; exit 3"];
    let done = story.ctr(&story.run(&["--rm"], "t1", &script))?;
    done.ends_with(3)?;
    assert_eq!(
        (done.stdout.as_str(), done.stderr.as_str()),
        ("out\n", "err\n")
    );
    story
        .ctr(&story.run(&["-d"], "t2", &["sleep", "1000"]))?
        .ends_with(0)?;
    story
        .ctr(&["tasks", "exec", "--exec-id", "e1", "t2", "echo", "executed"])?
        .prints("executed")?;
    story.ctr(&["tasks", "pause", "t2"])?.ends_with(0)?;
    story.ctr(&["tasks", "resume", "t2"])?.ends_with(0)?;
    story.ctr(&["tasks", "metrics", "t2"])?.ends_with(0)?;
    story
        .ctr(&["tasks", "kill", "--signal", "SIGKILL", "t2"])?
        .ends_with(0)?;
    until("the end", || Ok(story.status("t2")? == "STOPPED"))?;
    story.removed("t2", 137)?;
    story.ctr(&["containers", "rm", "t2"])?.ends_with(0)?;
    Ok(())
}
