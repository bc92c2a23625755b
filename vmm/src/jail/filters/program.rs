//! A list as the kernel's program (classic BPF): a search tree over the calls' numbers.
//!
//! The kernel runs a new filter once for each call that it knows, to remember those that are
//! allowed whatever their arguments. A chain of comparisons, as long as the list, makes that
//! cost more than all else that a thread does at its start; a tree has a few for each call.
//!
//! ```text
//!   architecture? ── wrong ──► end of the process
//!   number ≥ middle? ── no ──► ... its left half ...
//!        └─ yes ─► ... its right half ...
//!   leaf: one answer, or one call's arguments and then an answer
//! ```

use seccompiler::{BpfProgram, sock_filter};

use super::list::Argument;

/// Instructions, as linux/bpf_common.h and linux/filter.h compose them.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const JUMP_IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// Places in `struct seccomp_data` of linux/seccomp.h.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// The architecture of this program, by linux/audit.h.
#[cfg(target_arch = "x86_64")]
const OWN_ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const OWN_ARCHITECTURE: u32 = 0xc000_00b7;

/// What a filter answers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answers {
    /// To a call on the list.
    pub(super) listed: u32,
    /// To any other.
    pub(super) other: u32,
    /// To a call by the numbers of another architecture.
    pub(super) foreign: u32,
}

/// The calls from a number to the next range's.
#[derive(Debug, Clone)]
struct Range<'a> {
    from: u32,
    leaf: Leaf<'a>,
}

#[derive(Debug, Clone, PartialEq)]
enum Leaf<'a> {
    Answer(u32),
    /// One call, and the ways in which it is allowed.
    Ways(&'a [Vec<Argument>]),
}

/// Makes the program for calls in ascending order, each with the ways in which it is allowed or
/// nothing for any.
pub(super) fn compile<'a>(
    calls: impl Iterator<Item = (u32, Option<&'a [Vec<Argument>]>)>,
    answers: Answers,
) -> BpfProgram {
    let mut program = vec![
        statement(LOAD, ARCHITECTURE),
        jump(JUMP_IF_EQUAL, OWN_ARCHITECTURE, 1, 0),
        statement(RETURN, answers.foreign),
        statement(LOAD, NUMBER),
    ];
    program.extend(tree(&ranges(calls, answers), answers));
    program
}

/// The ranges of numbers that are answered alike, from 0 without a gap.
fn ranges<'a>(
    calls: impl Iterator<Item = (u32, Option<&'a [Vec<Argument>]>)>,
    answers: Answers,
) -> Vec<Range<'a>> {
    let other = Leaf::Answer(answers.other);
    let mut ranges = vec![Range {
        from: 0,
        leaf: other.clone(),
    }];
    for (from, ways) in calls {
        let leaf = ways.map_or(Leaf::Answer(answers.listed), Leaf::Ways);
        // The range before it said to go on; it begins anew behind this call.
        ranges.pop_if(|last| last.from == from);
        if ranges.last().is_none_or(|last| last.leaf != leaf) {
            ranges.push(Range { from, leaf });
        }
        ranges.push(Range {
            from: from + 1,
            leaf: other.clone(),
        });
    }
    ranges
}

fn tree(ranges: &[Range<'_>], answers: Answers) -> BpfProgram {
    if let [range] = ranges {
        return leaf(&range.leaf, answers);
    }
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let middle = right[0].from;
    let (left, right) = (tree(left, answers), tree(right, answers));
    // A condition's jump reaches 255 instructions, an unconditional one any.
    let mut program = match u8::try_from(left.len()) {
        Ok(over) => vec![jump(JUMP_IF_AT_LEAST, middle, over, 0)],
        Err(_) => vec![
            jump(JUMP_IF_AT_LEAST, middle, 0, 1),
            statement(JUMP, left.len() as u32),
        ],
    };
    program.extend(left);
    program.extend(right);
    program
}

fn leaf(leaf: &Leaf<'_>, answers: Answers) -> BpfProgram {
    let ways = match leaf {
        Leaf::Answer(answer) => return vec![statement(RETURN, *answer)],
        Leaf::Ways(ways) => ways,
    };
    let mut program = BpfProgram::new();
    for arguments in *ways {
        let checks: Vec<[sock_filter; 2]> = arguments.iter().flat_map(checks).collect();
        let count = checks.len();
        for (index, [load, mut check]) in checks.into_iter().enumerate() {
            // Where it fails, over the checks that are left and the answer, to the next way.
            let over = (2 * (count - 1 - index) + 1) as u8;
            match check.code {
                JUMP_IF_ANY_BIT => check.jt = over,
                _ => check.jf = over,
            }
            program.extend([load, check]);
        }
        program.push(statement(RETURN, answers.listed));
    }
    program.push(statement(RETURN, answers.other));
    program
}

/// Loads half an argument and compares it; where that fails is filled in by the caller.
fn checks(argument: &Argument) -> Vec<[sock_filter; 2]> {
    let half = |index: u8, high: u32, code, value| {
        [
            statement(LOAD, ARGUMENTS + 8 * u32::from(index) + 4 * high),
            jump(code, value, 0, 0),
        ]
    };
    match *argument {
        Argument::Is(index, value) => vec![half(index, 0, JUMP_IF_EQUAL, value)],
        Argument::IsLong(index, value) => vec![
            half(index, 0, JUMP_IF_EQUAL, value as u32),
            half(index, 1, JUMP_IF_EQUAL, (value >> 32) as u32),
        ],
        Argument::Without(index, bits) => vec![
            half(index, 0, JUMP_IF_ANY_BIT, bits as u32),
            half(index, 1, JUMP_IF_ANY_BIT, (bits >> 32) as u32),
        ],
    }
}

fn statement(code: u16, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const ANSWERS: Answers = Answers {
        listed: 1,
        other: 2,
        foreign: 3,
    };

    type Calls = BTreeMap<u32, Option<Vec<Vec<Argument>>>>;

    fn program(calls: &Calls) -> BpfProgram {
        let calls = calls.iter().map(|(call, ways)| (*call, ways.as_deref()));
        compile(calls, ANSWERS)
    }

    /// Runs a program as the kernel does; counts the instructions.
    fn run(program: &BpfProgram, architecture: u32, call: u32, arguments: [u64; 6]) -> (u32, u32) {
        let (mut at, mut value, mut count) = (0, 0, 0);
        loop {
            let instruction = &program[at];
            count += 1;
            at += 1;
            let holds = match instruction.code {
                RETURN => return (instruction.k, count),
                LOAD => {
                    value = match instruction.k {
                        NUMBER => call,
                        ARCHITECTURE => architecture,
                        place => {
                            let place = place - ARGUMENTS;
                            let argument = arguments[place as usize / 8];
                            (argument >> (8 * (place % 8))) as u32
                        }
                    };
                    continue;
                }
                JUMP => {
                    at += instruction.k as usize;
                    continue;
                }
                JUMP_IF_EQUAL => value == instruction.k,
                JUMP_IF_AT_LEAST => value >= instruction.k,
                JUMP_IF_ANY_BIT => value & instruction.k != 0,
                code => panic!("no instruction {code:#x}"),
            };
            at += usize::from(if holds {
                instruction.jt
            } else {
                instruction.jf
            });
        }
    }

    fn allows(argument: &Argument, arguments: [u64; 6]) -> bool {
        match *argument {
            Argument::Is(index, value) => arguments[usize::from(index)] as u32 == value,
            Argument::IsLong(index, value) => arguments[usize::from(index)] == value,
            Argument::Without(index, bits) => arguments[usize::from(index)] & bits == 0,
        }
    }

    fn argument() -> impl Strategy<Value = Argument> {
        // Values that meet often.
        let value = prop_oneof![0u64..3, (0u64..3).prop_map(|value| value << 32)];
        (0u8..6, value, 0..3).prop_map(|(index, value, kind)| match kind {
            0 => Argument::Is(index, value as u32),
            1 => Argument::IsLong(index, value),
            _ => Argument::Without(index, value),
        })
    }

    fn calls() -> impl Strategy<Value = Calls> {
        let way = proptest::collection::vec(argument(), 1..3);
        let ways = proptest::option::weighted(0.3, proptest::collection::vec(way, 1..4));
        proptest::collection::btree_map(0u32..600, ways, 0..300)
    }

    proptest! {
        #[test]
        fn a_call_is_answered_as_the_list_says(
            calls in calls(),
            call in 0u32..700,
            arguments in proptest::array::uniform6(
                prop_oneof![0u64..3, (0u64..3).prop_map(|value| value << 32)]
            ),
        ) {
            let listed = match calls.get(&call) {
                None => false,
                Some(None) => true,
                Some(Some(ways)) => ways
                    .iter()
                    .any(|way| way.iter().all(|argument| allows(argument, arguments))),
            };
            let (answer, _) = run(&program(&calls), OWN_ARCHITECTURE, call, arguments);
            prop_assert_eq!(answer, if listed { 1 } else { 2 });
        }
    }

    #[test]
    fn a_foreign_architecture_is_not_answered_by_number() {
        let calls = Calls::from([(0, None)]);
        assert_eq!(run(&program(&calls), 0x4000_0003, 0, [0; 6]).0, 3);
    }

    #[test]
    fn a_long_list_is_searched_in_few_steps() {
        let calls: Calls = (0..1000).step_by(2).map(|call| (call, None)).collect();
        let program = program(&calls);
        for call in [0, 1, 499, 500, 998, 999, u32::MAX] {
            let (answer, steps) = run(&program, OWN_ARCHITECTURE, call, [0; 6]);
            let listed = call % 2 == 0;
            assert_eq!(answer, if listed { 1 } else { 2 }, "{call}");
            assert!(steps < 30, "{call}: {steps}");
        }
    }
}
