//! `linux.seccomp` compiled to a BPF program for the kernel.
//!
//! The program first looks at how the call came in, x86_64's own way or, where
//! the configuration has it, i386's; then it finds the call's number in a
//! balanced tree of intervals; then, where rules test arguments, it makes the
//! tests one after another. Compiled here rather than by a library: what
//! container engines use of seccomp is small, and every call has an action of
//! its own, which the Rust compilers at hand do not have.

mod calls;
mod program;
mod test;

use std::collections::BTreeMap;

use calls::Architecture;
use program::{Body, Case, Part};
use test::Test;

use crate::{
    spec::{Seccomp, SeccompRule},
    sys,
};

/// Why a filter cannot be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// An action that the kernel or this agent has not.
    #[error(
        "linux.seccomp: the action {0:?} is not supported; it is one of SCMP_ACT_ALLOW, ERRNO, KILL, KILL_PROCESS, KILL_THREAD, LOG, TRACE, TRAP"
    )]
    Action(String),
    /// An error number beyond the kernel's.
    #[error("linux.seccomp: the error number {0} is above 4095")]
    Errno(u32),
    /// An unknown comparison.
    #[error(
        "linux.seccomp: the comparison {0:?} of an argument is none; it is one of SCMP_CMP_EQ, NE, LT, LE, GT, GE, MASKED_EQ"
    )]
    Comparison(String),
    /// A call has six arguments.
    #[error("linux.seccomp: no system call has an argument {0}; they are 0 to 5")]
    Argument(u32),
    /// A flag that this agent has not.
    #[error(
        "linux.seccomp: the flag {0:?} is not supported; it is one of SECCOMP_FILTER_FLAG_LOG, SPEC_ALLOW, TSYNC"
    )]
    Flag(String),
    /// More rules than the kernel takes.
    #[error("linux.seccomp: the program has {0} instructions; the kernel takes at most {max}", max = program::MAX)]
    TooLong(usize),
}

/// A compiled filter.
#[derive(Debug, Clone)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: u64,
}

impl Filter {
    /// Compiles the configuration's rules.
    pub(crate) fn compile(seccomp: &Seccomp) -> Result<Self, Error> {
        let default = action(&seccomp.default_action, seccomp.default_errno_ret)?;
        let mut architectures = vec![Architecture::X86_64];
        if seccomp
            .architectures
            .iter()
            .any(|name| name == "SCMP_ARCH_X86")
        {
            architectures.push(Architecture::I386);
        }
        let parts = architectures
            .into_iter()
            .map(|architecture| part(architecture, seccomp, default))
            .collect::<Result<Vec<_>, _>>()?;
        let program = program::assemble(parts)?;
        Ok(Self {
            program,
            flags: flags(&seccomp.flags)?,
        })
    }

    /// Confines this process, and what it executes, from now on.
    pub(crate) fn install(&self) -> std::io::Result<()> {
        sys::install_seccomp(&self.program, self.flags)
    }
}

/// The part of the program for the calls of one architecture.
fn part(architecture: Architecture, seccomp: &Seccomp, default: u32) -> Result<Part, Error> {
    let mut calls = BTreeMap::new();
    for rule in &seccomp.syscalls {
        add(architecture, rule, default, &mut calls)?;
    }
    let highest = calls.keys().next_back().copied();
    Ok(Part {
        architecture: architecture.audit(),
        cases: calls
            .into_iter()
            .map(|(number, body)| Case { number, body })
            .collect(),
        default,
        beyond: beyond(default, highest),
    })
}

/// Adds what `rule` says of its calls. Names that the architecture has not are passed over:
/// profiles name the calls of all architectures and of later kernels.
fn add(
    architecture: Architecture,
    rule: &SeccompRule,
    default: u32,
    calls: &mut BTreeMap<u32, Body>,
) -> Result<(), Error> {
    let action = action(&rule.action, rule.errno_ret)?;
    let alternatives = alternatives(rule)?;
    for number in rule
        .names
        .iter()
        .filter_map(|name| architecture.number(name))
    {
        let body = calls.entry(number).or_insert_with(|| Body::plain(default));
        if alternatives.is_empty() {
            body.otherwise = action;
        }
        for tests in &alternatives {
            body.rules.push((tests.clone(), action));
        }
    }
    Ok(())
}

/// The tests of a rule: all of a list must hold, of one of the lists. Tests of different
/// arguments belong together; several of one argument are alternatives, as other runtimes have
/// made of them for long.
fn alternatives(rule: &SeccompRule) -> Result<Vec<Vec<Test>>, Error> {
    let tests = rule
        .args
        .iter()
        .map(Test::parse)
        .collect::<Result<Vec<_>, _>>()?;
    let repeated = tests.iter().enumerate().any(|(at, test)| {
        tests[..at]
            .iter()
            .any(|earlier| earlier.argument == test.argument)
    });
    Ok(match tests {
        tests if tests.is_empty() => Vec::new(),
        tests if repeated => tests.into_iter().map(|test| vec![test]).collect(),
        tests => vec![tests],
    })
}

/// What happens to calls with a number above all that the rules name: a filter that answers with
/// an error has not heard of them, and programs fall back to older calls on ENOSYS alone.
fn beyond(default: u32, highest: Option<u32>) -> Option<(u32, u32)> {
    let answers_error = default & libc::SECCOMP_RET_ACTION_FULL == libc::SECCOMP_RET_ERRNO;
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    highest
        .filter(|_| answers_error)
        .map(|highest| (highest + 1, enosys))
}

/// The kernel's value of an action.
fn action(name: &str, errno: Option<u32>) -> Result<u32, Error> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    if errno > 4095 {
        return Err(Error::Errno(errno));
    }
    Ok(match name {
        "SCMP_ACT_ALLOW" => libc::SECCOMP_RET_ALLOW,
        "SCMP_ACT_ERRNO" => libc::SECCOMP_RET_ERRNO | errno,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => libc::SECCOMP_RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => libc::SECCOMP_RET_KILL_PROCESS,
        "SCMP_ACT_LOG" => libc::SECCOMP_RET_LOG,
        "SCMP_ACT_TRACE" => libc::SECCOMP_RET_TRACE | errno,
        "SCMP_ACT_TRAP" => libc::SECCOMP_RET_TRAP,
        other => return Err(Error::Action(other.to_owned())),
    })
}

/// The kernel's value of the filter's flags.
fn flags(names: &[String]) -> Result<u64, Error> {
    names.iter().try_fold(0, |flags, name| {
        Ok(flags
            | match name.as_str() {
                "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                // The process that is confined has one thread.
                "SECCOMP_FILTER_FLAG_TSYNC" => 0,
                other => return Err(Error::Flag(other.to_owned())),
            })
    })
}

#[cfg(test)]
mod tests;
