//! `linux.resources.devices` as a BPF program that the kernel asks about every
//! use of a device file.
//!
//! Of the rules that match the last one counts; what none matches is refused.
//! The devices that every container has come last, so nothing takes them away.

use super::Error;
use crate::spec::DeviceRule;

/// Ways of using a device, BPF_DEVCG_ACC_...
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// Kinds of devices, BPF_DEVCG_DEV_...
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// A rule, read; what is absent matches anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

const fn allow(kind: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// What every container may use. A device file may be made of any device, but not opened.
const ALWAYS: [Rule; 10] = [
    allow(CHARACTER, None, None, MKNOD),
    allow(BLOCK, None, None, MKNOD),
    allow(CHARACTER, Some(1), Some(3), ALL),
    allow(CHARACTER, Some(1), Some(5), ALL),
    allow(CHARACTER, Some(1), Some(7), ALL),
    allow(CHARACTER, Some(1), Some(8), ALL),
    allow(CHARACTER, Some(1), Some(9), ALL),
    allow(CHARACTER, Some(5), Some(0), ALL),
    // /dev/ptmx and the terminals it makes.
    allow(CHARACTER, Some(5), Some(2), ALL),
    allow(CHARACTER, Some(136), None, ALL),
];

/// The most rules: a program of the kernel's least limit holds so many.
const MOST: usize = 256;

/// The program for the configuration's rules.
pub(super) fn program(rules: &[DeviceRule]) -> Result<Vec<u64>, Error> {
    if rules.len() > MOST {
        return Err(value(
            "",
            &rules.len().to_string(),
            "these are too many rules",
        ));
    }
    let mut parsed = rules.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    parsed.extend(ALWAYS);
    let mut program = vec![
        // r2 = access, r3 = kind, r4 = major, r5 = minor, of struct bpf_cgroup_dev_ctx in r1.
        instruction(LOAD_U32, 2, 1, 0, 0),
        instruction(MOVE, 3, 2, 0, 0),
        instruction(AND_NUMBER, 3, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT_NUMBER, 2, 0, 0, 16),
        instruction(LOAD_U32, 4, 1, 4, 0),
        instruction(LOAD_U32, 5, 1, 8, 0),
    ];
    // The last rule that matches counts, so they are asked from the last on.
    for rule in parsed.iter().rev() {
        program.extend(rule.instructions());
        if rule.matches_all() {
            // The kernel takes no program with a part that is never reached.
            return Ok(program);
        }
    }
    program.extend(verdict(false));
    Ok(program)
}

fn parse(rule: &DeviceRule) -> Result<Rule, Error> {
    let kind = match rule.kind.as_deref().unwrap_or("a") {
        "a" => None,
        "b" => Some(BLOCK),
        "c" | "u" => Some(CHARACTER),
        other => return Err(value(".type", other, "it is one of a, b, c and u")),
    };
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => match u32::try_from(number) {
            Ok(number) if number < 1 << 20 => Ok(Some(number)),
            _ => Err(value(
                ".major or .minor",
                &number.to_string(),
                "no device has it",
            )),
        },
    };
    let text = rule.access.as_deref().filter(|text| !text.is_empty());
    let access = text
        .unwrap_or("rwm")
        .chars()
        .try_fold(0, |access, letter| {
            Ok(access
                | match letter {
                    'r' => READ,
                    'w' => WRITE,
                    'm' => MKNOD,
                    _ => {
                        return Err(value(
                            ".access",
                            text.unwrap_or_default(),
                            "it is of r, w and m",
                        ));
                    }
                })
        })?;
    Ok(Rule {
        allow: rule.allow,
        kind,
        major: number(rule.major)?,
        minor: number(rule.minor)?,
        access,
    })
}

fn value(part: &str, text: &str, reason: &'static str) -> Error {
    Error::Value {
        field: format!("linux.resources.devices{part}"),
        value: text.to_owned(),
        reason,
    }
}

impl Rule {
    /// Whether it is about every use of every device.
    fn matches_all(&self) -> bool {
        let Self {
            kind,
            major,
            minor,
            access,
            ..
        } = self;
        (kind, major, minor, *access) == (&None, &None, &None, ALL)
    }

    /// Tests, each of which jumps behind the rule where it does not match, then the verdict.
    fn instructions(&self) -> Vec<u64> {
        let mut tests: Vec<(u8, u8, u32)> = Vec::new();
        let mut before: Vec<u64> = Vec::new();
        if self.access != ALL {
            before.push(instruction(MOVE, 0, 2, 0, 0));
            if self.allow {
                // An allowance covers uses that ask for no more than it gives.
                before.push(instruction(AND_NUMBER, 0, 0, 0, ALL & !self.access));
                tests.push((JUMP_UNLESS_EQUAL, 0, 0));
            } else {
                // A refusal hits uses that ask for any of it.
                before.push(instruction(AND_NUMBER, 0, 0, 0, self.access));
                tests.push((JUMP_IF_EQUAL, 0, 0));
            }
        }
        for (register, wanted) in [(3, self.kind), (4, self.major), (5, self.minor)] {
            if let Some(wanted) = wanted {
                tests.push((JUMP_UNLESS_EQUAL, register, wanted));
            }
        }
        let verdict = verdict(self.allow);
        let mut instructions = before;
        let count = tests.len();
        for (at, (code, register, number)) in tests.into_iter().enumerate() {
            let over = (count - at - 1 + verdict.len()) as i16;
            instructions.push(instruction(code, register, 0, over, number));
        }
        instructions.extend(verdict);
        instructions
    }
}

/// Answers whether the use is allowed.
fn verdict(allow: bool) -> [u64; 2] {
    [
        instruction(MOVE_NUMBER, 0, 0, 0, allow.into()),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// Operations of eBPF, of its instruction set's names for class, size and source.
const LOAD_U32: u8 = 0x61;
const MOVE: u8 = 0xbf;
const MOVE_NUMBER: u8 = 0xb7;
const AND_NUMBER: u8 = 0x57;
const SHIFT_RIGHT_NUMBER: u8 = 0x77;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// One instruction: operation, destination, source, offset, number.
fn instruction(code: u8, to: u8, from: u8, offset: i16, number: u32) -> u64 {
    u64::from(code)
        | u64::from(from << 4 | to) << 8
        | u64::from(offset as u16) << 16
        | u64::from(number) << 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel would answer about a use of a device.
    fn run(program: &[u64], kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_u64; 6];
        let mut at = 0;
        loop {
            let word = program[at];
            at += 1;
            let to = (word >> 8 & 0xf) as usize;
            let from = (word >> 12 & 0xf) as usize;
            let offset = (word >> 16) as u16 as i16 as usize;
            let number = word >> 32;
            match word as u8 {
                LOAD_U32 => registers[to] = context[offset / 4].into(),
                MOVE => registers[to] = registers[from],
                MOVE_NUMBER => registers[to] = number,
                AND_NUMBER => registers[to] &= number,
                SHIFT_RIGHT_NUMBER => registers[to] >>= number,
                JUMP_IF_EQUAL => at += if registers[to] == number { offset } else { 0 },
                JUMP_UNLESS_EQUAL => at += if registers[to] == number { 0 } else { offset },
                EXIT => return registers[0] != 0,
                other => panic!("an unknown instruction {other:#x}"),
            }
        }
    }

    fn rules(json: &str) -> Vec<u64> {
        let rules: Vec<DeviceRule> = serde_json::from_str(json).unwrap();
        program(&rules).unwrap()
    }

    #[test]
    fn what_no_rule_allows_is_refused_but_for_the_devices_everyone_has() {
        for program in [rules("[]"), rules(r#"[{"allow":false,"access":"rwm"}]"#)] {
            assert!(run(&program, CHARACTER, 1, 3, READ | WRITE));
            assert!(run(&program, CHARACTER, 136, 7, READ));
            assert!(!run(&program, BLOCK, 254, 0, READ));
            assert!(run(&program, BLOCK, 254, 0, MKNOD));
        }
    }

    #[test]
    fn the_last_rule_that_matches_counts() {
        let program = rules(
            r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","major":254,"access":"w"}]"#,
        );
        assert!(run(&program, BLOCK, 254, 0, READ));
        assert!(!run(&program, BLOCK, 254, 0, READ | WRITE));
        assert!(run(&program, BLOCK, 8, 0, WRITE));
    }

    #[test]
    fn an_allowance_covers_what_it_gives_and_no_more() {
        let program = rules(r#"[{"allow":true,"type":"c","major":10,"minor":229,"access":"r"}]"#);
        assert!(run(&program, CHARACTER, 10, 229, READ));
        assert!(!run(&program, CHARACTER, 10, 229, READ | WRITE));
        assert!(!run(&program, CHARACTER, 10, 228, READ));
        assert!(!run(&program, BLOCK, 10, 229, READ));
    }

    #[test]
    fn a_rule_that_is_none_is_refused() {
        for json in [
            r#"[{"allow":true,"type":"x"}]"#,
            r#"[{"allow":true,"access":"rx"}]"#,
            r#"[{"allow":true,"major":-2}]"#,
        ] {
            let rules: Vec<DeviceRule> = serde_json::from_str(json).unwrap();
            assert!(program(&rules).is_err(), "{json}");
        }
    }

    fn some_rule() -> impl Strategy<Value = Rule> {
        let number = || proptest::option::of(0..3_u32);
        (
            any::<bool>(),
            proptest::option::of(1..3_u32),
            number(),
            number(),
            1..8_u32,
        )
            .prop_map(|(allow, kind, major, minor, access)| Rule {
                allow,
                kind,
                major,
                minor,
                access,
            })
    }

    fn covers(rule: &Rule, kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let same = |wanted: Option<u32>, have| wanted.is_none_or(|wanted| wanted == have);
        let used = if rule.allow {
            access & !rule.access == 0
        } else {
            access & rule.access != 0
        };
        used && same(rule.kind, kind) && same(rule.major, major) && same(rule.minor, minor)
    }

    proptest! {
        #[test]
        fn the_program_answers_as_the_rules_say(
            rules in proptest::collection::vec(some_rule(), 0..8),
            kind in 1..3_u32, major in 0..3_u32, minor in 0..3_u32, access in 1..8_u32,
        ) {
            let configured: Vec<_> = rules
                .iter()
                .map(|rule| DeviceRule {
                    allow: rule.allow,
                    kind: rule.kind.map(|kind| if kind == BLOCK { "b" } else { "c" }.into()),
                    major: rule.major.map(i64::from),
                    minor: rule.minor.map(i64::from),
                    access: Some(
                        [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')]
                            .iter()
                            .filter(|(bit, _)| rule.access & bit != 0)
                            .map(|(_, letter)| *letter)
                            .collect(),
                    ),
                })
                .collect();
            let expected = rules
                .iter()
                .chain(&ALWAYS)
                .rev()
                .find(|rule| covers(rule, kind, major, minor, access))
                .is_some_and(|rule| rule.allow);
            let program = program(&configured).unwrap();
            prop_assert_eq!(run(&program, kind, major, minor, access), expected);
        }
    }
}
