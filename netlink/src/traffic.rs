//! What becomes of packets as they come in at an interface (tc(8)).

use std::io;

use crate::{
    Socket,
    message::Message,
    socket::{CREATE, EXCLUSIVE},
};

/// `RTM_*QDISC`, `RTM_*TFILTER` of linux/rtnetlink.h.
const NEW_QDISC: u16 = 36;
const DELETE_QDISC: u16 = 37;
const NEW_FILTER: u16 = 44;
const DELETE_FILTER: u16 = 45;

/// `TCA_*` of linux/rtnetlink.h.
const KIND: u16 = 1;
const OPTIONS: u16 = 2;

/// `TC_H_INGRESS` and the handle that goes with it, under which its filters are.
const INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;

/// `ETH_P_ALL` as it is on the wire.
const ALL_PROTOCOLS: u32 = (0x0003_u16).to_be() as u32;

/// `TCA_MATCHALL_ACT`, `TCA_BPF_ACT`, `TCA_BPF_OPS_LEN`, `TCA_BPF_OPS`
const MATCHALL_ACTIONS: u16 = 2;
const BPF_ACTIONS: u16 = 1;
const BPF_COUNT: u16 = 4;
const BPF_PROGRAM: u16 = 5;
/// `TCA_ACT_KIND`, `TCA_ACT_OPTIONS`; `TCA_MIRRED_PARMS`, `TCA_GACT_PARMS`
const ACTION_KIND: u16 = 1;
const ACTION_OPTIONS: u16 = 2;
const PARAMETERS: u16 = 2;

/// `TC_ACT_SHOT`, `TC_ACT_STOLEN`
const SHOT: u32 = 2;
const STOLEN: u32 = 4;
/// `TCA_EGRESS_REDIR`
const REDIRECT: u32 = 1;

/// What is done with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes out at the interface with this number instead.
    Redirect(u32),
    /// It is dropped.
    Drop,
}

/// One instruction of a classic packet filter (`struct sock_filter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// How far to go if it is so.
    pub yes: u8,
    /// How far to go if it is not.
    pub no: u8,
    /// Its number.
    pub value: u32,
}

impl Socket {
    /// Lets an interface have filters for what comes in.
    ///
    /// # Errors
    /// `AlreadyExists` when it has, and the kernel's others.
    pub fn add_ingress(&self, index: u32) -> io::Result<()> {
        self.change(NEW_QDISC, CREATE | EXCLUSIVE, |message| {
            message
                .fixed(&fixed(index, INGRESS_HANDLE, INGRESS, 0))
                .with_text(KIND, "ingress")
        })
    }

    /// Removes the filters of what comes in at an interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_ingress(&self, index: u32) -> io::Result<()> {
        self.change(DELETE_QDISC, 0, |message| {
            message.fixed(&fixed(index, INGRESS_HANDLE, INGRESS, 0))
        })
    }

    /// Does `verdict` to all that comes in at an interface, behind the filters with less
    /// `priority`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_filter(&self, index: u32, priority: u16, verdict: Verdict) -> io::Result<()> {
        self.filter(index, priority, "matchall", |message| {
            message.nested(MATCHALL_ACTIONS, |message| action(message, verdict))
        })
    }

    /// As [`Socket::add_filter`], for packets that `program` wants: those for which it does not
    /// return 0.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_program(
        &self,
        index: u32,
        priority: u16,
        program: &[Instruction],
        verdict: Verdict,
    ) -> io::Result<()> {
        let bytes: Vec<u8> = program.iter().flat_map(Instruction::bytes).collect();
        self.filter(index, priority, "bpf", |message| {
            message
                .with(BPF_COUNT, &(program.len() as u16).to_ne_bytes())
                .with(BPF_PROGRAM, &bytes)
                .nested(BPF_ACTIONS, |message| action(message, verdict))
        })
    }

    fn filter(
        &self,
        index: u32,
        priority: u16,
        kind: &str,
        options: impl FnOnce(Message) -> Message,
    ) -> io::Result<()> {
        self.change(NEW_FILTER, CREATE | EXCLUSIVE, |message| {
            message
                .fixed(&fixed(index, 0, INGRESS_HANDLE, info(priority)))
                .with_text(KIND, kind)
                .nested(OPTIONS, options)
        })
    }

    /// Removes the filters with `priority` of what comes in at an interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_filter(&self, index: u32, priority: u16) -> io::Result<()> {
        self.change(DELETE_FILTER, 0, |message| {
            message.fixed(&fixed(index, 0, INGRESS_HANDLE, info(priority)))
        })
    }
}

impl Instruction {
    fn bytes(&self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&self.code.to_ne_bytes());
        bytes[2] = self.yes;
        bytes[3] = self.no;
        bytes[4..].copy_from_slice(&self.value.to_ne_bytes());
        bytes
    }
}

fn info(priority: u16) -> u32 {
    u32::from(priority) << 16 | ALL_PROTOCOLS
}

/// `struct tcmsg`
fn fixed(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    [0, index, handle, parent, info]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

/// The first and only action of a filter.
fn action(message: Message, verdict: Verdict) -> Message {
    // `struct tc_gact`, and with two words more `struct tc_mirred`
    let (kind, words) = match verdict {
        Verdict::Drop => ("gact", vec![0, 0, SHOT, 0, 0]),
        Verdict::Redirect(to) => ("mirred", vec![0, 0, STOLEN, 0, 0, REDIRECT, to]),
    };
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    message.nested(1, |message| {
        message
            .with_text(ACTION_KIND, kind)
            .nested(ACTION_OPTIONS, |message| message.with(PARAMETERS, &bytes))
    })
}
