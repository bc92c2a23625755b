//! Whatever is killed, panics or hangs, and whoever comes at the same time: every command answers,
//! and nothing is left. The whole of it is in `long_robust.rs`.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use system_tests::{
    client::leftovers::Leftovers,
    container::{Bundle, FREEZE_THE_AGENT, with_the_guests_cgroups},
    hold,
    steps::Who,
    trials,
    verbs::{Container, eventually},
};

/// How long an answer that asks nothing of the guest may take on a busy machine. One that waited for
/// the guest after all would take longer: the 32 seconds that a call has with one CPU.
const ANSWER: Duration = Duration::from_secs(30);

/// How long the end of a machine that stands still may take on a busy machine. It has ten seconds to
/// take a SIGKILL, and ten more where it is removed as well; without these it would never end.
const END: Duration = Duration::from_secs(120);

#[test]
fn whoever_is_killed_at_a_step_of_the_start_leaves_nothing_to_delete_force() -> Result<()> {
    for (who, steps) in [
        (Who::Command, &[1, 5][..]),
        (Who::Relay, &[4]),
        (Who::Pod, &[12, 40, 89]),
        (Who::Vmm, &[14, 50]),
    ] {
        let kills = trials::kill_at_steps(who, steps.iter().copied())?;
        // The last may be beyond the end, which is nearer when the others' turns fall otherwise.
        ensure!(
            kills == steps.len() || (kills > 0 && kills == steps.len() - 1),
            "{who:?} has only {kills} of {steps:?}"
        );
    }
    Ok(())
}

#[test]
fn several_at_once_are_made_and_deleted_and_do_not_grow() -> Result<()> {
    trials::at_once(3, 4)
}

#[test]
fn a_guest_waits_for_a_host_that_has_too_much_to_do() -> Result<()> {
    let bundle = Bundle::new(&["/bin/echo", "up"])?;
    let run = bundle.start(&[])?;
    // Who answers the guest's first words, from when the guest has found the device; Linux gives up
    // after two seconds.
    hold::thread(run.vmm()?, "virtio-vsock", Duration::from_secs(6))?;
    let output = run.output()?;
    ensure!(output.stdout == b"up\n", "{output:?}");
    bundle.nothing_is_left()
}

#[test]
fn a_kernel_that_panics_ends_the_container_with_its_last_lines_in_the_log() -> Result<()> {
    let script = "echo up; read -r word; echo c > /proc/sysrq-trigger; sleep 1000";
    let web = Container::create("sleep 1000", |config| {
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["linux"]["readonlyPaths"] = json!([]);
        config["linux"]["maskedPaths"] = json!([]);
    })?;
    // Its input is empty, so it goes on by itself.
    let begin = Instant::now();
    web.ok(&["start", "web"])?;
    ensure!(web.ended()? == 137, "not as if killed");
    println!("started, panicked and told in {:?}", begin.elapsed());
    eventually("its end", || Ok(web.status()? == "stopped"))?;
    let log = fs::read_to_string(web.state().join("log"))?;
    assert!(log.contains("sysrq triggered crash"), "{log}");
    answers_of_the_dead(&web)?;
    web.ok(&["delete", "web"])?;
    web.bundle.nothing_is_left()
}

/// Each command says that it does not run, at once.
fn answers_of_the_dead(web: &Container) -> Result<()> {
    for args in [
        &["exec", "web", "true"][..],
        &["kill", "web", "TERM"],
        &["pause", "web"],
        &["start", "web"],
    ] {
        let begin = Instant::now();
        let output = web.run(args)?;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "{args:?} succeeds");
        ensure!(
            words.lines().count() == 1 && !words.contains("panicked"),
            "{args:?}: {words}"
        );
        ensure!(begin.elapsed() < ANSWER, "{args:?}: {:?}", begin.elapsed());
    }
    Ok(())
}

#[test]
fn a_machine_that_hangs_answers_and_is_killed_and_deleted() -> Result<()> {
    // Nothing inside takes the signal, so the machine is ended.
    let web = Container::create("sleep 1000", |_| {})?;
    web.ok(&["start", "web"])?;
    kill(web.vmm()?, Signal::SIGSTOP)?;
    let begin = Instant::now();
    assert_eq!(web.status()?, "running");
    ensure!(begin.elapsed() < ANSWER, "{:?}", begin.elapsed());
    web.ok(&["kill", "web", "KILL"])?;
    assert_eq!(web.ended()?, 137);
    println!(
        "a machine that hangs: killed and told in {:?}",
        begin.elapsed()
    );
    ensure!(begin.elapsed() < END, "{:?}", begin.elapsed());
    eventually("its end", || Ok(web.status()? == "stopped"))?;
    web.ok(&["delete", "web"])?;
    web.bundle.nothing_is_left()?;

    let web = Container::create("sleep 1000", |_| {})?;
    kill(web.vmm()?, Signal::SIGSTOP)?;
    let begin = Instant::now();
    web.ok(&["delete", "--force", "web"])?;
    assert_eq!(web.ended()?, 137);
    ensure!(begin.elapsed() < END, "{:?}", begin.elapsed());
    web.bundle.nothing_is_left()
}

#[test]
fn an_agent_that_stands_still_is_no_container_that_cannot_be_killed() -> Result<()> {
    let web = Container::create(FREEZE_THE_AGENT, with_the_guests_cgroups)?;
    web.ok(&["start", "web"])?;
    eventually("its word", || Ok(web.output()? == "up\n"))?;
    let begin = Instant::now();
    assert_eq!(web.status()?, "running");
    ensure!(begin.elapsed() < ANSWER, "{:?}", begin.elapsed());
    web.ok(&["kill", "web", "KILL"])?;
    assert_eq!(web.ended()?, 137);
    ensure!(begin.elapsed() < END, "{:?}", begin.elapsed());
    eventually("its end", || Ok(web.status()? == "stopped"))?;
    let log = fs::read_to_string(web.state().join("log"))?;
    ensure!(
        log.contains("its guest did not end what was killed"),
        "{log}"
    );
    answers_of_the_dead(&web)?;
    web.ok(&["delete", "web"])?;
    web.bundle.nothing_is_left()?;

    // A person's Ctrl-C, or a time-out, ends it as well.
    let bundle = Bundle::new(&["sh", "-c", FREEZE_THE_AGENT])?;
    bundle.edit(with_the_guests_cgroups)?;
    let mut run = bundle.start(&[])?;
    run.wait_for_line("up")?;
    run.signal(Signal::SIGTERM)?;
    let begin = Instant::now();
    let output = run.output()?;
    ensure!(!output.status.success() && begin.elapsed() < END);
    bundle.nothing_is_left()
}

#[test]
fn a_pods_process_that_is_killed_is_answered_for_by_its_records() -> Result<()> {
    let before = Leftovers::now()?;
    let web = Container::create("sleep 1000", |_| {})?;
    web.ok(&["start", "web"])?;
    kill(web.owner()?, Signal::SIGKILL)?;
    assert_eq!(web.ended()?, 137);
    eventually("its end", || Ok(web.status()? == "stopped"))?;
    answers_of_the_dead(&web)?;
    web.ok(&["delete", "web"])?;
    before.are_all()?;

    // One whose pid is gone was killed.
    let web = Container::create("sleep 1000", |_| {})?;
    web.ok(&["start", "web"])?;
    kill(web.pid, Signal::SIGKILL)?;
    eventually("its end", || Ok(web.status()? == "stopped"))?;
    web.ok(&["delete", "web"])?;
    before.are_all()
}

#[test]
fn every_verb_may_come_several_times_at_once() -> Result<()> {
    trials::verbs_at_once(4)
}

#[test]
fn deletion_of_what_there_is_not_is_told_and_with_force_is_fine() -> Result<()> {
    let nothing = Container::plan(None, "web", "true")?;
    let output = nothing.run(&["delete", "web"])?;
    assert_eq!(output.status.code(), Some(125));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains("container does not exist"), "{words}");
    nothing.ok(&["delete", "--force", "web"])?;
    let list: Value = serde_json::from_str(&nothing.ok(&["list", "--format", "json"])?)?;
    assert!(list.as_array().is_none_or(Vec::is_empty), "{list}");
    Ok(())
}
