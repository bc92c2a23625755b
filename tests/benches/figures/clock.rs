//! How long a command takes; one that does not end is killed, which is an error.

use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Milliseconds that a command without input takes, which must succeed.
pub(crate) fn milliseconds(mut command: Command) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let started = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let (over, ended) = channel::<()>();
    let (time, late) = thread::scope(|scope| -> Result<_> {
        let watch = scope.spawn(move || {
            let late = ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
            if late {
                // it is not waited for yet, so the number is its own
                let _ = kill(pid, Signal::SIGKILL);
            }
            late
        });
        let waited = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        let time = started.elapsed();
        drop(over);
        waited.context("cannot wait for a command")?;
        Ok((time, watch.join().unwrap_or(false)))
    })?;
    let status = child.wait()?;
    if late {
        bail!("{command:?} has not ended in {PATIENCE:?}");
    }
    ensure!(status.success(), "{command:?}: {status}");
    Ok(time.as_secs_f64() * 1e3)
}
