//! What containers of the command line are put through: a kill at each step of their start, many
//! lives one after the other, many at once. Afterwards the host is as it was before.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::{
        prctl::set_child_subreaper,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tempfile::NamedTempFile;

use crate::{
    client::{command::run, leftovers::Leftovers},
    container::pss_kib,
    steps::{Reached, Who, kill_at},
    verbs::{Container, eventually, eventually_within},
};

/// How long `delete --force` may take, whatever it finds.
const REMOVAL: Duration = Duration::from_secs(45);

/// How long a command may take among several at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(240);

/// How long a process is left alone before it is said to rest: several times of what it waits
/// itself before it gives memory back.
const REST: Duration = Duration::from_secs(4);

/// Kills `who` at each of these steps of a container's making, and lets `delete --force` undo what
/// is left, until there are no more steps. Returns at how many it was killed.
///
/// # Errors
/// When something stays, or a command does not end.
pub fn kill_at_steps(who: Who, steps: impl IntoIterator<Item = usize>) -> Result<usize> {
    set_child_subreaper(true)?;
    let before = Leftovers::now()?;
    let web = Container::plan(None, "web", "sleep 1000")?;
    let mut kills = 0;
    for step in steps {
        let log = File::create(web.output_file())?;
        let reached = kill_at(&web.creation()?, who, step, log)?;
        let (place, mut create) = match reached {
            Reached::Killed(name, child) => (format!("{who:?}, step {step}: {name}"), Some(child)),
            Reached::Over => (format!("{who:?}, step {step}: none"), None),
        };
        let mut undo = || -> Result<()> {
            let begin = Instant::now();
            run(&mut web.command(&["delete", "--force", "web"])?)?.ends_with(0)?;
            ensure!(begin.elapsed() < REMOVAL, "it took {:?}", begin.elapsed());
            if let Some(create) = &mut create {
                eventually("the end of `create`", || Ok(create.try_wait()?.is_some()))?;
            }
            let said = web.output()?;
            ensure!(!said.contains("panicked"), "{said}");
            // What there is not is as good as deleted.
            run(&mut web.command(&["delete", "--force", "web"])?)?.ends_with(0)?;
            no_children()?;
            before.are_all()?;
            empty(web.state().parent().context("no parent")?)
        };
        undo().with_context(|| format!("{place}; create: {}", web.output().unwrap_or_default()))?;
        println!("{place}: nothing is left");
        if create.is_none() {
            break;
        }
        kills += 1;
    }
    Ok(kills)
}

/// Makes, starts, asks and deletes containers, one after the other, in one root.
///
/// # Errors
/// When a command fails or something is left.
pub fn cycles(count: usize) -> Result<()> {
    let root = tempfile::tempdir()?;
    let before = Leftovers::now()?;
    let begin = Instant::now();
    for number in 0..count {
        let mut web = Container::plan(Some(root.path()), "web", "echo up; exit 7")?;
        web.make().with_context(|| format!("cycle {number}"))?;
        web.ok(&["start", "web"])?;
        ensure!(web.ended()? == 7, "cycle {number}");
        web.ok(&["delete", "web"])?;
        ensure!(web.output()? == "up\n", "cycle {number}: {}", web.output()?);
        if (number + 1).is_multiple_of(20) {
            println!("{} cycles after {:?}", number + 1, begin.elapsed());
        }
    }
    println!("{count} cycles took {:?}", begin.elapsed());
    before.are_all()?;
    empty(&root.path().join("default"))
}

/// Makes, starts and deletes containers all at once, with execs while they run; what belongs to
/// each while it runs stays as large as it was.
///
/// # Errors
/// When a command fails, something is left, or grows.
pub fn at_once(count: usize, execs: usize) -> Result<()> {
    set_child_subreaper(true)?;
    let root = tempfile::tempdir()?;
    let before = Leftovers::now()?;
    let begin = Instant::now();
    let mut all = Vec::new();
    for number in 0..count {
        all.push(Container::plan(
            Some(root.path()),
            &format!("web-{number}"),
            "sleep 1000",
        )?);
    }
    in_parallel(&mut all, |web| web.make())?;
    println!("{count} containers were made in {:?}", begin.elapsed());
    in_parallel(&mut all, |web| {
        let id = web.id().to_owned();
        web.ok(&["start", &id]).map(drop)
    })?;
    let web = &all[0];
    for _ in 0..3 {
        web.ok(&["exec", web.id(), "true"])?;
    }
    let owner = web.owner()?;
    let at_first = Held::at_rest(owner)?;
    for _ in 0..execs {
        web.ok(&["exec", web.id(), "true"])?;
        web.ok(&["state", web.id()])?;
    }
    let now = Held::at_rest(owner)?;
    println!("after {execs} execs {at_first:?} is {now:?}");
    ensure!(!now.has_grown(&at_first), "{at_first:?} grew to {now:?}");
    ensure!(
        web.ok(&["list", "-q"])?.lines().count() == count,
        "not all are listed"
    );

    in_parallel(&mut all, |web| {
        let id = web.id().to_owned();
        web.ok(&["delete", "--force", &id])?;
        ensure!(web.ended()? == 137, "{id}");
        Ok(())
    })?;
    println!("all over after {:?}", begin.elapsed());
    drop(all);
    before.are_all()?;
    empty(&root.path().join("default"))
}

/// Gives each verb `count` times at once to a container, and then all of them at once to another.
///
/// # Errors
/// When one that can be done is not, or twice where once is right; when a command does not end, or
/// something is left.
pub fn verbs_at_once(count: usize) -> Result<()> {
    let before = Leftovers::now()?;
    let script = "trap 'exit 3' TERM; while :; do sleep 0.1; done";
    let web = Container::create(script, |_| {})?;
    assert_eq!(
        successes(&web, count, &["start", "web"])?,
        1,
        "it is started once"
    );
    assert_eq!(successes(&web, count, &["state", "web"])?, count);
    assert_eq!(successes(&web, count, &["exec", "web", "true"])?, count);
    assert_eq!(successes(&web, count, &["pause", "web"])?, 1);
    assert_eq!(successes(&web, count, &["resume", "web"])?, 1);
    assert_eq!(
        successes(
            &web,
            count,
            &[
                "create",
                "--bundle",
                &web.bundle.path().to_string_lossy(),
                "web"
            ]
        )?,
        0
    );
    assert!(successes(&web, count, &["kill", "web", "TERM"])? >= 1);
    assert_eq!(web.ended()?, 3);
    eventually("its end", || Ok(web.status()? == "stopped"))?;
    assert_eq!(successes(&web, count, &["kill", "web", "TERM"])?, 0);
    assert!(successes(&web, count, &["delete", "web"])? >= 1);
    assert_eq!(web.run(&["state", "web"])?.status.code(), Some(125));
    before.are_all()?;

    // All of them at once, on one that runs.
    let web = Container::create(script, |_| {})?;
    let bundle = web.bundle.path().to_string_lossy().into_owned();
    let verbs = [
        &["start", "web"][..],
        &["exec", "web", "true"],
        &["state", "web"],
        &["kill", "web", "KILL"],
        &["pause", "web"],
        &["list"],
        &["create", "--bundle", &bundle, "web"],
        &["delete", "--force", "web"],
        &["gc"],
    ];
    let given: Result<Vec<_>> = verbs.iter().map(|verb| give(&web, verb)).collect();
    for command in given? {
        command.succeeds()?;
    }
    web.ok(&["delete", "--force", "web"])?;
    no_children()?;
    before.are_all()?;
    web.bundle.nothing_is_left()
}

/// How many of several such commands at once succeed; each of the others says why not.
fn successes(web: &Container, count: usize, args: &[&str]) -> Result<usize> {
    let start = Instant::now();
    let given: Result<Vec<_>> = (0..count).map(|_| give(web, args)).collect();
    let mut done = 0;
    for command in given? {
        done += usize::from(command.succeeds()?);
    }
    println!(
        "{done} of {count} {args:?} succeeded, after {:?}",
        start.elapsed()
    );
    Ok(done)
}

/// A command under way. What it says goes to a file: a container that it made would hold a pipe.
struct Given<'a> {
    args: &'a [&'a str],
    child: Child,
    said: NamedTempFile,
}

fn give<'a>(web: &Container, args: &'a [&'a str]) -> Result<Given<'a>> {
    let said = NamedTempFile::new()?;
    let mut command = web.command(args)?;
    let child = command.stdout(Stdio::null()).stderr(said.reopen()?).spawn();
    Ok(Given {
        args,
        child: child?,
        said,
    })
}

impl Given<'_> {
    /// Whether it succeeds; if it does not, it says so in one line.
    fn succeeds(mut self) -> Result<bool> {
        let args = self.args;
        let mut status = None;
        eventually_within(AT_ONCE, &format!("the end of {args:?}"), || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        let succeeded = status.is_some_and(|status| status.success());
        let words = fs::read_to_string(self.said.path())?;
        ensure!(!words.contains("panicked"), "{args:?}: {words}");
        if !succeeded {
            ensure!(words.lines().count() == 1, "{args:?} says: {words}");
        }
        Ok(succeeded)
    }
}

/// What a process that lives long has.
#[derive(Debug)]
pub(crate) struct Held {
    kib: u64,
    descriptors: usize,
    threads: usize,
}

impl Held {
    /// What a process holds once it rests: the least of each within [`REST`], as memory that only
    /// commands need goes some time after the last one, and all at once.
    pub(crate) fn at_rest(pid: Pid) -> Result<Self> {
        let begin = Instant::now();
        let mut least = Self::by(pid)?;
        while begin.elapsed() < REST {
            std::thread::sleep(Duration::from_millis(200));
            let now = Self::by(pid)?;
            least = Self {
                kib: least.kib.min(now.kib),
                descriptors: least.descriptors.min(now.descriptors),
                threads: least.threads.min(now.threads),
            };
        }
        Ok(least)
    }

    /// Whether it is more than it was, but for a little memory.
    pub(crate) fn has_grown(&self, before: &Self) -> bool {
        self.kib >= before.kib + 512
            || self.descriptors > before.descriptors
            || self.threads > before.threads
    }

    fn by(pid: Pid) -> Result<Self> {
        let count = |what: &str| -> Result<usize> {
            Ok(fs::read_dir(format!("/proc/{pid}/{what}"))?.count())
        };
        Ok(Self {
            kib: pss_kib(pid)?,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }
}

fn in_parallel(
    all: &mut [Container],
    act: impl Fn(&mut Container) -> Result<()> + Sync,
) -> Result<()> {
    let act = &act;
    std::thread::scope(|scope| {
        let threads: Vec<_> = all
            .iter_mut()
            .map(|one| scope.spawn(move || act(one).with_context(|| one.id().to_owned())))
            .collect();
        let ends = threads.into_iter().map(|thread| {
            let end = thread.join();
            end.unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
        });
        // All are joined before the first error is told.
        ends.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Waits for the end of whatever came to this process by the death of its parent.
fn no_children() -> Result<()> {
    let mut living = BTreeMap::new();
    let told = eventually("the end of what killed processes left", || {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) => {}
                Err(nix::errno::Errno::ECHILD) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
        living = children()?;
        Ok(false)
    });
    told.with_context(|| format!("{living:?}"))
}

fn children() -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task")? {
        let text = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        for pid in text.split_whitespace() {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.insert(pid.to_owned(), name);
        }
    }
    Ok(found)
}

/// Fails unless a namespace's directory has no entry.
fn empty(namespace: &Path) -> Result<()> {
    let entries = fs::read_dir(namespace).into_iter().flatten().flatten();
    let left: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    ensure!(left.is_empty(), "state is left: {left:?}");
    Ok(())
}
