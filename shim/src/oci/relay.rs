//! The host's process that stands for a container or exec of the command line.
//!
//! Engines take the pid of `--pid-file` for the container: they wait for it,
//! signal it, look at its namespaces and its cgroup. So there is one, a child
//! of the command, in namespaces like those of the container, which passes on
//! what it gets and exits as the container's process exits.
//!
//! ```text
//!   relay → pod   S signal             a signal came
//!                 W columns rows       the terminal's size changed
//!   pod → relay   E status             the process has ended: exit like it
//!   end of file   at the relay: exit with 137; at the pod: kill the process
//! ```

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{SigSet, SigmaskHow, pthread_sigmask},
        signalfd::{SfdFlags, SignalFd},
        socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair},
    },
    unistd::{dup2_stderr, dup2_stdin, dup2_stdout, execve, pipe2, setsid},
};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType};
use tokio::io::{Interest, unix::AsyncFd};

use super::tree::{self, Tree};
use crate::{
    bundle::Bundle,
    pod::{Input, Stdio},
    sys::{self, Fork},
};

/// The number at which a relay finds its socket.
pub const SOCKET: i32 = 3;

/// The longest message.
const MESSAGE_MAX: usize = 5;

/// Why there is no relay.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the process that stands for the container: {step}")]
pub struct Error {
    step: String,
    #[source]
    source: io::Error,
}

/// A namespace of the host that is joined.
#[derive(Debug)]
pub struct Joined {
    kind: CloneFlags,
    file: OwnedFd,
}

/// What a relay is made from.
#[derive(Debug, Default)]
pub struct Stand {
    /// What it calls itself: the arguments of the process it stands for.
    arguments: Vec<String>,
    /// Namespaces to be made.
    make: Vec<LinuxNamespaceType>,
    join: Vec<Joined>,
    hostname: Option<String>,
    /// What its mount namespace consists of, if that is to be made.
    tree: Option<Tree>,
    mappings: Option<(String, String)>,
    stdio: Stdio,
    /// Whether the streams are a terminal, which it takes.
    terminal: bool,
}

/// A relay that was made, as the command holds it.
#[derive(Debug)]
pub struct Relay {
    /// Its pid.
    pub pid: u32,
    /// The pod's end of the socket.
    pub socket: OwnedFd,
}

/// What a relay says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayMessage {
    /// A signal came.
    Signal(i32),
    /// The terminal has so many columns and rows.
    Size(u16, u16),
}

impl Stand {
    /// One in namespaces as `spec` wants them.
    ///
    /// # Errors
    /// When a namespace's path is none.
    pub fn for_container(bundle: &Bundle) -> Result<Self, Error> {
        let spec = bundle.spec();
        let mut stand = Self {
            hostname: spec.hostname().clone().filter(|name| !name.is_empty()),
            ..Self::default()
        };
        let Some(linux) = spec.linux() else {
            return Ok(stand);
        };
        for namespace in linux.namespaces().iter().flatten() {
            match namespace.path() {
                Some(path) if !path.as_os_str().is_empty() => {
                    stand.join.push(joined(namespace.typ(), path)?);
                }
                _ => stand.make.push(namespace.typ()),
            }
        }
        if stand.make.contains(&LinuxNamespaceType::User) {
            let map = |mappings: &Option<Vec<LinuxIdMapping>>| {
                let lines = mappings.iter().flatten().map(|mapping| {
                    let (inside, outside) = (mapping.container_id(), mapping.host_id());
                    format!("{inside} {outside} {}\n", mapping.size())
                });
                lines.collect::<String>()
            };
            stand.mappings = Some((map(linux.uid_mappings()), map(linux.gid_mappings())));
        }
        if stand.make.contains(&LinuxNamespaceType::Mount) {
            stand.tree = Some(Tree::of(bundle).map_err(of("copy its mounts"))?);
        }
        Ok(stand)
    }

    /// One in the namespaces of the process `pid`.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn beside(pid: u32) -> Result<Self, Error> {
        let join = [
            (LinuxNamespaceType::Uts, "uts"),
            (LinuxNamespaceType::Ipc, "ipc"),
            (LinuxNamespaceType::Network, "net"),
            (LinuxNamespaceType::Pid, "pid"),
        ];
        let join =
            join.map(|(kind, name)| joined(kind, Path::new(&format!("/proc/{pid}/ns/{name}"))));
        Ok(Self {
            join: join.into_iter().collect::<Result<_, _>>()?,
            ..Self::default()
        })
    }

    /// It, with the words that it calls itself by, and streams, of which a terminal is one.
    #[must_use]
    pub fn called(mut self, arguments: Vec<String>, stdio: Stdio, terminal: bool) -> Self {
        self.arguments = arguments;
        self.stdio = stdio;
        self.terminal = terminal;
        self
    }

    /// Makes it. The process must have a single thread.
    ///
    /// # Errors
    /// When a namespace cannot be made or joined, or the program not be executed.
    pub fn spawn(self) -> Result<Relay, Error> {
        let none = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, none)
            .map_err(at("make a socket pair"))?;
        let (mut report, mut reporter) = pipe()?;
        let (mut go, mut start) = pipe()?;
        for joined in self
            .join
            .iter()
            .filter(|joined| joined.kind == CloneFlags::CLONE_NEWPID)
        {
            // It counts for the children of who joins it.
            setns(joined.file.as_fd(), joined.kind).map_err(at("join its pid namespace"))?;
        }
        let flags = match self.make.contains(&LinuxNamespaceType::Pid) {
            true => libc::CLONE_NEWPID,
            false => 0,
        };
        // From its first instruction on, signals wait until it can pass them on.
        let mut before = SigSet::empty();
        pthread_sigmask(
            SigmaskHow::SIG_BLOCK,
            Some(&SigSet::all()),
            Some(&mut before),
        )
        .map_err(at("block signals"))?;
        let copied = sys::clone_into(flags);
        if let Ok((Fork::Child, _)) = copied {
            drop((ours, report, start));
            let error = self.become_it(theirs, &mut go, &mut reporter);
            // The parent is told, or gone.
            let _ = reporter.write_all(format!("{}\0{}", error.0, error.1 as i32).as_bytes());
            sys::exit_copy(127);
        }
        let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
        let (_, pid) = copied.map_err(|source| Error {
            step: "copy this process".to_owned(),
            source,
        })?;
        drop((theirs, reporter, go));
        let relay = Relay { pid, socket: ours };
        let outcome = self.admit(pid, &mut report, &mut start);
        outcome.inspect_err(|_| relay.discard())?;
        Ok(relay)
    }

    /// The parent's part: maps of ids, and the wait for the program to run.
    fn admit(&self, pid: u32, report: &mut File, start: &mut File) -> Result<(), Error> {
        let mut text = String::new();
        if let Some((uids, gids)) = &self.mappings {
            // Its first byte says that the namespace is there.
            let mut ready = [0];
            if report
                .read(&mut ready)
                .map_err(of("wait for its user namespace"))?
                == 1
                && ready == *b"u"
            {
                for (file, map) in [("uid_map", uids), ("gid_map", gids)] {
                    fs::write(format!("/proc/{pid}/{file}"), map)
                        .map_err(of(&format!("write its {file}")))?;
                }
                start.write_all(b"g").map_err(of("let it go on"))?;
            } else {
                text.push(char::from(ready[0]));
            }
        }
        report
            .read_to_string(&mut text)
            .map_err(of("wait for its program"))?;
        match text.split_once('\0') {
            None if text.is_empty() => Ok(()),
            None => Err(of("run its program")(io::ErrorKind::InvalidData.into())),
            Some((step, errno)) => Err(Error {
                step: step.to_owned(),
                source: io::Error::from_raw_os_error(errno.parse().unwrap_or(0)),
            }),
        }
    }

    /// The child's part; returns only with the step that failed.
    fn become_it(
        self,
        socket: OwnedFd,
        go: &mut File,
        reporter: &mut File,
    ) -> (&'static str, Errno) {
        match self.steps(socket, go, reporter) {
            Ok(never) => match never {},
            Err(failure) => failure,
        }
    }

    fn steps(
        self,
        socket: OwnedFd,
        go: &mut File,
        reporter: &mut File,
    ) -> Result<std::convert::Infallible, (&'static str, Errno)> {
        let step = |name: &'static str| move |errno: Errno| (name, errno);
        let io_step = |name: &'static str| {
            move |error: io::Error| {
                (
                    name,
                    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
                )
            }
        };
        // Its own session: what the terminal sends is for the command.
        setsid().map_err(step("make its session"))?;
        for joined in self
            .join
            .iter()
            .filter(|joined| joined.kind != CloneFlags::CLONE_NEWPID)
        {
            setns(joined.file.as_fd(), joined.kind).map_err(step("join a namespace"))?;
        }
        if self.mappings.is_some() {
            unshare(CloneFlags::CLONE_NEWUSER).map_err(step("make its user namespace"))?;
            reporter
                .write_all(b"u")
                .map_err(io_step("tell of its user namespace"))?;
            go.read_exact(&mut [0])
                .map_err(io_step("wait for its ids"))?;
        }
        unshare(self.flags()).map_err(step("make its namespaces"))?;
        if let Some(tree) = &self.tree {
            let own_processes = self.make.contains(&LinuxNamespaceType::Pid);
            tree.enter(own_processes)
                .map_err(step("enter the container's root"))?;
        }
        if let (Some(name), true) = (&self.hostname, self.make.contains(&LinuxNamespaceType::Uts)) {
            nix::unistd::sethostname(name).map_err(step("set its host name"))?;
        }
        self.streams().map_err(io_step("take its streams"))?;
        let program = CString::new(program().as_os_str().as_bytes())
            .map_err(|_| ("name its program", Errno::EINVAL))?;
        let mut arguments: Vec<CString> = self
            .arguments
            .iter()
            .filter_map(|argument| CString::new(argument.as_str()).ok())
            .collect();
        if arguments.is_empty() {
            arguments.push(program.clone());
        }
        let environment = match self.tree {
            Some(_) => vec![tree::HOST_BELOW],
            None => Vec::new(),
        };
        let socket = place(socket).map_err(io_step("place its socket"))?;
        let failed =
            execve(&program, &arguments, &environment).map_err(step("execute bulkhead-relay"));
        drop(socket);
        failed
    }

    fn flags(&self) -> CloneFlags {
        let flags = self.make.iter().filter_map(|kind| match kind {
            // Made already; the time namespace counts for children only.
            LinuxNamespaceType::Pid | LinuxNamespaceType::User | LinuxNamespaceType::Time => None,
            kind => Some(flag(*kind)),
        });
        flags.fold(CloneFlags::empty(), CloneFlags::union)
    }

    fn streams(&self) -> io::Result<()> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let or_null = |fd: Option<&OwnedFd>| match fd {
            Some(fd) => fd.try_clone(),
            None => null.as_fd().try_clone_to_owned(),
        };
        let Stdio {
            stdin,
            stdout,
            stderr,
            ..
        } = &self.stdio;
        let stdin = match stdin {
            Input::From(fd) => Some(fd),
            Input::Nothing | Input::AtStart => None,
        };
        dup2_stdin(or_null(stdin)?)?;
        dup2_stdout(or_null(stdout.as_ref())?)?;
        dup2_stderr(or_null(stderr.as_ref())?)?;
        match (self.terminal, stdin) {
            (true, Some(terminal)) => sys::control_terminal(terminal.as_fd()),
            _ => Ok(()),
        }
    }
}

impl Relay {
    /// Takes it back: nothing that it stands for was made.
    pub fn discard(&self) {
        use nix::sys::{
            signal::{Signal, kill},
            wait::waitpid,
        };
        let pid = nix::unistd::Pid::from_raw(self.pid as i32);
        // It is our own child, so the number is its until it is waited for.
        let _ = kill(pid, Signal::SIGKILL);
        let _ = waitpid(pid, None);
    }

    /// Waits for its end.
    pub fn reap(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid as i32);
        let _ = nix::sys::wait::waitpid(pid, None);
    }
}

/// The pod's end of a relay's socket.
#[derive(Debug)]
pub(super) struct Line(AsyncFd<OwnedFd>);

impl Line {
    /// Must be called in the runtime.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        sys::watch_readable(socket).map(Self)
    }

    /// What the relay says next; nothing when it is gone.
    pub(super) async fn next(&self) -> Option<RelayMessage> {
        let mut bytes = [0; MESSAGE_MAX];
        loop {
            let received = self.0.async_io(Interest::READABLE, |socket| {
                let flags = MsgFlags::MSG_DONTWAIT;
                Ok(recv(socket.as_raw_fd(), &mut bytes, flags)?)
            });
            match received.await {
                Ok(0) | Err(_) => return None,
                Ok(count) => {
                    if let Some(message) = RelayMessage::parse(&bytes[..count]) {
                        return Some(message);
                    }
                }
            }
        }
    }

    /// Tells it to exit.
    pub(super) fn exit(&self, status: u32) {
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        // One that is gone needs not be told.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let _ = send(self.0.as_raw_fd(), &[b'E', status], flags);
    }
}

impl RelayMessage {
    /// The wire form, and its length.
    pub fn to_bytes(self) -> ([u8; MESSAGE_MAX], usize) {
        match self {
            Self::Signal(number) => ([b'S', number as u8, 0, 0, 0], 2),
            Self::Size(columns, rows) => {
                let ([a, b], [c, d]) = (columns.to_le_bytes(), rows.to_le_bytes());
                ([b'W', a, b, c, d], 5)
            }
        }
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [b'S', number] => Some(Self::Signal(i32::from(number))),
            [b'W', a, b, c, d] => Some(Self::Size(
                u16::from_le_bytes([a, b]),
                u16::from_le_bytes([c, d]),
            )),
            _ => None,
        }
    }
}

fn joined(kind: LinuxNamespaceType, path: &Path) -> Result<Joined, Error> {
    let file = File::open(path).map_err(|source| Error {
        step: format!("open the {kind} namespace {}", path.display()),
        source,
    })?;
    Ok(Joined {
        kind: flag(kind),
        file: file.into(),
    })
}

fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => CloneFlags::from_bits_retain(0x80),
    }
}

/// Puts the socket to its number and lets it stay open over an execution.
fn place(socket: OwnedFd) -> io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let placed = match socket.as_raw_fd() {
        SOCKET => socket,
        _ => {
            // What has that number is of no use to the program.
            nix::unistd::close(SOCKET).or_else(|errno| match errno {
                Errno::EBADF => Ok(()),
                errno => Err(errno),
            })?;
            let placed = sys::duplicate(&socket, SOCKET)?;
            if placed.as_raw_fd() != SOCKET {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            placed
        }
    };
    fcntl(&placed, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(placed)
}

fn pipe() -> Result<(File, File), Error> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(at("make a pipe"))?;
    Ok((reader.into(), writer.into()))
}

fn at(step: &str) -> impl FnOnce(Errno) -> Error {
    let step = step.to_owned();
    move |errno| Error {
        step,
        source: errno.into(),
    }
}

fn of(step: &str) -> impl FnOnce(io::Error) -> Error {
    let step = step.to_owned();
    move |source| Error { step, source }
}

/// Where `bulkhead-relay` lies: beside the running program.
fn program() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    program.with_file_name("bulkhead-relay")
}

/// Waits for the end of a relay that this process made.
pub fn reap(pid: u32) {
    let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid as i32), None);
}

/// A number that nobody guesses, for a name.
pub fn random() -> u64 {
    u64::from_le_bytes(sys::random())
}

/// This process as the relay of a process: of an exec in the foreground.
#[derive(Debug)]
pub struct StandIn {
    ours: OwnedFd,
    theirs: OwnedFd,
}

impl StandIn {
    /// Signals are kept for the process from now on.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        let none = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, none)?;
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None)?;
        Ok(Self { ours, theirs })
    }

    /// The pod's end.
    pub fn theirs(&self) -> BorrowedFd<'_> {
        self.theirs.as_fd()
    }

    /// Stands for the process until its end and returns its status. `size` tells columns and rows
    /// of its terminal.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn stand(self, size: impl Fn() -> Option<(u16, u16)>) -> io::Result<u8> {
        drop(self.theirs);
        stand(self.ours.as_fd(), size)
    }
}

/// As [`stand`], for a process that does nothing else: it gives back the memory that it was started
/// with.
///
/// # Errors
/// As [`stand`].
pub fn stand_alone(
    socket: BorrowedFd<'_>,
    size: impl Fn() -> Option<(u16, u16)>,
) -> io::Result<u8> {
    sys::give_back();
    stand(socket, size)
}

/// What is said of a process whose pod is gone: as if it had been killed.
const KILLED: u8 = 137;

/// Passes signals, which must be blocked, on to the pod at `socket` until that says how the
/// process ended.
///
/// # Errors
/// When the kernel refuses.
fn stand(socket: BorrowedFd<'_>, size: impl Fn() -> Option<(u16, u16)>) -> io::Result<u8> {
    let signals = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC)?;
    loop {
        let mut fds = [
            PollFd::new(socket, PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let [told, signalled] = fds.map(|fd| fd.any() == Some(true));
        if signalled && let Some(signal) = signals.read_signal()? {
            let message = match signal.ssi_signo as i32 {
                libc::SIGWINCH => size().map(|(columns, rows)| RelayMessage::Size(columns, rows)),
                // Those that the kernel sends of its own accord are not the process's.
                libc::SIGCHLD | libc::SIGPIPE | libc::SIGURG | libc::SIGIO => None,
                signal => Some(RelayMessage::Signal(signal)),
            };
            // A pod that is gone is seen at the socket.
            let _ = message.map(|message| say(socket, message));
        }
        if told {
            let mut bytes = [0; 2];
            match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Ok(2) if bytes[0] == b'E' => return Ok(bytes[1]),
                Ok(0) | Err(Errno::ECONNRESET) => return Ok(KILLED),
                _ => {}
            }
        }
    }
}

fn say(socket: BorrowedFd<'_>, message: RelayMessage) -> io::Result<()> {
    let (bytes, length) = message.to_bytes();
    send(socket.as_raw_fd(), &bytes[..length], MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        for message in [RelayMessage::Signal(15), RelayMessage::Size(120, 40)] {
            let (bytes, length) = message.to_bytes();
            assert_eq!(RelayMessage::parse(&bytes[..length]), Some(message));
        }
    }

    proptest! {
        #[test]
        fn other_bytes_are_no_message(bytes in proptest::collection::vec(any::<u8>(), 0..6)) {
            if let Some(message) = RelayMessage::parse(&bytes) {
                let (back, length) = message.to_bytes();
                prop_assert_eq!(&back[..length], &bytes[..]);
            }
        }
    }
}
