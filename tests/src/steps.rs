//! A command killed at one of its steps: at the n-th system call by which it, or a process that it
//! makes, changes something outside of itself. Nothing of it has to know of this.
//!
//! ```text
//!   command ── makes ──► relay
//!           ── makes ──► pod's process ── makes ──► VMM
//!
//!   containerd ── makes ──► command, through a gate ── makes ──► pod's process ── makes ──► VMM
//! ```

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};

use crate::{
    client::{command::Done, until},
    guest::bin,
    sys::{self, Stop},
};

/// Waits for a word, so that nothing happens unseen.
const GATE: &str = "read -r go; exec \"$@\" </dev/null";

/// How long a command may take, followed on a busy lab machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A process of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Who {
    /// The command itself.
    Command,
    /// What stands for the container.
    Relay,
    /// What serves the pod.
    Pod,
    /// What runs the machine.
    Vmm,
    /// Whatever else there is.
    Other,
}

/// How far it came.
#[derive(Debug)]
pub enum Reached {
    /// It was killed as it entered this system call; the command may go on.
    Killed(&'static str, Child),
    /// The command ended before.
    Over,
}

/// Starts a command and kills the process `who` of it when that enters its `step`-th step, from 1
/// on. Everything else goes on unobserved. What is printed goes to `output`.
///
/// # Errors
/// When it cannot be started or followed.
pub fn kill_at(command: &Command, who: Who, step: usize, output: File) -> Result<Reached> {
    let mut gated = Command::new("sh");
    gated
        .args(["-c", GATE, "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::piped())
        .stdout(output.try_clone()?)
        .stderr(output);
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        // What is followed is followed by a thread, and let go at that one's end.
        let follower = scope.spawn(move || -> Result<_> {
            let mut child = gated.spawn()?;
            let pid = Pid::from_raw(child.id() as i32);
            tell.send(pid)?;
            let mut gate = child.stdin.take().context("no gate")?;
            let order = &[Who::Relay, Who::Pod];
            let followed = Follower::new(pid, order, who, step)?.follow(&mut gate);
            // The end of one that was stuck, and therefore killed, looks as any other.
            if tell.send(pid).is_err() {
                let _ = child.wait();
                bail!("the command is stuck");
            }
            match followed {
                Ok(Some(name)) => Ok(Reached::Killed(name, child)),
                Ok(None) => Ok(Reached::Over),
                Err(error) => {
                    let _ = child.kill();
                    Err(error)
                }
            }
        });
        if let Ok(pid) = told.recv()
            && told.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout)
        {
            drop(told);
            kill(pid, Signal::SIGKILL)?;
        }
        match follower.join() {
            Ok(outcome) => outcome,
            Err(_) => bail!("the thread that follows the command panicked"),
        }
    })
}

/// A program in the place of containerd's shim: the shim, once it is followed.
pub struct Gate {
    directory: tempfile::TempDir,
}

impl Gate {
    /// Makes one.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path();
        let script = format!(
            "#!/bin/sh\n\
             for verb; do :; done\n\
             if [ $verb = start ]; then\n\
             echo $$ > {path}/new; mv {path}/new {path}/pid; read -r go < {path}/go\n\
             fi\n\
             exec {shim} \"$@\"\n",
            path = path.display(),
            shim = bin("containerd-shim-bulkhead-v2")?.display()
        );
        mkfifo(&path.join("go"), Mode::S_IRWXU)?;
        let gate = Self { directory };
        fs::write(gate.program(), script)?;
        fs::set_permissions(gate.program(), fs::Permissions::from_mode(0o755))?;
        Ok(gate)
    }

    /// What containerd is to be told as the runtime.
    pub fn program(&self) -> PathBuf {
        self.directory.path().join("containerd-shim-gate-v2")
    }

    /// Kills the process `who` of a shim that `client` has containerd start when that enters its
    /// `step`-th step. Returns the name of this, if it came so far, and what the client said.
    ///
    /// # Errors
    /// When it cannot be followed, or the client does not end.
    pub fn kill_at(
        &self,
        who: Who,
        step: usize,
        client: impl FnOnce() -> Result<Done>,
    ) -> Result<(Option<&'static str>, Done)> {
        let (tell, told) = mpsc::channel();
        thread::scope(|scope| {
            let follower = scope.spawn(move || {
                let pid = self.arrival()?;
                let mut follower = Follower::new(pid, &[Who::Pod], who, step)?;
                if who != Who::Command {
                    follower.last = Who::Pod;
                }
                follower.tell = Some(tell);
                // Open in both directions it is open at once, whoever reads.
                let mut options = File::options();
                let go = options.read(true).write(true);
                follower.follow(&mut go.open(self.directory.path().join("go"))?)
            });
            let done = client();
            let mut followed = Vec::new();
            loop {
                match told.recv_timeout(PATIENCE) {
                    Ok(pid) => followed.push(pid),
                    Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => {
                        for pid in followed {
                            // It may be one that has ended.
                            let _ = kill(pid, Signal::SIGKILL);
                        }
                        bail!("the shim does not end: {done:?}");
                    }
                }
            }
            match follower.join() {
                Ok(followed) => Ok((followed?, done?)),
                Err(_) => bail!("the thread that follows the shim panicked"),
            }
        })
    }

    /// The shim that came to the gate.
    fn arrival(&self) -> Result<Pid> {
        let path = self.directory.path().join("pid");
        until("the shim", || Ok(path.exists()))?;
        let pid = fs::read_to_string(&path)?.trim().parse()?;
        fs::remove_file(path)?;
        Ok(Pid::from_raw(pid))
    }
}

struct Follower {
    /// What the command makes, in this order.
    order: &'static [Who],
    /// With whose end all is over.
    last: Who,
    /// Who is told of each process that is made.
    tell: Option<mpsc::Sender<Pid>>,
    who: Who,
    step: usize,
    seen: usize,
    /// What a process, by its id, is.
    roles: HashMap<Pid, Who>,
    /// Those that stopped before their maker told of them.
    early: HashSet<Pid>,
}

impl Follower {
    fn new(command: Pid, order: &'static [Who], who: Who, step: usize) -> Result<Self> {
        sys::seize(command).context("cannot follow the command")?;
        sys::interrupt(command)?;
        Ok(Self {
            order,
            last: Who::Command,
            tell: None,
            who,
            step,
            seen: 0,
            roles: HashMap::from([(command, Who::Command)]),
            early: HashSet::new(),
        })
    }

    /// Follows until the step, whose name is returned, or until the end. Who waits at the gate goes
    /// through it when it is seen.
    fn follow(mut self, gate: &mut impl Write) -> Result<Option<&'static str>> {
        let mut is_open = false;
        while let Some((pid, status)) = sys::wait()? {
            if !libc::WIFSTOPPED(status) {
                if self.roles.get(&pid) == Some(&self.last) {
                    return Ok(None);
                }
                continue;
            }
            if !std::mem::replace(&mut is_open, true) {
                gate.write_all(b"\n")?;
            }
            if let Some(name) = self.stopped(pid, status)? {
                return Ok(Some(name));
            }
        }
        bail!("the command vanished")
    }

    /// Looks at a stopped thread and lets it go on, unless the step is reached.
    fn stopped(&mut self, pid: Pid, status: i32) -> Result<Option<&'static str>> {
        let signal = libc::WSTOPSIG(status);
        let Some(role) = self.role(pid) else {
            self.early.insert(pid);
            return Ok(None);
        };
        match status >> 16 {
            libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
                let made = sys::made(pid)?;
                self.born(made, role);
                if self.early.remove(&made) {
                    self.go_on(made, 0)?;
                }
                self.go_on(pid, 0)?;
            }
            0 if signal == libc::SIGTRAP | 0x80 => {
                if let (true, Stop::Entry(number)) = (role == self.who, sys::stop(pid)?)
                    && let Some(name) = name(number)
                {
                    self.seen += 1;
                    if self.seen == self.step {
                        kill(group(pid), Signal::SIGKILL)?;
                        return Ok(Some(name));
                    }
                }
                self.go_on(pid, 0)?;
            }
            0 => self.go_on(pid, signal)?,
            _ => self.go_on(pid, 0)?,
        }
        Ok(None)
    }

    /// Names what a process made: a thread of itself, or another in the order of a start.
    fn born(&mut self, made: Pid, maker: Who) {
        if self.role(made).is_some() {
            return;
        }
        let has = |who: &Who| self.roles.values().any(|role| role == who);
        let role = match maker {
            Who::Command => self.order.iter().copied().find(|who| !has(who)),
            Who::Pod if !has(&Who::Vmm) => Some(Who::Vmm),
            _ => None,
        };
        let role = role.unwrap_or(Who::Other);
        if let Some(tell) = &self.tell {
            // Who gave up waiting wants to know no more.
            let _ = tell.send(made);
        }
        self.roles.insert(made, role);
    }

    fn role(&self, thread: Pid) -> Option<Who> {
        self.roles.get(&group(thread)).copied()
    }

    /// Those that are of no interest are let go; one that was killed is not there to be.
    fn go_on(&self, pid: Pid, signal: i32) -> Result<()> {
        let done = match self.role(pid) {
            Some(role) if role == self.who => sys::step(pid, signal),
            Some(Who::Command | Who::Pod) => sys::resume(pid, signal),
            _ => sys::detach(pid),
        };
        match done {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            done => Ok(done?),
        }
    }
}

/// The process that a thread is of.
fn group(thread: Pid) -> Pid {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    let group = line.and_then(|line| line.trim().parse().ok());
    group.map_or(thread, Pid::from_raw)
}

/// The system calls that are steps.
fn name(number: i64) -> Option<&'static str> {
    const STEPS: [(i64, &str); 31] = [
        (libc::SYS_write, "write"),
        (libc::SYS_mkdir, "mkdir"),
        (libc::SYS_mkdirat, "mkdirat"),
        (libc::SYS_rename, "rename"),
        (libc::SYS_renameat2, "renameat2"),
        (libc::SYS_unlink, "unlink"),
        (libc::SYS_unlinkat, "unlinkat"),
        (libc::SYS_rmdir, "rmdir"),
        (libc::SYS_symlink, "symlink"),
        (libc::SYS_symlinkat, "symlinkat"),
        (libc::SYS_mount, "mount"),
        (libc::SYS_umount2, "umount2"),
        (libc::SYS_move_mount, "move_mount"),
        (libc::SYS_open_tree, "open_tree"),
        (libc::SYS_fsopen, "fsopen"),
        (libc::SYS_fsmount, "fsmount"),
        (libc::SYS_mount_setattr, "mount_setattr"),
        (libc::SYS_pivot_root, "pivot_root"),
        (libc::SYS_clone, "clone"),
        (libc::SYS_clone3, "clone3"),
        (libc::SYS_fork, "fork"),
        (libc::SYS_execve, "execve"),
        (libc::SYS_execveat, "execveat"),
        (libc::SYS_setns, "setns"),
        (libc::SYS_unshare, "unshare"),
        (libc::SYS_setsid, "setsid"),
        (libc::SYS_bind, "bind"),
        (libc::SYS_connect, "connect"),
        (libc::SYS_sendmsg, "sendmsg"),
        (libc::SYS_sendto, "sendto"),
        (libc::SYS_memfd_create, "memfd_create"),
    ];
    let step = STEPS.iter().find(|(step, _)| *step == number);
    step.map(|(_, name)| *name)
}
