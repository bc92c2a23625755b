//! Programs that the configuration runs around the container's life, in the
//! guest: those of `createContainer`, from the guest's file tree before the
//! container's is entered, and those of `startContainer`, from the container's.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    os::{fd::AsFd, unix::process::CommandExt as _},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::memfd::{MFdFlags, memfd_create},
};
use serde_json::json;

use super::NewContainer;
use crate::{spec::Hook, sys};

/// Why the container is not made or started.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// It did not run.
    #[error("cannot run {hook}")]
    Run {
        /// Its place in the configuration, and its path.
        hook: String,
        #[source]
        source: io::Error,
    },
    /// It said so.
    #[error("{hook} failed with {status}{said}")]
    Failed {
        /// Its place in the configuration, and its path.
        hook: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to its standard error.
        said: String,
    },
    /// It took too long.
    #[error("{hook} did not end within {seconds} s")]
    Timeout {
        /// Its place in the configuration, and its path.
        hook: String,
        /// What it had.
        seconds: u64,
    },
}

/// The most that is told of what a hook says.
const MOST_SAID: u64 = 1024;

/// Runs hooks of the kind `kind` in order, with the container's state, which is `status`.
pub(super) fn run(
    kind: &str,
    hooks: &[Hook],
    container: &NewContainer<'_>,
    status: &str,
) -> Result<(), Error> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = state(container, status);
    hooks.iter().enumerate().try_for_each(|(place, hook)| {
        let name = format!("hooks.{kind}[{place}] {}", hook.path);
        one(name, hook, &state)
    })
}

/// The container's state as the specification has it.
fn state(container: &NewContainer<'_>, status: &str) -> String {
    json!({
        "ociVersion": container.spec.oci_version,
        "id": container.id,
        "status": status,
        "pid": std::process::id(),
        "bundle": container.bundle,
        "annotations": container.spec.annotations.as_ref().cloned().unwrap_or_default(),
    })
    .to_string()
}

fn one(name: String, hook: &Hook, state: &str) -> Result<(), Error> {
    let failed = |source| Error::Run {
        hook: name.clone(),
        source,
    };
    let mut said = memory().map_err(failed)?;
    let mut child = start(hook, state, &said).map_err(failed)?;
    let status = match hook.timeout.filter(|seconds| *seconds > 0) {
        None => child.wait().map_err(failed)?,
        Some(seconds) => {
            let seconds = seconds.unsigned_abs();
            let limit = Duration::from_secs(seconds);
            wait_for(&mut child, limit)
                .map_err(failed)?
                .ok_or_else(|| Error::Timeout {
                    hook: name.clone(),
                    seconds,
                })?
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut text = Vec::new();
    // What it said is a help, and its absence no failure.
    let _ = said.rewind();
    let _ = said.take(MOST_SAID).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    let said = match text.trim() {
        "" => String::new(),
        text => format!(": {text}"),
    };
    Err(Error::Failed {
        hook: name,
        status,
        said,
    })
}

fn start(hook: &Hook, state: &str, said: &File) -> io::Result<Child> {
    let mut input = memory()?;
    input.write_all(state.as_bytes())?;
    input.rewind()?;
    let mut command = Command::new(&hook.path);
    let mut arguments = hook.args.iter();
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    let environment = hook.env.iter().filter_map(|entry| entry.split_once('='));
    command
        .args(arguments)
        .env_clear()
        .envs(environment)
        .stdin(input)
        .stdout(Stdio::null())
        .stderr(said.try_clone()?)
        .spawn()
}

/// A file in memory: nobody waits on who does not read or write it.
fn memory() -> io::Result<File> {
    Ok(memfd_create(c"hook", MFdFlags::MFD_CLOEXEC)?.into())
}

/// Waits for the child's end, which is brought about behind the limit; nothing then.
fn wait_for(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let began = Instant::now();
    let end = sys::pidfd_open(child.id())?;
    loop {
        let left = limit.saturating_sub(began.elapsed());
        // A last moment of less than a millisecond is one.
        let left = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(end.as_fd(), PollFlags::POLLIN)], left) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) if began.elapsed() < limit => {}
            Ok(0) => {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
            Ok(_) => return child.wait().map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(command: &str, timeout: Option<i64>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: crate::spec::List(vec!["sh".into(), "-c".into(), command.into()]),
            env: crate::spec::List(vec!["A=b".into()]),
            timeout,
        }
    }

    fn run(command: &str, timeout: Option<i64>) -> Result<(), Error> {
        one("hooks.x[0]".into(), &hook(command, timeout), "the state")
    }

    #[test]
    fn a_hook_has_the_state_and_its_own_environment() {
        assert!(run("test $(cat) = 'the state' || test \"$A\" = b", None).is_ok());
        assert!(
            run(
                "read s; test \"$s\" = 'the state' && test \"$A\" = b",
                Some(9)
            )
            .is_ok()
        );
    }

    #[test]
    fn a_hook_that_fails_is_told_with_what_it_said() {
        let text = run("echo no good >&2; exit 3", None)
            .unwrap_err()
            .to_string();
        assert_eq!(text, "hooks.x[0] failed with exit status: 3: no good");
    }

    #[test]
    fn a_hook_that_takes_too_long_is_ended() {
        let text = run("sleep 100", Some(1)).unwrap_err().to_string();
        assert_eq!(text, "hooks.x[0] did not end within 1 s");
    }

    #[test]
    fn a_hook_that_is_not_there_is_told() {
        let nowhere = Hook {
            path: "/nowhere".into(),
            ..Hook::default()
        };
        let error = one("hooks.x[0]".into(), &nowhere, "").unwrap_err();
        assert!(matches!(error, Error::Run { .. }));
    }
}
