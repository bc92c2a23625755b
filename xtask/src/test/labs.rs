//! The system tests in several labs at a time: each emulates one processor, and hosts have more.
//!
//! The first lab's output is shown as it comes, the others' after it, each whole; and last, what
//! failed, again, unless it is there already.
//!
//! A lab machine that stands still is the emulator's fault, not that of who runs in it: what it
//! had not done is done in another, once.

use std::io::{self, BufRead, BufReader, PipeReader, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{mem, thread};

use anyhow::{Context, Result, bail};

/// How many labs run at a time, at most: as many as the smallest machine has processors.
const LABS: usize = 2;

/// About how many seconds a program's tests take in the lab. One that is not here counts as
/// [`UNKNOWN_S`]; nothing but the balance of the labs depends on it.
const SECONDS: [(&str, u32); 24] = [
    ("containerd", 309),
    ("podman_services", 215),
    ("podman", 144),
    ("docker", 136),
    ("robust", 135),
    ("registry", 100),
    ("images", 84),
    ("run", 79),
    ("cri", 72),
    ("buildah", 67),
    ("block", 65),
    ("files", 56),
    ("image_network", 53),
    ("task_network", 46),
    ("machines", 42),
    ("cni", 31),
    ("volumes", 24),
    ("net", 24),
    ("vmm", 20),
    ("oci", 18),
    ("plugins", 16),
    ("disks", 15),
    ("pod_network", 7),
    ("demo", 6),
];

const UNKNOWN_S: u32 = 60;

/// How a program's part of the output begins.
const HEADING: &str = "     Running ";

/// How the last line of a program's tests begins.
const RESULT: &str = "test result: ";

/// The lab's exit status when nothing was heard of its machine.
const STOOD_STILL: i32 = 123;

/// What one lab printed.
struct Printed {
    status: Option<i32>,
    lines: Vec<String>,
}

/// Runs the programs, shared among labs; `command` makes the command of a lab.
pub(super) fn run(
    programs: Vec<PathBuf>,
    command: impl Fn(&[PathBuf]) -> Command + Sync,
) -> Result<()> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let shares = share(programs, processors.min(LABS));
    let printed = thread::scope(|scope| {
        let runs: Vec<_> = shares
            .iter()
            .enumerate()
            .map(|(index, share)| {
                let (first, again) = (command(share), &command);
                scope.spawn(move || whole(share, first, again, index == 0))
            })
            .collect();
        let joined = runs.into_iter().map(|run| match run.join() {
            Ok(printed) => printed,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect::<Result<Vec<_>>>()
    })?;
    for later in &printed[1..] {
        show(&later.lines)?;
    }
    let failed: Vec<_> = printed.iter().filter(|one| !one.is_well()).collect();
    if failed.is_empty() {
        return Ok(());
    }
    for one in &failed {
        show(&failures(&one.lines))?;
    }
    bail!(
        "the system tests failed in {} of {} labs",
        failed.len(),
        printed.len()
    )
}

/// Shares the programs out: each, the longest first, to who has least to do.
fn share(mut programs: Vec<PathBuf>, count: usize) -> Vec<Vec<PathBuf>> {
    programs.sort_by_key(|program| std::cmp::Reverse(seconds(program)));
    let mut shares = vec![(0, Vec::new()); count.clamp(1, programs.len().max(1))];
    for program in programs {
        if let Some((load, share)) = shares.iter_mut().min_by_key(|(load, _)| *load) {
            *load += seconds(&program);
            share.push(program);
        }
    }
    shares.into_iter().map(|(_, share)| share).collect()
}

fn seconds(program: &Path) -> u32 {
    let file = program.file_name().unwrap_or_default().to_string_lossy();
    // Cargo adds a hash to the name.
    let name = file.rsplit_once('-').map_or(&*file, |(name, _)| name);
    let known = SECONDS.iter().find(|(known, _)| *known == name);
    known.map_or(UNKNOWN_S, |(_, seconds)| *seconds)
}

/// Runs a share to its end, in another lab if the first stands still.
fn whole(
    share: &[PathBuf],
    first: Command,
    command: &impl Fn(&[PathBuf]) -> Command,
    live: bool,
) -> Result<Printed> {
    let mut printed = output(first, live)?;
    if printed.status != Some(STOOD_STILL) {
        return Ok(printed);
    }
    let left = left(share, &printed.lines);
    let notice = format!(
        "xtask: a lab machine stood still; {} of its {} programs run in another\n",
        left.len(),
        share.len()
    );
    if live {
        show(std::slice::from_ref(&notice))?;
    }
    let mut second = output(command(&left), live)?;
    let failed_before = printed.lines.iter().any(|line| is_failure(line));
    if failed_before && second.is_well() {
        second.status = Some(1);
    }
    printed.lines.push(notice);
    printed.lines.append(&mut second.lines);
    Ok(Printed {
        lines: printed.lines,
        ..second
    })
}

/// The programs that have not come to their end, by what was printed.
fn left(share: &[PathBuf], lines: &[String]) -> Vec<PathBuf> {
    let mut left = share.to_vec();
    let mut running = None;
    for line in lines {
        if let Some(program) = line.strip_prefix(HEADING) {
            running = Some(Path::new(program.trim_end()));
        } else if line.starts_with(RESULT) {
            left.retain(|program| Some(&**program) != running);
        }
    }
    left
}

fn is_failure(line: &str) -> bool {
    line.starts_with(RESULT) && !line.starts_with("test result: ok")
}

/// Runs a lab to its end, and shows what it prints if this is `live`.
fn output(mut lab: Command, live: bool) -> Result<Printed> {
    let (reader, writer) = io::pipe()?;
    let mut child = lab
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .context("cannot start the lab")?;
    // Else this process keeps the pipe open.
    mem::drop(lab);
    let lines = lines(reader, live)?;
    let status = child.wait()?.code();
    Ok(Printed { status, lines })
}

impl Printed {
    fn is_well(&self) -> bool {
        self.status == Some(0)
    }
}

fn lines(reader: PipeReader, live: bool) -> Result<Vec<String>> {
    let mut reader = BufReader::new(reader);
    let mut lines = Vec::new();
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line).into_owned();
        if live {
            show(std::slice::from_ref(&text))?;
        }
        lines.push(text);
        line.clear();
    }
    Ok(lines)
}

/// The parts of the programs that did not succeed, and what was said beside them.
fn failures(lines: &[String]) -> Vec<String> {
    let is_heading = |line: &String| line.starts_with(HEADING);
    let mut failures = Vec::new();
    let mut rest = lines;
    while let Some((first, others)) = rest.split_first() {
        let length = others.iter().position(is_heading).unwrap_or(others.len());
        let (part, after) = rest.split_at(1 + length);
        let well = is_heading(first) && part.iter().any(|line| line.starts_with("test result: ok"));
        if !well {
            failures.extend_from_slice(part);
        }
        rest = after;
    }
    failures
}

fn show(lines: &[String]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    for line in lines {
        stdout.write_all(line.as_bytes())?;
    }
    Ok(stdout.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn the_longest_program_is_alone_and_none_is_lost() {
        let all = paths(&["/t/disks-1", "/t/net-2", "/t/robust-3", "/t/vmm-4"]);
        let shares = share(all.clone(), 2);
        assert_eq!(shares[0], paths(&["/t/robust-3"]));
        assert_eq!(shares[1], paths(&["/t/net-2", "/t/vmm-4", "/t/disks-1"]));
        assert_eq!(
            share(all.clone(), 1),
            [paths(&[
                "/t/robust-3",
                "/t/net-2",
                "/t/vmm-4",
                "/t/disks-1"
            ])]
        );
        assert_eq!(share(paths(&["/t/a-1"]), 2), [paths(&["/t/a-1"])]);
    }

    #[test]
    fn only_what_failed_is_shown_again() {
        let text = "     Running a\nrunning 1 test\ntest result: ok. 1 passed\n     Running b\n\
                    test result: FAILED. 0 passed\n     Running c\nkilled\nerror: failed: b c\n";
        let lines: Vec<_> = text.split_inclusive('\n').map(str::to_owned).collect();
        let shown = failures(&lines).concat();
        assert_eq!(
            shown,
            "     Running b\ntest result: FAILED. 0 passed\n     Running c\nkilled\nerror: failed: b c\n"
        );
    }

    #[test]
    fn each_labs_output_is_whole_and_a_failure_fails_the_run() {
        let lab = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let printed = output(lab("echo one; echo two >&2; exit 3"), false).unwrap();
        assert_eq!(printed.status, Some(3));
        assert_eq!(printed.lines, ["one\n", "two\n"]);
        assert!(run(paths(&["a", "b"]), |_| lab("true")).is_ok());
        let fails_for_b = |share: &[PathBuf]| match share.contains(&PathBuf::from("b")) {
            true => lab("exit 1"),
            false => lab("true"),
        };
        assert!(run(paths(&["a", "b"]), fails_for_b).is_err());
    }
    #[test]
    fn what_a_lab_that_stood_still_had_not_done_is_done_in_another() {
        let share = paths(&["/t/a-1", "/t/b-2", "/t/c-3"]);
        let first = |result: &str| {
            format!(
                "echo '     Running /t/a-1'; echo 'test result: {result}'; \
                 echo '     Running /t/b-2'; echo 'running 1 test'; exit 123"
            )
        };
        let lab = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let second = |left: &[PathBuf]| {
            assert_eq!(left, paths(&["/t/b-2", "/t/c-3"]));
            lab("echo again")
        };
        let printed = whole(&share, lab(&first("ok")), &second, false).unwrap();
        assert!(printed.is_well());
        assert_eq!(printed.lines.last().unwrap(), "again\n");
        let printed = whole(&share, lab(&first("FAILED")), &second, false).unwrap();
        assert!(!printed.is_well());
        let stands_still = |_: &[PathBuf]| lab("exit 123");
        let printed = whole(&share, lab(&first("ok")), &stands_still, false).unwrap();
        assert!(!printed.is_well());
    }
}
