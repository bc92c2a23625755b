//! An allow-list in the making.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{BpfProgram, SeccompAction};

use super::program::{self, Answers};

/// What is asked of one argument, which is named by its place from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    pub(super) fn compile(&self, other: SeccompAction, listed: SeccompAction) -> BpfProgram {
        let answers = Answers {
            listed: listed.into(),
            other: other.into(),
            foreign: SeccompAction::KillProcess.into(),
        };
        let calls = self.calls.iter().map(|(call, ways)| {
            let call = u32::try_from(*call).expect("a call's number is small and positive");
            (call, ways.as_deref())
        });
        program::compile(calls, answers)
    }
}
