//! What tasks of containerd are put through: a kill at each step of their lives, many lives under
//! one name, many at once. Afterwards the host is as it was before.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use crate::{
    client::{command::run, ctr::Story, images::BUSYBOX, until},
    guest::bin,
    steps::{Gate, Who},
    trials::Held,
};

/// Where the shims' sockets are.
const SOCKETS: &str = "/run/containerd/s";

/// Where the state of tasks is.
const STATE: &str = "/run/containerd/bulkhead/default";

/// Kills `who` at each of these steps of a task's life, and lets containerd clean up, until there are
/// no more steps. Returns at how many it was killed.
///
/// # Errors
/// When something stays, or a command does not end.
pub fn kill_at_steps(
    story: &Story,
    who: Who,
    steps: impl IntoIterator<Item = usize>,
) -> Result<usize> {
    let gate = Gate::new()?;
    let program = gate.program();
    let program = program.to_string_lossy();
    let task = ["run", "--rm", "--runtime", &program, BUSYBOX, "web", "true"];
    let sockets = names(SOCKETS);
    let mut kills = 0;
    for step in steps {
        let begin = Instant::now();
        let (name, done) = gate
            .kill_at(who, step, || story.ctr(&task))
            .with_context(|| format!("{who:?}, step {step}"))?;
        let place = format!("{who:?}, step {step}: {}", name.unwrap_or("none"));
        let cleaned = || -> Result<()> {
            if name.is_none() {
                done.ends_with(0)?;
            }
            until("containerd's clean-up", || {
                Ok(story.status("web")? == "ABSENT")
            })?;
            // One whose start failed has left it.
            story.ctr(&["containers", "rm", "web"])?;
            if done.stderr.contains("failed to start shim") {
                // Of one that is killed before containerd has spoken to it, containerd knows nothing:
                // the next of its name, or who asks for it, undoes what there is.
                run(Command::new(bin("bulkhead")?).arg("gc"))?.ends_with(0)?;
            } else {
                ensure!(names(SOCKETS) == sockets, "a socket is left");
            }
            story.nothing_is_left()
        };
        cleaned().with_context(|| format!("{place}; {done:?}"))?;
        println!(
            "{place}: nothing is left, after {:.1?}; ctr ended with {}",
            begin.elapsed(),
            done.status
        );
        if name.is_none() {
            break;
        }
        kills += 1;
    }
    Ok(kills)
}

/// Kills ctr in the middle of a start: as soon as there is a machine, which boots then. containerd
/// gives the task up, at last by its shim's end.
///
/// # Errors
/// When something stays.
pub fn give_up(story: &Story) -> Result<()> {
    let task = story.run(&["--rm"], "web", &["sleep", "1000"]);
    let mut client = story
        .containerd
        .command(&task)
        .stdin(Stdio::null())
        .spawn()?;
    let started = until("the machine", || {
        let journal = fs::read_to_string(Path::new(STATE).join("web/journal"));
        Ok(journal.is_ok_and(|journal| journal.contains("vmm")))
    });
    client.kill()?;
    client.wait()?;
    started?;
    let begin = Instant::now();
    story.nothing_is_left()?;
    println!("given up: nothing is left after {:?}", begin.elapsed());
    story.ctr(&["containers", "rm", "web"])?.ends_with(0)?;
    Ok(())
}

/// Runs tasks one after the other under one name. Whoever hears of the end of one finds nothing of
/// it.
///
/// # Errors
/// When one does not run, or something is left.
pub fn cycles(story: &Story, count: usize) -> Result<()> {
    let task = story.run(&["--rm"], "web", &["sh", "-c", "echo up; exit 7"]);
    let sockets = names(SOCKETS);
    let begin = Instant::now();
    for number in 0..count {
        let done = story.ctr(&task)?;
        let whole = || -> Result<()> {
            done.ends_with(7)?;
            ensure!(done.stdout == "up\n", "{done:?}");
            let state = names(STATE);
            ensure!(!state.contains(Path::new("web")), "{state:?}");
            ensure!(names(SOCKETS) == sockets, "a socket is left");
            Ok(())
        };
        whole().with_context(|| format!("cycle {number}"))?;
    }
    println!("{count} cycles took {:?}", begin.elapsed());
    story.nothing_is_left()
}

/// Runs tasks all at once, with execs while they run; the shim stays as large as it was.
///
/// # Errors
/// When a command fails, something is left, or grows.
pub fn at_once(story: &Story, count: usize, execs: usize) -> Result<()> {
    let begin = Instant::now();
    let all: Vec<_> = (0..count).map(|number| format!("web-{number}")).collect();
    in_parallel(&all, |id| {
        let task = story.run(&["-d"], id, &["sleep", "1000"]);
        story.ctr(&task)?.ends_with(0).map(drop)
    })?;
    println!("{count} tasks were started in {:?}", begin.elapsed());
    let exec = || -> Result<()> {
        let exec = ["tasks", "exec", "--exec-id", "e1", &all[0], "true"];
        story.ctr(&exec)?.ends_with(0).map(drop)
    };
    for _ in 0..3 {
        exec()?;
    }
    let shim = story.shim(&all[0])?;
    let at_first = Held::at_rest(shim)?;
    for _ in 0..execs {
        exec()?;
    }
    let now = Held::at_rest(shim)?;
    println!("after {execs} execs {at_first:?} is {now:?}");
    ensure!(!now.has_grown(&at_first), "{at_first:?} grew to {now:?}");
    in_parallel(&all, |id| {
        let removed = story.ctr(&["tasks", "rm", "--force", id])?;
        removed.tells("non-zero exit code 137")?;
        story.ctr(&["containers", "rm", id])?.ends_with(0).map(drop)
    })?;
    println!("all over after {:?}", begin.elapsed());
    story.nothing_is_left()
}

fn in_parallel(all: &[String], act: impl Fn(&str) -> Result<()> + Sync) -> Result<()> {
    let act = &act;
    thread::scope(|scope| {
        let threads: Vec<_> = all
            .iter()
            .map(|one| scope.spawn(move || act(one).with_context(|| one.clone())))
            .collect();
        let ends = threads.into_iter().map(|thread| {
            let end = thread.join();
            end.unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
        });
        // All are joined before the first error is told.
        ends.collect::<Vec<_>>().into_iter().collect()
    })
}

/// What lies in a directory.
fn names(directory: &str) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into()).collect()
}
