//! Hooks of a configuration that run on the host, in the namespaces of the
//! runtime: `prestart`, `createRuntime`, `poststart` and `poststop`. The other
//! two run in the guest.

use std::{io, path::PathBuf, process::Stdio, time::Duration};

use oci_spec::runtime::{Hook, Hooks};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::timeout,
};

use crate::{bundle::Bundle, id::ContainerId, text::printable};

/// What is kept of a hook's words.
const WORDS_MAX: u64 = 4096;

/// When hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// `prestart` and `createRuntime`: the namespaces are there, nothing runs in them.
    Create,
    /// `poststart`: the process was executed.
    Started,
    /// `poststop`: the container was deleted.
    Stopped,
}

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be run.
    #[error("error running {kind} hook #{number}: cannot run {}", path.display())]
    Run {
        /// Its kind.
        kind: &'static str,
        /// Which of its kind.
        number: usize,
        /// Its program.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("error running {kind} hook #{number}: {status}, stdout: {stdout}, stderr: {stderr}")]
    Failed {
        /// Its kind.
        kind: &'static str,
        /// Which of its kind.
        number: usize,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        stdout: String,
        /// What it complained of.
        stderr: String,
    },
    /// It took too long.
    #[error("error running {kind} hook #{number}: it did not end within {seconds} s")]
    Deadline {
        /// Its kind.
        kind: &'static str,
        /// Which of its kind.
        number: usize,
        /// Its time.
        seconds: u64,
    },
}

/// A container's hooks on the host, and what they are told.
#[derive(Debug, Clone)]
pub struct HostHooks {
    hooks: Hooks,
    state: Value,
    bundle: PathBuf,
}

impl HostHooks {
    /// Those of a container that the process `pid` stands for.
    pub fn new(id: &ContainerId, bundle: &Bundle, pid: u32) -> Self {
        let spec = bundle.spec();
        let mut state = json!({
            "ociVersion": spec.version(),
            "id": id.as_str(),
            "pid": pid,
            "bundle": bundle.path(),
        });
        if let Some(annotations) = spec.annotations() {
            state["annotations"] = json!(annotations);
        }
        Self {
            hooks: spec.hooks().clone().unwrap_or_default(),
            state,
            bundle: bundle.path().to_owned(),
        }
    }

    /// Runs those of `moment`, one after the other, until one fails.
    ///
    /// # Errors
    /// When a hook fails.
    pub async fn run(&self, moment: Moment) -> Result<(), Error> {
        let (status, kinds) = self.of(moment);
        let mut state = self.state.clone();
        state["status"] = json!(status);
        if moment == Moment::Stopped {
            state["pid"] = json!(0);
        }
        let state = state.to_string();
        for (kind, hooks) in kinds {
            for (number, hook) in hooks.into_iter().flatten().enumerate() {
                let call = Call { kind, number, hook };
                call.run(&self.bundle, state.as_bytes()).await?;
            }
        }
        Ok(())
    }

    /// Whether there is any of `moment`.
    pub fn has(&self, moment: Moment) -> bool {
        let (_, kinds) = self.of(moment);
        kinds
            .iter()
            .any(|(_, hooks)| hooks.is_some_and(|hooks| !hooks.is_empty()))
    }

    /// The container's status at `moment`, and the hooks of it by kind.
    fn of(&self, moment: Moment) -> (&'static str, Vec<Kind<'_>>) {
        let hooks = &self.hooks;
        match moment {
            Moment::Create => (
                "creating",
                vec![
                    ("prestart", hooks.prestart().as_deref()),
                    ("createRuntime", hooks.create_runtime().as_deref()),
                ],
            ),
            Moment::Started => ("running", vec![("poststart", hooks.poststart().as_deref())]),
            Moment::Stopped => ("stopped", vec![("poststop", hooks.poststop().as_deref())]),
        }
    }
}

/// A kind's name and its hooks.
type Kind<'a> = (&'static str, Option<&'a [Hook]>);

struct Call<'a> {
    kind: &'static str,
    number: usize,
    hook: &'a Hook,
}

impl Call<'_> {
    async fn run(&self, bundle: &std::path::Path, state: &[u8]) -> Result<(), Error> {
        let (kind, number) = (self.kind, self.number);
        let failed = |source| Error::Run {
            kind,
            number,
            path: self.hook.path().clone(),
            source,
        };
        let mut child = self.command(bundle).spawn().map_err(failed)?;
        let ended = talk(&mut child, state);
        let ended = match self.hook.timeout().filter(|seconds| *seconds > 0) {
            Some(seconds) => {
                let seconds = seconds.unsigned_abs();
                timeout(Duration::from_secs(seconds), ended)
                    .await
                    .map_err(|_| Error::Deadline {
                        kind,
                        number,
                        seconds,
                    })?
            }
            None => ended.await,
        };
        let (status, stdout, stderr) = ended.map_err(failed)?;
        match status.success() {
            true => Ok(()),
            false => Err(Error::Failed {
                kind,
                number,
                status,
                stdout: words(&stdout),
                stderr: words(&stderr),
            }),
        }
    }

    /// Its environment is what the configuration says, and nothing of ours.
    fn command(&self, bundle: &std::path::Path) -> Command {
        let mut command = Command::new(self.hook.path());
        let mut args = self.hook.args().iter().flatten();
        if let Some(name) = args.next() {
            command.arg0(name);
        }
        let env = self.hook.env().iter().flatten();
        command
            .args(args)
            .env_clear()
            .envs(env.filter_map(|variable| variable.split_once('=')))
            .current_dir(bundle)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }
}

/// Tells it the state, and hears it out.
async fn talk(
    child: &mut Child,
    state: &[u8],
) -> io::Result<(std::process::ExitStatus, Vec<u8>, Vec<u8>)> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let tell = async {
        if let Some(mut stdin) = stdin {
            // One that does not want to know has closed it.
            let _ = stdin.write_all(state).await;
        }
    };
    let ((), stdout, stderr, status) = tokio::join!(tell, hear(stdout), hear(stderr), child.wait());
    Ok((status?, stdout?, stderr?))
}

/// The first words; the rest is read and dropped, so that it may go on.
async fn hear(stream: Option<impl tokio::io::AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut words = Vec::new();
    if let Some(mut stream) = stream {
        (&mut stream)
            .take(WORDS_MAX)
            .read_to_end(&mut words)
            .await?;
        let mut rest = [0; 4096];
        while stream.read(&mut rest).await? > 0 {}
    }
    Ok(words)
}

fn words(bytes: &[u8]) -> String {
    printable(String::from_utf8_lossy(bytes).trim_end(), 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(script: &str, timeout: Option<i64>) -> HostHooks {
        let mut hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=1"]});
        if let Some(seconds) = timeout {
            hook["timeout"] = json!(seconds);
        }
        let hooks = json!({"createRuntime": [{"path": "/bin/true"}, hook]});
        HostHooks {
            hooks: serde_json::from_value(hooks).expect("hooks"),
            state: json!({"id": "web", "pid": 7}),
            bundle: PathBuf::from("/"),
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_hook_gets_the_state_and_the_environment_it_is_to_have() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("said");
        let script = format!("cat > {0}; echo $A $HOME >> {0}", file.display());
        hooks(&script, None).run(Moment::Create).await.expect("ran");
        let said = std::fs::read_to_string(file).expect("written");
        assert_eq!(
            said,
            "{\"id\":\"web\",\"pid\":7,\"status\":\"creating\"}1\n"
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_hook_that_fails_is_told_with_its_words() {
        let error = hooks("echo no >&2; exit 3", None).run(Moment::Create).await;
        let error = error.expect_err("failed").to_string();
        assert!(error.contains("createRuntime hook #1"), "{error}");
        assert!(
            error.contains("exit status: 3") && error.ends_with("stderr: no"),
            "{error}"
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_hook_that_takes_too_long_is_given_up() {
        let error = hooks("exec sleep 100", Some(1)).run(Moment::Create).await;
        assert!(
            matches!(error, Err(Error::Deadline { seconds: 1, .. })),
            "{error:?}"
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn hooks_of_other_moments_do_not_run() {
        hooks("exit 1", None)
            .run(Moment::Started)
            .await
            .expect("none");
    }
}
