//! Laying a filter out as a BPF program.

use super::{
    Error,
    test::{Step, Target, Test},
};

/// The most instructions of a program, BPF_MAXINSNS.
pub(super) const MAX: usize = 4096;

/// Set in the numbers of the x32 way of calling, which the guest's kernel has not.
const X32: u32 = 0x4000_0000;

/// Offsets in struct seccomp_data.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;

/// What happens to one call: of the rules the first whose tests all hold, else the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Body {
    pub(super) rules: Vec<(Vec<Test>, u32)>,
    pub(super) otherwise: u32,
}

impl Body {
    /// One action, whatever the arguments.
    pub(super) fn plain(action: u32) -> Self {
        Self {
            rules: Vec::new(),
            otherwise: action,
        }
    }
}

/// What happens to the call `number`.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) number: u32,
    pub(super) body: Body,
}

/// All numbers from `from` up to where the next interval begins.
#[derive(Debug)]
struct Interval {
    from: u32,
    body: Body,
}

/// What happens to the calls of one architecture.
#[derive(Debug)]
pub(super) struct Part {
    /// Which, `AUDIT_ARCH_...`.
    pub(super) architecture: u32,
    /// Calls by their numbers, ascending.
    pub(super) cases: Vec<Case>,
    /// What other calls get.
    pub(super) default: u32,
    /// From which number on calls get something else, and what.
    pub(super) beyond: Option<(u32, u32)>,
}

/// Makes the program of `parts`; a call of any other architecture ends the process.
pub(super) fn assemble(parts: Vec<Part>) -> Result<Vec<libc::sock_filter>, Error> {
    let mut program = vec![load(ARCHITECTURE_AT)];
    for part in parts {
        let calls = [
            load(NUMBER_AT),
            jump(libc::BPF_JGE, X32, 0, 1),
            ret(libc::SECCOMP_RET_KILL_PROCESS),
        ];
        let architecture = part.architecture;
        let tree = tree(&intervals(part.cases, part.default, part.beyond));
        let length = (calls.len() + tree.len()) as u32;
        program.push(jump(libc::BPF_JEQ, architecture, 1, 0));
        program.push(statement(libc::BPF_JMP | libc::BPF_JA, length));
        program.extend(calls);
        program.extend(tree);
    }
    program.push(ret(libc::SECCOMP_RET_KILL_PROCESS));
    if program.len() > MAX {
        return Err(Error::TooLong(program.len()));
    }
    Ok(program)
}

/// The whole range of numbers, without neighbours of the same body.
fn intervals(cases: Vec<Case>, default: u32, beyond: Option<(u32, u32)>) -> Vec<Interval> {
    let mut intervals: Vec<Interval> = Vec::new();
    let mut add = |from: u32, body: Body| match intervals.last_mut() {
        Some(last) if last.from == from => last.body = body,
        Some(last) if last.body == body => {}
        _ => intervals.push(Interval { from, body }),
    };
    add(0, Body::plain(default));
    for Case { number, body } in cases {
        add(number, body);
        add(number + 1, Body::plain(default));
    }
    if let Some((from, action)) = beyond {
        add(from, Body::plain(action));
    }
    // Setting an interval's body anew may have made it its neighbour's.
    intervals.dedup_by(|later, earlier| later.body == earlier.body);
    intervals
}

/// A search for the interval that the number, already loaded, is in.
fn tree(intervals: &[Interval]) -> Vec<libc::sock_filter> {
    match intervals {
        [] => Vec::new(),
        [one] => body(&one.body),
        _ => {
            let (below, above) = intervals.split_at(intervals.len() / 2);
            let (below, from, above) = (tree(below), above[0].from, tree(above));
            // Conditional jumps reach 255 instructions, this one any distance.
            let over = statement(libc::BPF_JMP | libc::BPF_JA, below.len() as u32);
            let mut program = vec![jump(libc::BPF_JGE, from, 0, 1), over];
            program.extend(below);
            program.extend(above);
            program
        }
    }
}

fn body(body: &Body) -> Vec<libc::sock_filter> {
    let mut program = Vec::new();
    for (tests, action) in &body.rules {
        program.extend(rule(tests, *action));
    }
    program.push(ret(body.otherwise));
    program
}

/// Tests, and the action if all hold. At most six tests of six instructions, so that every jump
/// is short.
fn rule(tests: &[Test], action: u32) -> Vec<libc::sock_filter> {
    let tests: Vec<Vec<Step>> = tests.iter().map(Test::steps).collect();
    let length: usize = tests.iter().map(Vec::len).sum::<usize>() + 1;
    let mut program = Vec::with_capacity(length);
    for steps in &tests {
        let passed = program.len() + steps.len();
        for step in steps {
            let after = program.len() + 1;
            let distance = |target| match target {
                Target::Next => 0,
                Target::Pass => (passed - after) as u8,
                Target::Fail => (length - after) as u8,
            };
            program.push(libc::sock_filter {
                code: step.code as u16,
                jt: distance(step.yes),
                jf: distance(step.no),
                k: step.operand,
            });
        }
    }
    program.push(ret(action));
    program
}

fn load(at: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at)
}

fn ret(action: u32) -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, action)
}

fn statement(code: u32, operand: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k: operand,
    }
}

fn jump(comparison: u32, operand: u32, yes: u8, no: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: (libc::BPF_JMP | comparison | libc::BPF_K) as u16,
        jt: yes,
        jf: no,
        k: operand,
    }
}
