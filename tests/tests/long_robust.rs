//! All steps of a start, and many containers: what `robust.rs` does in part.

use std::{
    env, fs,
    ops::RangeFrom,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use system_tests::{
    client::{
        Runtime,
        containerd::{Containerd, Programs},
        ctr::Story,
        leftovers::Leftovers,
    },
    container::{Bundle, FREEZE_THE_AGENT, with_the_guests_cgroups},
    slow_reader,
    steps::Who,
    tasks, trials,
    verbs::{Container, eventually, eventually_within},
};

/// How long it may take, on a busy machine, until an agent that stands still is found: it is asked
/// after twenty to forty seconds, and its silence counts for sixty.
const FOUND: Duration = Duration::from_secs(600);

/// Longer than an agent is silent before it is found.
const STOPPED: Duration = Duration::from_secs(150);

/// What is said then.
const REASON: &str = "the agent has not answered for 60 s, while the virtual machine ran";

/// The first step of a walk; one that was cut short is taken up again with `BULKHEAD_FIRST_STEP`.
fn walk(who: Who, kill_at_steps: impl FnOnce(RangeFrom<usize>) -> Result<usize>) -> Result<()> {
    let first = match env::var("BULKHEAD_FIRST_STEP") {
        Ok(number) => number.parse().context("BULKHEAD_FIRST_STEP")?,
        Err(_) => 1,
    };
    let kills = kill_at_steps(first..)?;
    ensure!(kills > 1, "{who:?} has only {kills} steps from {first} on");
    println!("{who:?} was killed at {kills} steps from {first} on");
    Ok(())
}

/// A walk through a container's start by the command line.
fn walk_a_start(who: Who) -> Result<()> {
    walk(who, |steps| trials::kill_at_steps(who, steps))
}

/// A walk through a task's whole life below containerd.
fn walk_a_life(who: Who) -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Debian)?;
    let walked = walk(who, |steps| tasks::kill_at_steps(&story, who, steps));
    story.tell(walked)?;
    story.end()
}

#[test]
fn a_create_that_is_killed_at_any_step_leaves_nothing_to_delete_force() -> Result<()> {
    walk_a_start(Who::Command)
}

#[test]
fn a_relay_that_is_killed_at_any_step_leaves_nothing_to_delete_force() -> Result<()> {
    walk_a_start(Who::Relay)
}

#[test]
fn a_pods_process_that_is_killed_at_any_step_leaves_nothing_to_delete_force() -> Result<()> {
    walk_a_start(Who::Pod)
}

#[test]
fn a_vmm_that_is_killed_at_any_step_leaves_nothing_to_delete_force() -> Result<()> {
    walk_a_start(Who::Vmm)
}

#[test]
fn a_shim_that_is_killed_at_any_step_of_its_start_leaves_nothing_to_containerd() -> Result<()> {
    walk_a_life(Who::Command)
}

#[test]
fn a_shim_that_is_killed_at_any_step_leaves_nothing_to_containerd() -> Result<()> {
    walk_a_life(Who::Pod)
}

#[test]
fn a_vmm_that_is_killed_at_any_step_leaves_nothing_to_containerd() -> Result<()> {
    walk_a_life(Who::Vmm)
}

#[test]
fn a_hundred_tasks_have_one_name_one_after_the_other() -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Debian)?;
    story.tell(tasks::cycles(&story, 100))?;
    story.end()
}

#[test]
fn ten_tasks_at_once_do_not_grow_and_leave_nothing() -> Result<()> {
    let story = Story::begin(Runtime::Bulkhead, Programs::Debian)?;
    story.tell(tasks::at_once(&story, 10, 50))?;
    story.end()
}

#[test]
fn two_hundred_lives_one_after_the_other_leave_nothing() -> Result<()> {
    trials::cycles(200)
}

#[test]
fn twenty_at_once_are_made_and_deleted_and_do_not_grow() -> Result<()> {
    trials::at_once(20, 50)
}

#[test]
fn eight_of_each_verb_come_at_once() -> Result<()> {
    trials::verbs_at_once(8)
}

#[test]
fn a_gibibyte_comes_whole_to_a_slow_reader_and_grows_no_memory() -> Result<()> {
    slow_reader::reads(1 << 30)
}

#[test]
fn an_agent_that_stands_still_is_found_unasked_and_a_stopped_machine_is_left_alone() -> Result<()> {
    let before = Leftovers::now()?;
    let mut stopped = Container::plan(None, "stopped", "sleep 10000")?;
    stopped.make()?;
    stopped.ok(&["start", "stopped"])?;
    kill(stopped.vmm()?, Signal::SIGSTOP)?;
    let since = Instant::now();

    let task = Task::of_containerd()?;
    let mut frozen = Container::plan(None, "frozen", FREEZE_THE_AGENT)?;
    frozen.bundle.edit(with_the_guests_cgroups)?;
    frozen.make()?;
    frozen.ok(&["start", "frozen"])?;
    eventually("its word", || Ok(frozen.output()? == "up\n"))?;
    let begin = Instant::now();
    // Nobody asks the guest of anything: this is the host's own knowledge.
    let status = |status: &str| Ok(frozen.status()? == status);
    assert!(status("running")?);
    eventually_within(FOUND, "its end", || status("stopped"))?;
    println!("found after {:?}", begin.elapsed());
    assert_eq!(frozen.ended()?, 137);
    let log = fs::read_to_string(frozen.state().join("log"))?;
    assert!(
        log.contains(REASON) && log.contains("the guest's console"),
        "{log}"
    );
    frozen.ok(&["delete", "frozen"])?;
    task.ends_by_itself()?;

    std::thread::sleep(STOPPED.saturating_sub(since.elapsed()));
    assert_eq!(stopped.status()?, "running");
    let log = fs::read_to_string(stopped.state().join("log"))?;
    assert_eq!(log.matches("taken for stopped").count(), 1, "{log}");
    kill(stopped.vmm()?, Signal::SIGCONT)?;
    stopped.ok(&["exec", "stopped", "true"])?;
    stopped.ok(&["delete", "--force", "stopped"])?;
    assert_eq!(stopped.ended()?, 137);
    before.are_all()
}

/// A task of containerd that ctr waits for, whose agent stands still.
struct Task {
    containerd: Containerd,
    _bundle: Bundle,
    waiting: Child,
}

impl Task {
    fn of_containerd() -> Result<Self> {
        let containerd = Containerd::start_from(Programs::Debian)?;
        let bundle = Bundle::new(&["sh", "-c", FREEZE_THE_AGENT])?;
        bundle.edit(|config| {
            with_the_guests_cgroups(config);
            config["root"]["path"] = bundle.rootfs().to_string_lossy().into();
        })?;
        let log = containerd.path().join("silent.out");
        let log_uri = format!("file://{}", log.display());
        let config = bundle.path().join("config.json");
        let config = config.to_string_lossy();
        let run = ["run", "--runtime", "io.containerd.bulkhead.v2"];
        let given = ["--log-uri", &log_uri, "--config", &config, "silent"];
        let waiting = containerd
            .command(&[&run[..], &given].concat())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let up = || Ok(fs::read_to_string(&log).is_ok_and(|text| text == "up\n"));
        eventually("its word", up).with_context(|| containerd.logs())?;
        Ok(Self {
            containerd,
            _bundle: bundle,
            waiting,
        })
    }

    /// ctr's wait ends, with the status, and the reason is in the log.
    fn ends_by_itself(mut self) -> Result<()> {
        let mut ended = None;
        let waited = eventually_within(FOUND, "the end of ctr's wait", || {
            ended = self.waiting.try_wait()?;
            Ok(ended.is_some())
        });
        let logs = self.containerd.logs();
        waited.with_context(|| logs.clone())?;
        assert_eq!(ended.and_then(|status| status.code()), Some(137), "{logs}");
        ensure!(logs.contains(REASON), "{logs}");
        Ok(())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let _ = self.waiting.kill();
        let _ = self.waiting.wait();
    }
}
