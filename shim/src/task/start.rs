//! `start`: find the pod's daemon, or become it.
//!
//! The daemon is a copy of this process, made before it has a second thread: no program is
//! executed a second time, and the socket listens before containerd hears of it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal, PipeReader, PipeWriter, Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, getppid, setsid};
use serde::Deserialize;

use super::{
    arguments::Invocation,
    boot::STATE_ROOT,
    bootstrap::{self, Bootstrap, Environment, STDIN_MAX},
    socket::{self, Claim, Socket},
};
use crate::{
    id::{self, ContainerId},
    sandbox::Owner,
    sys::{self, Fork},
};

/// The annotations by which a container names its sandbox.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// The file from which a containerd that was restarted learns where the shim is.
pub(super) const ADDRESS: &str = "address";

/// The pipe that containerd reads log lines from.
const LOG: &str = "log";

/// How long the daemon of the same name before this one may take to end.
const PREDECESSOR: Duration = Duration::from_secs(20);

/// How often that is looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// Why no daemon serves the container.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step on the file system failed.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// containerd was not understood.
    #[error(transparent)]
    Bootstrap(#[from] bootstrap::Error),
    /// `config.json` is none.
    #[error("{} is not a valid configuration", path.display())]
    Config {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The annotation names no sandbox.
    #[error("the annotation {SANDBOX_ID} names no sandbox")]
    SandboxId(#[source] id::Error),
    /// The sandbox's daemon is gone.
    #[error("the sandbox {id} does not run; its containers cannot be started without it")]
    NoSandbox {
        /// The sandbox.
        id: ContainerId,
    },
    /// No socket.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// The process cannot be copied.
    #[error("cannot become a daemon")]
    Fork(#[source] io::Error),
    /// Nobody can be answered.
    #[error("cannot answer on standard output")]
    Answer(#[source] io::Error),
}

/// Which of the two processes this is now.
#[derive(Debug)]
pub enum Started {
    /// The one that containerd waits for.
    Starter(Answer),
    /// The one that serves.
    Daemon(Box<Daemon>),
}

/// What containerd is to be told.
#[derive(Debug)]
pub struct Answer {
    text: Vec<u8>,
    /// To the daemon, if it is a new one.
    daemon: Option<PipeWriter>,
}

impl Answer {
    /// Tells it, and then the daemon that it is known.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn give(self) -> Result<(), Error> {
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(&self.text)
            .and_then(|()| stdout.flush())
            .map_err(Error::Answer)?;
        match self.daemon {
            Some(mut daemon) => daemon.write_all(&[0]).map_err(Error::Answer),
            None => Ok(()),
        }
    }
}

/// What the daemon was started with.
#[derive(Debug)]
pub struct Daemon {
    /// Whom it serves.
    pub invocation: Invocation,
    /// What containerd said.
    pub bootstrap: Bootstrap,
    /// The bundle of its first container.
    pub bundle: PathBuf,
    /// Its socket.
    pub socket: Socket,
    /// Has a byte when containerd was told of it, and ends without one if it never will be.
    pub known: PipeReader,
    /// Where its log lines go, if there is such a place.
    pub log: Option<File>,
}

/// Finds the daemon of the container's pod, or becomes it. Must be called before the process has
/// a second thread.
///
/// # Errors
/// When containerd was not understood, or there is no place for the socket.
pub fn start(invocation: Invocation) -> Result<Started, Error> {
    let bundle = match &invocation.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(failed("find", Path::new(".")))?,
    };
    let bootstrap = Bootstrap::read(&input()?, &invocation, &Environment::of_process())?;
    let sandbox = sandbox(&bundle.join("config.json"))?;
    let group = sandbox.as_ref().unwrap_or(&invocation.id);
    let path = socket::path(&bootstrap.sockets, &invocation, group.as_str());
    let address = socket::address(&path);
    let answer = |daemon| {
        Started::Starter(Answer {
            text: bootstrap.answer(&address),
            daemon,
        })
    };

    if *group != invocation.id {
        if !socket::serves(&path) {
            return Err(Error::NoSandbox { id: group.clone() });
        }
        remember(&bundle, &address)?;
        return Ok(answer(None));
    }
    let socket = match socket::claim(&path)? {
        Claim::Ours(socket) => socket,
        Claim::Served => {
            remember(&bundle, &address)?;
            return Ok(answer(None));
        }
    };
    await_predecessor(Path::new(STATE_ROOT), &invocation);
    match become_daemon(&bundle, &address) {
        Ok((Fork::Parent, _, daemon)) => Ok(answer(Some(daemon))),
        Ok((Fork::Child, known, _)) => {
            let log = detach(&bundle)?;
            Ok(Started::Daemon(Box::new(Daemon {
                invocation,
                bootstrap,
                bundle,
                socket,
                known,
                log,
            })))
        }
        Err(error) => {
            socket.remove();
            Err(error)
        }
    }
}

/// Waits until nobody holds the state of a pod of this name. A daemon that ends gives its socket up
/// first, and then everything else. One that stays is told of when the pod is made.
fn await_predecessor(root: &Path, invocation: &Invocation) {
    let namespace = root.join(invocation.namespace.as_str());
    let state = namespace.join(invocation.id.as_str());
    let deadline = Instant::now() + PREDECESSOR;
    while let Ok(Some(_)) = Owner::of(&state)
        && Instant::now() < deadline
    {
        sleep(PAUSE);
    }
}

/// Standard input, unless a person is at it.
fn input() -> Result<Vec<u8>, Error> {
    let stdin = io::stdin();
    let mut bytes = Vec::new();
    if !stdin.is_terminal() {
        let mut bounded = stdin.lock().take(STDIN_MAX);
        bounded
            .read_to_end(&mut bytes)
            .map_err(failed("read", Path::new("standard input")))?;
    }
    Ok(bytes)
}

/// The sandbox that a container names; a bundle without configuration is a sandbox itself.
fn sandbox(config: &Path) -> Result<Option<ContainerId>, Error> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: std::collections::HashMap<String, String>,
    }
    let text = match fs::read(config) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", config)(error)),
    };
    let config: Annotated = serde_json::from_slice(&text).map_err(|source| Error::Config {
        path: config.to_owned(),
        source,
    })?;
    let annotation = |name| config.annotations.get(name).map(String::as_str);
    match (annotation(CONTAINER_TYPE), annotation(SANDBOX_ID)) {
        (Some("container"), Some(id)) => {
            Ok(Some(ContainerId::parse(id).map_err(Error::SandboxId)?))
        }
        _ => Ok(None),
    }
}

/// Which of the two this is, and the ends of the pipe by which the daemon learns that it is known:
/// each lets go of the other's.
fn become_daemon(bundle: &Path, address: &str) -> Result<(Fork, PipeReader, PipeWriter), Error> {
    remember(bundle, address)?;
    let adjustment = oom_adjustment();
    let (known, daemon) = io::pipe().map_err(Error::Fork)?;
    let fork = sys::fork().map_err(Error::Fork)?;
    if let (Fork::Child, Some(adjustment)) = (fork, adjustment) {
        // Where it is not allowed the daemon is no worse off than containerd itself.
        let _ = fs::write("/proc/self/oom_score_adj", adjustment.to_string());
    }
    Ok((fork, known, daemon))
}

/// A little more than containerd's, so that the kernel takes the daemon first.
fn oom_adjustment() -> Option<i32> {
    let path = format!("/proc/{}/oom_score_adj", getppid());
    let containerd: i32 = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    Some((containerd + 1).min(1000))
}

/// Leaves containerd's session and streams; the working directory is its to remove.
fn detach(bundle: &Path) -> Result<Option<File>, Error> {
    let null = Path::new("/dev/null");
    let nowhere = OpenOptions::new().read(true).write(true).open(null);
    let nowhere = nowhere.map_err(failed("open", null))?;
    let detached = setsid()
        .and_then(|_| dup2_stdin(nowhere.as_fd()))
        .and_then(|()| dup2_stdout(nowhere.as_fd()))
        .and_then(|()| dup2_stderr(nowhere.as_fd()));
    detached.map_err(|errno| Error::Fork(errno.into()))?;
    let log = log(&bundle.join(LOG));
    std::env::set_current_dir("/").map_err(failed("change to", Path::new("/")))?;
    Ok(log)
}

/// Opened in both directions, the pipe outlives a containerd that is restarted; and a line that
/// finds it full is dropped instead of holding the daemon up.
fn log(path: &Path) -> Option<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK).open(path).ok()
}

/// Writes the address where a containerd that was restarted looks for it.
fn remember(bundle: &Path, address: &str) -> Result<(), Error> {
    let (path, temporary) = (bundle.join(ADDRESS), bundle.join(".address"));
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    options
        .open(&temporary)
        .and_then(|mut file| file.write_all(address.as_bytes()))
        .and_then(|()| fs::rename(&temporary, &path))
        .map_err(failed("write", &path))
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File {
        doing,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{id::Namespace, sandbox::StateDir};

    fn configured(text: &str) -> Result<Option<ContainerId>, Error> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("config.json");
        fs::write(&path, text).expect("written");
        sandbox(&path)
    }

    #[test]
    fn a_container_names_its_sandbox_and_everything_else_is_one() {
        let named = |kind| {
            configured(&format!(
                r#"{{"annotations":{{"{CONTAINER_TYPE}":"{kind}","{SANDBOX_ID}":"pod1"}}}}"#
            ))
        };
        let pod = ContainerId::parse("pod1").expect("a name");
        assert_eq!(named("container").expect("read"), Some(pod));
        assert_eq!(named("sandbox").expect("read"), None);
        assert_eq!(configured("{}").expect("read"), None);
        assert_eq!(
            sandbox(Path::new("/nowhere/config.json")).expect("read"),
            None
        );
    }

    #[test]
    fn a_start_waits_until_the_pod_before_it_of_its_name_is_gone() {
        let root = tempfile::tempdir().expect("a directory");
        let invocation = Invocation {
            namespace: Namespace::parse("default").expect("a name"),
            id: ContainerId::parse("web").expect("a name"),
            address: String::new(),
            bundle: None,
            debug: false,
        };
        await_predecessor(root.path(), &invocation);
        let state = StateDir::create(root.path(), &invocation.namespace, &invocation.id);
        let state = state.expect("made");
        let path = state.path().to_owned();
        let ending = std::thread::spawn(move || {
            sleep(Duration::from_millis(300));
            drop(state);
        });
        await_predecessor(root.path(), &invocation);
        assert!(!path.exists());
        ending.join().expect("over");
    }

    #[test]
    fn a_sandbox_name_that_is_a_path_is_refused() {
        let text = format!(
            r#"{{"annotations":{{"{CONTAINER_TYPE}":"container","{SANDBOX_ID}":"../x"}}}}"#
        );
        assert!(matches!(configured(&text), Err(Error::SandboxId(_))));
    }

    #[test]
    fn the_address_is_written_whole_and_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let bundle = tempfile::tempdir().expect("a directory");
        for address in ["unix:///run/containerd/s/long-one", "unix:///s"] {
            remember(bundle.path(), address).expect("written");
            let path = bundle.path().join(ADDRESS);
            assert_eq!(fs::read_to_string(&path).expect("read"), address);
            let mode = fs::metadata(&path).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        assert!(!bundle.path().join(".address").exists());
    }
}
