//! The tiers of tests: unit and doc tests on this host, where the fuzz targets are compiled too,
//! system tests where KVM works, and on demand the system tests that take long.
//!
//! The system tests are compiled here and only run in the lab, whose processor is emulated; there
//! in two labs at a time. A tier that fails ends the run, so that the last lines are always the
//! failing runner's.

pub(crate) mod fuzz;
mod labs;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::build;
use crate::debian;
use crate::lab::Place;
use crate::process::{cargo, output, run};
use crate::project::Project;

/// The package whose integration tests drive Bulkhead from outside.
pub(crate) const SYSTEM_TESTS: &str = "system-tests";

/// What the names of the programs begin with that take long: real programs on real trees.
const LONG: &str = "long_";

/// What the long tests use of Debian, beside what is essential.
const LONG_PACKAGES: &str =
    "git,sqlite3,rsync,acl,attr,libcap2-bin,postgresql,procps,iperf3,nginx-light";

/// Seconds for all long tests together in the lab.
const LONG_TIMEOUT_S: &str = "7200";

/// Seconds for a program of system tests.
const LIMIT_S: &str = "1800";

/// Seconds for a program of long tests.
const LONG_LIMIT_S: &str = "5400";

/// Seconds for all system tests together in the lab.
const LAB_TIMEOUT_S: &str = "3600";

/// Runs each program in turn, its tests one by one, the rest after a failure too, and fails if one
/// did. The first argument is the seconds after which it is told where everybody is in the kernel;
/// a minute later a program that still is not done is ended. The environment's proxies are not for the
/// tests, whose servers are on this machine, nor is its directory for temporary files, whose path may
/// be too long for sockets.
const RUN_EACH: &str = r#"
limit=$1 failed=
shift
unset TMPDIR http_proxy https_proxy ftp_proxy all_proxy HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY
watch() {
    clock=
    trap '[ -z "$clock" ] || kill $clock 2>/dev/null; exit' TERM
    sleep $limit >/dev/null 2>&1 & clock=$!
    wait $clock
    echo "error: $program is not done after $limit s; who is there, and where:" >&2
    for task in /proc/[0-9]*/task/*; do
        readlink "$task/exe" >/dev/null || continue
        printf '%s: %s\n' "$task" "$(LC_ALL=C tr -c '[:print:]' ' ' <"$task/cmdline" | cut -c 1-200)"
        cat "$task/stack"
    done >&2
}
for program; do
    echo "     Running $program"
    watch & watch=$!
    RUST_TEST_THREADS=1 timeout --foreground --signal KILL $((limit + 60)) "$program" ||
        failed="$failed ${program##*/}"
    kill $watch 2>/dev/null
done
[ -z "$failed" ] || { echo "error: failed:$failed" >&2; exit 1; }
"#;

/// Which tiers to run.
#[derive(Args)]
pub(crate) struct Options {
    /// Only the unit and doc tests
    #[arg(long, conflicts_with = "system")]
    unit: bool,
    /// Only the system tests
    #[arg(long)]
    system: bool,
    /// Only the system tests that take long: databases, git, apt and copies of whole trees
    #[arg(long, conflicts_with_all = ["unit", "system"])]
    long: bool,
}

/// Runs the tiers in order.
pub(crate) fn all(project: &Project, options: &Options) -> Result<()> {
    if options.long {
        return long(project);
    }
    if !options.system {
        unit(project)?;
    }
    if !options.unit {
        system(project)?;
    }
    Ok(())
}

fn unit(project: &Project) -> Result<()> {
    run(cargo()
        .current_dir(&project.root)
        .args([
            "test",
            "--workspace",
            "--exclude",
            SYSTEM_TESTS,
            "--no-fail-fast",
        ])
        // Its path may be too long for sockets.
        .env_remove("TMPDIR"))?;
    fuzz::compile_quick(project)
}

fn system(project: &Project) -> Result<()> {
    build::all(project)?;
    let (_, mut tests) = system_tests(project)?;
    // The stories of its containers that need what the lab has.
    tests.extend(executables(project, "agent", "test")?);
    let containerd = project.cache.join("containerd-testing");
    run(Command::new(project.root.join("xtask/fetch-containerd")).arg(&containerd))?;
    let place = Place::find(project)?;
    place.announce("the system tests");
    let command = |programs: &[PathBuf]| {
        let mut command = place.command(&["--timeout", LAB_TIMEOUT_S, "--disk", "4G"], "sh");
        command
            .args(["-c", RUN_EACH, "sh", LIMIT_S])
            .args(programs)
            .current_dir(&project.root)
            .env("BULKHEAD_PREFIX", project.prefix())
            .env("BULKHEAD_CONTAINERD", containerd.join("bin"));
        command
    };
    match place {
        Place::Here => run(&mut command(&tests)),
        Place::Lab { .. } => labs::run(tests, command),
    }
}

fn long(project: &Project) -> Result<()> {
    build::all(project)?;
    let root = debian::root(&project.cache, "debian-12-programs", LONG_PACKAGES)?;
    let (tests, _) = system_tests(project)?;
    let place = Place::find(project)?;
    place.announce("the long tests");
    run(place
        .command(&["--timeout", LONG_TIMEOUT_S, "--disk", "6G"], "sh")
        .args(["-c", RUN_EACH, "sh", LONG_LIMIT_S])
        .args(tests)
        .current_dir(&project.root)
        .env("BULKHEAD_PREFIX", project.prefix())
        .env("BULKHEAD_DEBIAN", root))
}

/// The system tests' programs: those that take long, and the others.
fn system_tests(project: &Project) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let tests = executables(project, SYSTEM_TESTS, "test")?;
    if tests.is_empty() {
        bail!("package {SYSTEM_TESTS} has no tests");
    }
    let is_long = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with(LONG)
    };
    Ok(tests.into_iter().partition(is_long))
}

/// Compiles a package's programs of one kind (`test` or `bench`) and returns where they are.
pub(crate) fn executables(project: &Project, package: &str, kind: &str) -> Result<Vec<PathBuf>> {
    let messages = output(cargo().current_dir(&project.root).args([
        "test",
        "--package",
        package,
        &format!("--{kind}"),
        "*",
        "--no-run",
        "--message-format=json-render-diagnostics",
    ]))?;
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("cargo wrote no JSON")?;
        let kinds = message["target"]["kind"].as_array();
        let is_kind = kinds.is_some_and(|kinds| kinds.iter().any(|name| name == kind));
        if let (true, Some(program)) = (is_kind, message["executable"].as_str()) {
            programs.push(PathBuf::from(program));
        }
    }
    programs.sort();
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::io::{self, BufRead, BufReader};
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::process::CommandExt;
    use std::process::Stdio;

    use super::*;

    fn run_each(limit: &str, programs: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", RUN_EACH, "sh", limit])
            .args(programs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    #[test]
    fn the_rest_runs_after_a_failure_which_fails_all() {
        let done = run_each("60", &["/bin/false", "/bin/true"])
            .output()
            .unwrap();
        let stdout = String::from_utf8(done.stdout).unwrap();
        assert_eq!(stdout, "     Running /bin/false\n     Running /bin/true\n");
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(stderr, "error: failed: false\n");
        assert!(!done.status.success());
        assert!(run_each("60", &["/bin/true"]).status().unwrap().success());
    }

    #[test]
    fn the_callers_proxies_and_directory_are_not_the_tests() {
        let mut env = run_each("60", &["/usr/bin/env"]);
        let names = ["http_proxy", "HTTPS_PROXY", "all_proxy", "TMPDIR"];
        for name in names.iter().chain(&["BULKHEAD_PREFIX"]) {
            env.env(name, "/nowhere");
        }
        let stdout = String::from_utf8(env.output().unwrap().stdout).unwrap();
        assert!(stdout.contains("BULKHEAD_PREFIX=/nowhere"), "{stdout}");
        for name in names {
            assert!(!stdout.contains(name), "{stdout}");
        }
    }

    #[test]
    fn who_does_not_come_to_an_end_is_told() {
        // What else runs may have any name: this is neither UTF-8 nor without meaning to a shell.
        let mut other = Command::new("/bin/cat")
            .arg0(OsStr::from_bytes(b"other\xff\n\\c"))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        // By then both are what they are to be, also on a busy machine.
        let mut waits = run_each("5", &["/bin/cat"]).spawn().unwrap();
        let mut told = BufReader::new(waits.stderr.take().unwrap());
        let mut lines = Vec::new();
        let both = |lines: &[String]| {
            let is_told = |end: &str| {
                let mut tasks = lines.iter().filter(|line| line.starts_with("/proc/"));
                tasks.any(|line| line.ends_with(end))
            };
            is_told(": /bin/cat ") && is_told(r": other  \c ")
        };
        while !both(&lines) {
            let mut line = Vec::new();
            let read = told.read_until(b'\n', &mut line).unwrap();
            assert!(read > 0, "only this was told:\n{}", lines.join("\n"));
            let line = String::from_utf8_lossy(&line);
            lines.push(line.trim_end_matches('\n').to_owned());
        }
        assert!(
            lines[0].contains("/bin/cat is not done after 5 s"),
            "{}",
            lines[0]
        );
        drop(waits.stdin.take());
        io::copy(&mut told, &mut io::sink()).unwrap();
        assert!(waits.wait().unwrap().success());
        drop(other.stdin.take());
        assert!(other.wait().unwrap().success());
    }
}
