//! An allow-list in the making.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: TargetArch = TargetArch::aarch64;

/// What is asked of one argument, which is named by its place from 0.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument {
    /// Its lower 32 bits, all that the kernel looks at, are this.
    Is(u8, u32),
    /// It is this.
    IsLong(u8, u64),
    /// None of these bits is set.
    Without(u8, u64),
}

/// Calls, and with which arguments.
#[derive(Debug, Clone, Default)]
pub(super) struct List {
    /// By number; the arguments of each way in which it is allowed, or nothing for any.
    calls: BTreeMap<c_long, Option<Vec<Vec<Argument>>>>,
}

impl List {
    /// Allows calls whatever their arguments.
    pub(super) fn allow(&mut self, calls: &[c_long]) {
        self.calls.extend(calls.iter().map(|call| (*call, None)));
    }

    /// Allows a call with such arguments, beside the ways in which it is allowed already.
    pub(super) fn allow_if(&mut self, call: c_long, arguments: &[Argument]) {
        if let Some(ways) = self.calls.entry(call).or_insert_with(|| Some(Vec::new())) {
            ways.push(arguments.to_vec());
        }
    }

    /// The calls that are allowed in some way.
    #[cfg(test)]
    pub(super) fn calls(&self) -> impl Iterator<Item = c_long> {
        self.calls.keys().copied()
    }

    /// Makes the kernel's program: `listed` for calls on the list, `other` for all others.
    pub(super) fn compile(
        self,
        other: SeccompAction,
        listed: SeccompAction,
    ) -> Result<BpfProgram, seccompiler::BackendError> {
        let mut rules = BTreeMap::new();
        for (call, ways) in self.calls {
            let ways: Result<Vec<SeccompRule>, _> = ways
                .unwrap_or_default()
                .iter()
                .map(|way| rule(way))
                .collect();
            rules.insert(call, ways?);
        }
        SeccompFilter::new(rules, other, listed, ARCHITECTURE)?.try_into()
    }
}

fn rule(arguments: &[Argument]) -> Result<SeccompRule, seccompiler::BackendError> {
    let conditions: Result<Vec<_>, _> = arguments
        .iter()
        .map(|argument| {
            let (index, len, operator, value) = match *argument {
                Argument::Is(index, value) => (
                    index,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::Eq,
                    u64::from(value),
                ),
                Argument::IsLong(index, value) => {
                    (index, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value)
                }
                Argument::Without(index, bits) => (
                    index,
                    SeccompCmpArgLen::Qword,
                    SeccompCmpOp::MaskedEq(bits),
                    0,
                ),
            };
            SeccompCondition::new(index, len, operator, value)
        })
        .collect();
    SeccompRule::new(conditions?)
}
