//! One test of an argument: parsed, and as BPF.

use super::Error;
use crate::spec::SeccompArg;

/// How an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// With the argument masked by this.
    MaskedEqual(u64),
}

/// A test of one argument of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Test {
    /// Which argument.
    pub(super) argument: u32,
    comparison: Comparison,
    value: u64,
}

/// Where a jump of a test goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// To the instruction after it.
    Next,
    /// Behind the test: it holds.
    Pass,
    /// Behind the rule: it does not hold.
    Fail,
}

/// One instruction of a test: the operation, its operand, where to go on yes and no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) code: u32,
    pub(super) operand: u32,
    pub(super) yes: Target,
    pub(super) no: Target,
}

impl Test {
    /// Reads a test of the configuration.
    pub(super) fn parse(argument: &SeccompArg) -> Result<Self, Error> {
        if argument.index > 5 {
            return Err(Error::Argument(argument.index));
        }
        let (comparison, value) = match argument.op.as_str() {
            "SCMP_CMP_EQ" => (Comparison::Equal, argument.value),
            "SCMP_CMP_NE" => (Comparison::NotEqual, argument.value),
            "SCMP_CMP_LT" => (Comparison::Less, argument.value),
            "SCMP_CMP_LE" => (Comparison::LessOrEqual, argument.value),
            "SCMP_CMP_GT" => (Comparison::Greater, argument.value),
            "SCMP_CMP_GE" => (Comparison::GreaterOrEqual, argument.value),
            "SCMP_CMP_MASKED_EQ" => (Comparison::MaskedEqual(argument.value), argument.value_two),
            other => return Err(Error::Comparison(other.to_owned())),
        };
        Ok(Self {
            argument: argument.index,
            comparison,
            value,
        })
    }

    /// The test as instructions: BPF has 32 bits, an argument 64.
    pub(super) fn steps(&self) -> Vec<Step> {
        use Target::{Fail, Next, Pass};
        // `args` of struct seccomp_data begins at 16; the machine is little endian.
        let low_at = 16 + 8 * self.argument;
        let high_at = low_at + 4;
        let (high, low) = ((self.value >> 32) as u32, self.value as u32);
        let is_equal = |operand, yes, no| jump(libc::BPF_JEQ, operand, yes, no);
        let is_greater = |operand, yes, no| jump(libc::BPF_JGT, operand, yes, no);
        match self.comparison {
            Comparison::Equal => vec![
                load(high_at),
                is_equal(high, Next, Fail),
                load(low_at),
                is_equal(low, Next, Fail),
            ],
            Comparison::NotEqual => vec![
                load(high_at),
                is_equal(high, Next, Pass),
                load(low_at),
                is_equal(low, Fail, Next),
            ],
            Comparison::MaskedEqual(mask) => vec![
                load(high_at),
                and((mask >> 32) as u32),
                is_equal(high, Next, Fail),
                load(low_at),
                and(mask as u32),
                is_equal(low, Next, Fail),
            ],
            Comparison::Greater => vec![
                load(high_at),
                is_greater(high, Pass, Next),
                is_equal(high, Next, Fail),
                load(low_at),
                is_greater(low, Next, Fail),
            ],
            Comparison::LessOrEqual => vec![
                load(high_at),
                is_greater(high, Fail, Next),
                is_equal(high, Next, Pass),
                load(low_at),
                is_greater(low, Fail, Next),
            ],
            Comparison::GreaterOrEqual => vec![
                load(high_at),
                is_greater(high, Pass, Next),
                is_equal(high, Next, Fail),
                load(low_at),
                jump(libc::BPF_JGE, low, Next, Fail),
            ],
            Comparison::Less => vec![
                load(high_at),
                is_greater(high, Fail, Next),
                is_equal(high, Next, Pass),
                load(low_at),
                jump(libc::BPF_JGE, low, Fail, Next),
            ],
        }
    }
}

fn load(at: u32) -> Step {
    plain(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at)
}

fn and(mask: u32) -> Step {
    plain(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask)
}

fn plain(code: u32, operand: u32) -> Step {
    Step {
        code,
        operand,
        yes: Target::Next,
        no: Target::Next,
    }
}

fn jump(comparison: u32, operand: u32, yes: Target, no: Target) -> Step {
    Step {
        code: libc::BPF_JMP | comparison | libc::BPF_K,
        operand,
        yes,
        no,
    }
}
