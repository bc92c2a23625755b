//! One call of one plug-in: a program that is told by variables and its standard input.

use std::{
    env,
    ffi::OsString,
    fs::File,
    io::{self, Read, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{io::unix::AsyncFd, time::timeout};

use crate::{sys, text::printable};

/// How long one may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// Longer answers are not read.
const ANSWER_MAX: u64 = 1 << 20;

/// Where plug-ins are looked for.
const DIRECTORIES: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];

/// Why a plug-in did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there.
    #[error(
        "cannot find the CNI plug-in {name:?} in {directories}; install Debian's package containernetworking-plugins, or run without a network by --network none"
    )]
    Missing {
        /// Which.
        name: String,
        /// Where it was looked for.
        directories: String,
    },
    /// It cannot be run.
    #[error("cannot run the CNI plug-in {}", path.display())]
    Run {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It takes too long.
    #[error("the CNI plug-in {name:?} did not end within {seconds} s")]
    Deadline {
        /// Which.
        name: String,
        /// Its time.
        seconds: u64,
    },
    /// It says no.
    #[error("the CNI plug-in {name:?} fails: {reason}{hint}")]
    Failed {
        /// Which.
        name: String,
        /// What it says.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// It says something else than it should.
    #[error("the CNI plug-in {name:?} answers no JSON: {said}")]
    Answer {
        /// Which.
        name: String,
        /// What it says.
        said: String,
    },
}

/// Where the plug-ins are: in the directories of the variable `CNI_PATH`, or the usual ones.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Plugins(Vec<PathBuf>);

impl Default for Plugins {
    fn default() -> Self {
        Self(match env::var_os("CNI_PATH") {
            Some(path) => env::split_paths(&path).collect(),
            None => DIRECTORIES.map(PathBuf::from).to_vec(),
        })
    }
}

/// What a plug-in is told besides its configuration.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) command: &'static str,
    pub(super) container: &'a str,
    pub(super) namespace: &'a Path,
    pub(super) interface: &'a str,
}

impl Plugins {
    /// Calls one and returns its answer; one that says nothing answers nothing. If it is not waited
    /// for any more, it is killed with all that it started.
    pub(super) async fn call(
        &self,
        name: &str,
        call: &Call<'_>,
        config: &Value,
    ) -> Result<Value, Error> {
        let path = self.find(name)?;
        let run = |source| Error::Run {
            path: path.clone(),
            source,
        };
        // Files rather than pipes: nobody needs to feed and empty them meanwhile.
        let files = || {
            io::Result::Ok((
                tempfile::tempfile()?,
                tempfile::tempfile()?,
                tempfile::tempfile()?,
            ))
        };
        let (mut stdin, mut stdout, mut stderr) = files().map_err(run)?;
        let mut prepared = || -> io::Result<Command> {
            stdin.write_all(config.to_string().as_bytes())?;
            stdin.rewind()?;
            let mut command = Command::new(&path);
            command
                .stdin(Stdio::from(stdin.try_clone()?))
                .stdout(Stdio::from(stdout.try_clone()?))
                .stderr(Stdio::from(stderr.try_clone()?))
                .env_clear()
                .env("PATH", search_path())
                .env("CNI_COMMAND", call.command)
                .env("CNI_CONTAINERID", call.container)
                .env("CNI_NETNS", call.namespace)
                .env("CNI_IFNAME", call.interface)
                .env("CNI_ARGS", "IgnoreUnknown=1")
                .env("CNI_PATH", env::join_paths(&self.0).unwrap_or_default())
                .current_dir("/");
            Ok(command)
        };
        let mut running = prepared().and_then(Running::start).map_err(run)?;
        let status = match timeout(DEADLINE, running.ended()).await {
            Ok(status) => status.map_err(run)?,
            Err(_) => {
                return Err(Error::Deadline {
                    name: name.to_owned(),
                    seconds: DEADLINE.as_secs(),
                });
            }
        };
        let said = read(&mut stdout).map_err(run)?;
        if !status.success() {
            let complained = read(&mut stderr).map_err(run)?;
            return Err(failed(name, &said, &complained, status));
        }
        if said.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&said).map_err(|_| Error::Answer {
            name: name.to_owned(),
            said: printable(&said, 200),
        })
    }

    pub(super) fn find(&self, name: &str) -> Result<PathBuf, Error> {
        let paths = self.0.iter().map(|directory| directory.join(name));
        let runs = |path: &PathBuf| {
            let status = path.metadata();
            status.is_ok_and(|status| status.is_file() && status.permissions().mode() & 0o111 != 0)
        };
        paths.into_iter().find(runs).ok_or_else(|| {
            let directories = self.0.iter().map(|path| path.display().to_string());
            Error::Missing {
                name: name.to_owned(),
                directories: directories.collect::<Vec<_>>().join(" or "),
            }
        })
    }
}

/// A plug-in under way, the first of a process group of its own. Dropping it ends the group.
struct Running {
    child: Child,
    pidfd: Option<AsyncFd<OwnedFd>>,
    has_ended: bool,
}

impl Running {
    fn start(mut command: Command) -> io::Result<Self> {
        // What it makes after its caller's death nobody would undo.
        sys::dies_with_its_parent(&mut command);
        let child = command.process_group(0).spawn()?;
        let mut running = Self {
            child,
            pidfd: None,
            has_ended: false,
        };
        let pidfd = sys::pidfd(running.child.id())?;
        running.pidfd = pidfd.map(sys::watch_readable).transpose()?;
        Ok(running)
    }

    async fn ended(&mut self) -> io::Result<ExitStatus> {
        if let Some(pidfd) = &self.pidfd {
            let _ = pidfd.readable().await?;
        }
        let status = self.child.wait()?;
        self.has_ended = true;
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        // It was not reaped, so the number is still its own.
        let group = Pid::from_raw(self.child.id().cast_signed());
        let killed = killpg(group, Signal::SIGKILL).map_err(io::Error::from);
        if let Err(error) = killed.and_then(|()| self.child.wait()) {
            tracing::warn!(pid = %group, %error, "a CNI plug-in cannot be ended");
        }
    }
}

/// Its error: JSON with a message, where it keeps to the specification.
fn failed(name: &str, said: &str, complained: &str, status: ExitStatus) -> Error {
    let value: Value = serde_json::from_str(said).unwrap_or_default();
    let word = |key: &str| value[key].as_str().filter(|text| !text.is_empty());
    let text = match (word("msg"), word("details")) {
        (Some(message), Some(details)) => format!("{message}: {details}"),
        (Some(message), None) => message.to_owned(),
        _ if !complained.trim().is_empty() => complained.trim().to_owned(),
        _ => status.to_string(),
    };
    let iptables = text.contains("iptables") && text.contains("not found");
    Error::Failed {
        name: name.to_owned(),
        reason: printable(&text, 500),
        hint: match iptables {
            true => "; install Debian's package iptables",
            false => "",
        },
    }
}

/// Where plug-ins find their own programs, such as iptables, whatever the caller's variable says.
fn search_path() -> OsString {
    let own = env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    env::join_paths(env::split_paths(&own).chain(more)).unwrap_or(own)
}

fn read(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(ANSWER_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use std::{fs, path::Path};

    use serde_json::json;

    use super::*;
    use crate::testing::executable;

    /// Plug-ins that are shell scripts.
    pub(in crate::cni) fn scripts(directory: &Path, scripts: &[(&str, &str)]) -> Plugins {
        for (name, script) in scripts {
            executable(&directory.join(name), &format!("#!/bin/sh\n{script}\n"));
        }
        Plugins(vec![PathBuf::from("/nonexistent"), directory.to_owned()])
    }

    fn call() -> Call<'static> {
        Call {
            command: "ADD",
            container: "c1",
            namespace: Path::new("/run/netns/x"),
            interface: "eth0",
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_plug_in_hears_what_the_specification_says_and_is_heard() {
        let directory = tempfile::tempdir().unwrap();
        let script = r#"echo "{\"heard\": $(cat), \"as\": \"$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME\"}""#;
        let plugins = scripts(
            directory.path(),
            &[("echo", script), ("mute", "cat >/dev/null")],
        );
        let (call, config) = (call(), json!({"mtu": 1500}));
        let answer = plugins.call("echo", &call, &config).await.unwrap();
        assert_eq!(answer["heard"]["mtu"], 1500);
        assert_eq!(answer["as"], "ADD c1 /run/netns/x eth0");
        let answer = plugins.call("mute", &call, &config).await;
        assert_eq!(answer.unwrap(), Value::Null);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn whatever_goes_wrong_names_the_plug_in_and_the_way_out() {
        let directory = tempfile::tempdir().unwrap();
        let plugins = scripts(
            directory.path(),
            &[
                (
                    "says",
                    r#"echo '{"code": 7, "msg": "no iptables: not found"}'; exit 1"#,
                ),
                ("cries", "echo broken >&2; exit 3"),
                ("babbles", "echo hello"),
            ],
        );
        for (name, wanted) in [
            (
                "says",
                "no iptables: not found; install Debian's package iptables",
            ),
            ("cries", "\"cries\" fails: broken"),
            ("babbles", "no JSON: hello"),
            (
                "absent",
                "install Debian's package containernetworking-plugins",
            ),
        ] {
            let answer = plugins.call(name, &call(), &json!({})).await;
            let error = answer.unwrap_err().to_string();
            assert!(error.contains(wanted) && error.contains(name), "{error}");
        }
    }
    #[tokio::test(flavor = "current_thread")]
    async fn one_that_hangs_is_ended_with_what_it_started_when_nobody_waits_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let pids = directory.path().join("pids");
        let script = format!("sleep 1000 & echo $$ $! > {}; wait", pids.display());
        let plugins = scripts(directory.path(), &[("hangs", &script)]);
        let config = json!({});
        let (call, began) = (call(), || fs::read_to_string(&pids).unwrap_or_default());
        let until_it_runs = async {
            while !began().ends_with('\n') {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        // Others run meanwhile.
        tokio::select! {
            answer = plugins.call("hangs", &call, &config) => panic!("{answer:?}"),
            () = until_it_runs => {}
        }
        for pid in began().split_whitespace() {
            // The one that nobody reaps yet is dead all the same.
            let stat = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            while !(stat().is_empty() || stat().contains(") Z ")) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}
