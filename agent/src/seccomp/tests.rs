//! Filters compiled, then run by a small interpreter of BPF.

use proptest::prelude::*;

use super::*;
use crate::spec::{List, SeccompArg};

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

fn rule(names: &[&str], action: &str, args: Vec<SeccompArg>) -> SeccompRule {
    SeccompRule {
        names: List(names.iter().map(|name| (*name).to_owned()).collect()),
        action: action.into(),
        errno_ret: None,
        args: List(args),
    }
}

fn arg(index: u32, op: &str, value: u64, value_two: u64) -> SeccompArg {
    SeccompArg {
        index,
        value,
        value_two,
        op: op.into(),
    }
}

fn compile(default: &str, rules: Vec<SeccompRule>) -> Result<Filter, Error> {
    Filter::compile(&Seccomp {
        default_action: default.into(),
        syscalls: List(rules),
        ..Seccomp::default()
    })
}

/// What the kernel would do with a call of x86_64.
fn run(filter: &Filter, number: u32, args: [u64; 6]) -> u32 {
    interpret(&filter.program, 0xc000_003e, number, args)
}

fn interpret(program: &[libc::sock_filter], arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = [0; 64];
    data[..4].copy_from_slice(&number.to_le_bytes());
    data[4..8].copy_from_slice(&arch.to_le_bytes());
    for (at, value) in args.iter().enumerate() {
        data[16 + 8 * at..24 + 8 * at].copy_from_slice(&value.to_le_bytes());
    }
    let (mut at, mut a) = (0, 0);
    loop {
        let libc::sock_filter { code, jt, jf, k } = program[at];
        let code = u32::from(code);
        at += 1;
        let holds = match (code & 7, code & 0xf0) {
            (libc::BPF_RET, _) => return k,
            (libc::BPF_LD, _) => {
                let k = k as usize;
                a = u32::from_le_bytes(data[k..k + 4].try_into().unwrap());
                continue;
            }
            (libc::BPF_ALU, libc::BPF_AND) => {
                a &= k;
                continue;
            }
            (libc::BPF_JMP, libc::BPF_JA) => {
                at += k as usize;
                continue;
            }
            (libc::BPF_JMP, libc::BPF_JEQ) => a == k,
            (libc::BPF_JMP, libc::BPF_JGT) => a > k,
            (libc::BPF_JMP, libc::BPF_JGE) => a >= k,
            other => panic!("an unknown instruction {other:?}"),
        };
        at += usize::from(if holds { jt } else { jf });
    }
}

#[test]
fn calls_get_their_own_action_and_others_the_default() {
    let mut deny = rule(&["mount"], "SCMP_ACT_ERRNO", vec![]);
    deny.errno_ret = Some(libc::ENOENT as u32);
    let allow = rule(&["read", "write", "mseal"], "SCMP_ACT_ALLOW", vec![]);
    let filter = compile("SCMP_ACT_ERRNO", vec![allow, deny]).unwrap();
    assert_eq!(run(&filter, 0, [0; 6]), ALLOW);
    assert_eq!(run(&filter, 1, [0; 6]), ALLOW);
    assert_eq!(run(&filter, 2, [0; 6]), EPERM);
    assert_eq!(
        run(&filter, libc::SYS_mount as u32, [0; 6]),
        libc::SECCOMP_RET_ERRNO | libc::ENOENT as u32
    );
}

#[test]
fn a_call_newer_than_all_rules_is_not_there() {
    let filter = compile(
        "SCMP_ACT_ERRNO",
        vec![rule(&["clone3"], "SCMP_ACT_ALLOW", vec![])],
    )
    .unwrap();
    let clone3 = libc::SYS_clone3 as u32;
    assert_eq!(run(&filter, clone3, [0; 6]), ALLOW);
    assert_eq!(run(&filter, clone3 + 1, [0; 6]), ENOSYS);
    assert_eq!(run(&filter, clone3 - 1, [0; 6]), EPERM);
}

#[test]
fn other_ways_of_calling_the_kernel_end_the_process() {
    let filter = compile("SCMP_ACT_ALLOW", vec![]).unwrap();
    let i386 = 0x4000_0003;
    let kill = libc::SECCOMP_RET_KILL_PROCESS;
    assert_eq!(interpret(&filter.program, i386, 1, [0; 6]), kill);
    assert_eq!(run(&filter, 0x4000_0001, [0; 6]), kill);
    assert_eq!(run(&filter, 1, [0; 6]), ALLOW);
}

#[test]
fn programs_of_32_bits_have_their_own_numbers_where_the_configuration_has_them() {
    let filter = Filter::compile(&Seccomp {
        default_action: "SCMP_ACT_ERRNO".into(),
        architectures: List(vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_X86".into()]),
        syscalls: List(vec![rule(&["execve", "clone3"], "SCMP_ACT_ALLOW", vec![])]),
        ..Seccomp::default()
    })
    .unwrap();
    assert_eq!(interpret(&filter.program, 0x4000_0003, 11, [0; 6]), ALLOW);
    assert_eq!(interpret(&filter.program, 0x4000_0003, 59, [0; 6]), EPERM);
    assert_eq!(run(&filter, 59, [0; 6]), ALLOW);
    assert_eq!(run(&filter, 11, [0; 6]), EPERM);
}

#[test]
fn tests_of_different_arguments_must_all_hold() {
    let both = vec![
        arg(0, "SCMP_CMP_EQ", 40, 0),
        arg(1, "SCMP_CMP_EQ", 1 << 40, 0),
    ];
    let filter = compile(
        "SCMP_ACT_ALLOW",
        vec![rule(&["socket"], "SCMP_ACT_ERRNO", both)],
    )
    .unwrap();
    let socket = libc::SYS_socket as u32;
    assert_eq!(run(&filter, socket, [40, 1 << 40, 0, 0, 0, 0]), EPERM);
    assert_eq!(run(&filter, socket, [40, 1, 0, 0, 0, 0]), ALLOW);
    assert_eq!(run(&filter, socket, [1, 1 << 40, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn several_tests_of_one_argument_are_alternatives() {
    let either = vec![arg(0, "SCMP_CMP_EQ", 0, 0), arg(0, "SCMP_CMP_EQ", 8, 0)];
    let filter = compile(
        "SCMP_ACT_ERRNO",
        vec![rule(&["personality"], "SCMP_ACT_ALLOW", either)],
    )
    .unwrap();
    let personality = libc::SYS_personality as u32;
    assert_eq!(run(&filter, personality, [8, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(run(&filter, personality, [7, 0, 0, 0, 0, 0]), EPERM);
}

#[test]
fn what_cannot_be_done_is_named() {
    assert_eq!(
        compile("SCMP_ACT_NOTIFY", vec![]).unwrap_err(),
        Error::Action("SCMP_ACT_NOTIFY".into())
    );
    let bad = |arg| {
        compile(
            "SCMP_ACT_ALLOW",
            vec![rule(&["read"], "SCMP_ACT_LOG", vec![arg])],
        )
    };
    assert_eq!(
        bad(arg(6, "SCMP_CMP_EQ", 0, 0)).unwrap_err(),
        Error::Argument(6)
    );
    assert_eq!(
        bad(arg(0, "SCMP_CMP_IN", 0, 0)).unwrap_err(),
        Error::Comparison("SCMP_CMP_IN".into())
    );
}

fn compare(op: &str, argument: u64, value: u64, two: u64) -> bool {
    match op {
        "SCMP_CMP_EQ" => argument == value,
        "SCMP_CMP_NE" => argument != value,
        "SCMP_CMP_LT" => argument < value,
        "SCMP_CMP_LE" => argument <= value,
        "SCMP_CMP_GT" => argument > value,
        "SCMP_CMP_GE" => argument >= value,
        _ => argument & value == two,
    }
}

/// Numbers that meet each other and the 32-bit border often.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..3_u64,
        (0..3_u64).prop_map(|n| (1 << 32) + n),
        (0..3_u64).prop_map(|n| u64::MAX - n),
        any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn a_compiled_test_is_the_comparison(
        op in prop_oneof![
            Just("SCMP_CMP_EQ"), Just("SCMP_CMP_NE"), Just("SCMP_CMP_LT"), Just("SCMP_CMP_LE"),
            Just("SCMP_CMP_GT"), Just("SCMP_CMP_GE"), Just("SCMP_CMP_MASKED_EQ"),
        ],
        index in 0..6_u32,
        argument in number(),
        value in number(),
        two in number(),
    ) {
        let rule = rule(&["ioctl"], "SCMP_ACT_ALLOW", vec![arg(index, op, value, two)]);
        let filter = compile("SCMP_ACT_ERRNO", vec![rule]).unwrap();
        let mut args = [7; 6];
        args[index as usize] = argument;
        let expected = if compare(op, argument, value, two) { ALLOW } else { EPERM };
        prop_assert_eq!(run(&filter, libc::SYS_ioctl as u32, args), expected);
    }

    #[test]
    fn any_set_of_calls_is_told_from_the_rest(
        allowed in proptest::collection::btree_set(0..335_u32, 0..300),
    ) {
        let cases = allowed
            .iter()
            .map(|number| Case { number: *number, body: Body::plain(ALLOW) })
            .collect();
        let part = Part { architecture: 0xc000_003e, cases, default: EPERM, beyond: None };
        let program = program::assemble(vec![part]).unwrap();
        for number in 0..340 {
            let expected = if allowed.contains(&number) { ALLOW } else { EPERM };
            prop_assert_eq!(interpret(&program, 0xc000_003e, number, [0; 6]), expected);
        }
    }
}
