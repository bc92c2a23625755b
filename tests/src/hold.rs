//! A thread of a process that stands still for a while, as on a host that has more to do than it can.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use crate::sys;

/// Enough for a busy lab machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a thread is left alone that waits for its first work, or does it.
const IDLE: Duration = Duration::from_millis(15);

/// Holds the thread `name` of `process` for `time`, from when it has done its first work.
///
/// # Errors
/// When it does not come, gets no work, or ends.
pub fn thread(process: Pid, name: &str, time: Duration) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let held = loop {
        if let Some(found) = find(process, name) {
            break found;
        }
        ensure!(Instant::now() < deadline, "{process} has no thread {name}");
        thread::sleep(Duration::from_millis(1));
    };
    let mut since = (turns(held)?, Instant::now());
    loop {
        thread::sleep(Duration::from_millis(1));
        let turns = turns(held)?;
        if turns != since.0 && since.1.elapsed() > IDLE {
            break;
        }
        if turns != since.0 {
            since = (turns, Instant::now());
        }
        ensure!(Instant::now() < deadline, "{name} has nothing to do");
    }
    thread::sleep(IDLE);
    // Whatever becomes of this process, it goes on then.
    sys::seize(held)?;
    sys::interrupt(held)?;
    thread::sleep(time);
    Ok(sys::detach(held)?)
}

/// How often a thread has waited.
fn turns(thread: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{thread}/status"))?;
    let line = |line: &str| {
        Some(
            line.strip_prefix("voluntary_ctxt_switches:")?
                .trim()
                .parse(),
        )
    };
    Ok(status
        .lines()
        .find_map(line)
        .context("no count of turns")??)
}

fn find(process: Pid, name: &str) -> Option<Pid> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).ok()?;
    let mut tasks = tasks.flatten();
    let task = tasks.find(|task| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    })?;
    task.file_name().to_str()?.parse().ok().map(Pid::from_raw)
}
