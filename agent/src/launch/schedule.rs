//! How the kernel shares CPUs, I/O and memory nodes with a process.

use super::Error;
use crate::{
    spec::{IoPriority, Linux, MemoryPolicy, Process, Scheduler},
    sys::{self, SchedulerAttributes},
};

/// What the configuration says of it, parsed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Schedule {
    scheduler: Option<SchedulerAttributes>,
    io_priority: Option<i32>,
    memory_policy: Option<(i32, Vec<u32>)>,
    domain: Option<u64>,
}

/// CPUs that a process added to a container runs on, by their numbers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Affinity {
    /// While it is made.
    pub(super) initial: Option<Vec<u32>>,
    /// When it executes its program.
    pub(super) last: Option<Vec<u32>>,
}

fn value(field: &'static str, value: impl ToString, reason: &'static str) -> Error {
    Error::Value {
        field,
        value: value.to_string(),
        reason,
    }
}

/// The number that stands beside `name`.
fn find<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
}

impl Schedule {
    /// Reads what is said of `process` and, where it has a container's configuration, of that.
    pub(super) fn parse(process: &Process, linux: Option<&Linux>) -> Result<Self, Error> {
        let policy = linux.and_then(|linux| linux.memory_policy.as_ref());
        Ok(Self {
            scheduler: process.scheduler.as_ref().map(scheduler).transpose()?,
            io_priority: process.io_priority.as_ref().map(io_priority).transpose()?,
            memory_policy: policy.map(memory_policy).transpose()?,
            domain: None,
        })
    }

    /// The same with the personality `domain`.
    pub(super) fn with_domain(self, domain: Option<u64>) -> Self {
        Self { domain, ..self }
    }

    /// Applies it to this process. Needs privileges.
    pub(super) fn apply(&self) -> Result<(), Error> {
        let step = |doing: &'static str| move |source| Error::Step { doing, source };
        if let Some(domain) = self.domain {
            sys::set_personality(domain).map_err(step("set linux.personality"))?;
        }
        if let Some(attributes) = &self.scheduler {
            sys::set_scheduler(attributes).map_err(step("set process.scheduler"))?;
        }
        if let Some(priority) = self.io_priority {
            sys::set_io_priority(priority).map_err(step("set process.ioPriority"))?;
        }
        if let Some((mode, nodes)) = &self.memory_policy {
            sys::set_memory_policy(*mode, nodes).map_err(step("set linux.memoryPolicy"))?;
        }
        Ok(())
    }
}

/// The kernel's number of `linux.personality.domain`.
pub(crate) fn domain(linux: &Linux) -> Result<Option<u64>, Error> {
    let Some(personality) = &linux.personality else {
        return Ok(None);
    };
    if let Some(flag) = personality.flags.first() {
        let reason = "no flag is supported; leave linux.personality.flags out";
        return Err(value("linux.personality.flags", flag, reason));
    }
    match personality.domain.as_str() {
        "LINUX" | "" => Ok(Some(0)),
        "LINUX32" => Ok(Some(8)),
        other => {
            let reason = "it is LINUX or LINUX32";
            Err(value("linux.personality.domain", other, reason))
        }
    }
}

/// SCHED_... of sched(7). SCHED_ISO was never implemented by the kernel.
const POLICIES: &[(&str, u32)] = &[
    ("SCHED_OTHER", 0),
    ("SCHED_FIFO", 1),
    ("SCHED_RR", 2),
    ("SCHED_BATCH", 3),
    ("SCHED_IDLE", 5),
    ("SCHED_DEADLINE", 6),
];

const FLAGS: &[(&str, u64)] = &[
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
    ("SCHED_FLAG_UTIL_CLAMP_MIN", 0x20),
    ("SCHED_FLAG_UTIL_CLAMP_MAX", 0x40),
];

fn scheduler(scheduler: &Scheduler) -> Result<SchedulerAttributes, Error> {
    let name = scheduler.policy.as_str();
    let policy = find(POLICIES, name).ok_or_else(|| {
        let reason = "it is SCHED_OTHER, FIFO, RR, BATCH, IDLE or DEADLINE; Linux has no SCHED_ISO";
        value("process.scheduler.policy", name, reason)
    })?;
    let flags = scheduler.flags.iter().try_fold(0, |flags, name| {
        let flag = find(FLAGS, name).ok_or_else(|| {
            let reason = "it is one of SCHED_FLAG_RESET_ON_FORK and so on, see sched_setattr(2)";
            value("process.scheduler.flags", name, reason)
        })?;
        Ok(flags | flag)
    })?;
    let nice = scheduler.nice.unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(value("process.scheduler.nice", nice, "it is -20 to 19"));
    }
    let real_time = matches!(name, "SCHED_FIFO" | "SCHED_RR");
    let priority = scheduler.priority.unwrap_or(0);
    if priority != 0 && !(real_time && (1..=99).contains(&priority)) {
        let reason = "it is 1 to 99, and only with SCHED_FIFO and SCHED_RR";
        return Err(value("process.scheduler.priority", priority, reason));
    }
    let times = [scheduler.runtime, scheduler.deadline, scheduler.period];
    let [runtime, deadline, period] = times.map(Option::unwrap_or_default);
    if name != "SCHED_DEADLINE" && (runtime, deadline, period) != (0, 0, 0) {
        let reason = "it goes with SCHED_DEADLINE alone, as do deadline and period";
        return Err(value("process.scheduler.runtime", runtime, reason));
    }
    Ok(SchedulerAttributes {
        policy,
        flags,
        nice,
        priority: priority.unsigned_abs(),
        runtime,
        deadline,
        period,
        ..SchedulerAttributes::default()
    })
}

const CLASSES: &[(&str, i32)] = &[
    ("IOPRIO_CLASS_RT", 1),
    ("IOPRIO_CLASS_BE", 2),
    ("IOPRIO_CLASS_IDLE", 3),
];

/// The class and the level in the kernel's one number.
fn io_priority(priority: &IoPriority) -> Result<i32, Error> {
    let name = priority.class.as_str();
    let class = find(CLASSES, name).ok_or_else(|| {
        let reason = "it is IOPRIO_CLASS_RT, IOPRIO_CLASS_BE or IOPRIO_CLASS_IDLE";
        value("process.ioPriority.class", name, reason)
    })?;
    if !(0..=7).contains(&priority.priority) {
        let reason = "it is 0 to 7";
        return Err(value(
            "process.ioPriority.priority",
            priority.priority,
            reason,
        ));
    }
    Ok(class << 13 | priority.priority)
}

/// MPOL_... of set_mempolicy(2).
const MODES: &[(&str, i32)] = &[
    ("MPOL_DEFAULT", 0),
    ("MPOL_PREFERRED", 1),
    ("MPOL_BIND", 2),
    ("MPOL_INTERLEAVE", 3),
    ("MPOL_LOCAL", 4),
    ("MPOL_PREFERRED_MANY", 5),
    ("MPOL_WEIGHTED_INTERLEAVE", 6),
];

const MODE_FLAGS: &[(&str, i32)] = &[
    ("MPOL_F_STATIC_NODES", 1 << 15),
    ("MPOL_F_RELATIVE_NODES", 1 << 14),
    ("MPOL_F_NUMA_BALANCING", 1 << 13),
];

fn memory_policy(policy: &MemoryPolicy) -> Result<(i32, Vec<u32>), Error> {
    let name = policy.mode.as_str();
    let mode = find(MODES, name).ok_or_else(|| {
        let reason = "it is one of MPOL_DEFAULT and so on, see set_mempolicy(2)";
        value("linux.memoryPolicy.mode", name, reason)
    })?;
    let mode = policy.flags.iter().try_fold(mode, |mode, name| {
        let flag = find(MODE_FLAGS, name).ok_or_else(|| {
            let reason = "it is one of MPOL_F_STATIC_NODES and so on, see set_mempolicy(2)";
            value("linux.memoryPolicy.flags", name, reason)
        })?;
        Ok(mode | flag)
    })?;
    let nodes = numbers("linux.memoryPolicy.nodes", &policy.nodes)?;
    Ok((mode, nodes))
}

impl Affinity {
    /// Reads `process.execCPUAffinity`.
    pub(super) fn parse(process: &Process) -> Result<Self, Error> {
        let Some(affinity) = &process.exec_cpu_affinity else {
            return Ok(Self::default());
        };
        let read = |field, list: &Option<String>| {
            list.as_deref()
                .filter(|list| !list.is_empty())
                .map(|list| numbers(field, list))
                .transpose()
        };
        Ok(Self {
            initial: read("process.execCPUAffinity.initial", &affinity.initial)?,
            last: read("process.execCPUAffinity.final", &affinity.last)?,
        })
    }
}

/// The highest number of a CPU or memory node.
pub(super) const HIGHEST: u32 = 1023;

/// The numbers of a list such as `0-3,7`.
fn numbers(field: &'static str, list: &str) -> Result<Vec<u32>, Error> {
    let wrong = || {
        value(
            field,
            list,
            "it is a list such as 0-3,7 of numbers up to 1023",
        )
    };
    let mut numbers = Vec::new();
    for range in list
        .split(',')
        .map(str::trim)
        .filter(|range| !range.is_empty())
    {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let parse = |text: &str| text.trim().parse::<u32>().ok();
        match (parse(first), parse(last)) {
            (Some(first), Some(last)) if first <= last && last <= HIGHEST => {
                numbers.extend(first..=last);
            }
            _ => return Err(wrong()),
        }
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(rest: &str) -> Result<Schedule, Error> {
        let json = format!(r#"{{"cwd":"/","args":["sh"],{rest}}}"#);
        Schedule::parse(&Process::parse(json.as_bytes()).unwrap(), None)
    }

    #[test]
    fn every_policy_of_the_kernel_is_known() {
        for (name, number) in POLICIES {
            let read = of(&format!(r#""scheduler":{{"policy":"{name}"}}"#)).unwrap();
            assert_eq!(read.scheduler.unwrap().policy, *number);
        }
    }

    #[test]
    fn a_schedulers_values_are_kept() {
        let read = of(
            r#""scheduler":{"policy":"SCHED_DEADLINE","runtime":1,"deadline":2,
            "period":3,"flags":["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN"]}"#,
        );
        let read = read.unwrap().scheduler.unwrap();
        assert_eq!((read.runtime, read.deadline, read.period), (1, 2, 3));
        assert_eq!(read.flags, 5);
    }

    #[test]
    fn what_no_scheduler_has_is_refused_by_name() {
        for (json, field) in [
            (r#"{"policy":"SCHED_ISO"}"#, "policy"),
            (r#"{"policy":"SCHED_OTHER","nice":20}"#, "nice"),
            (r#"{"policy":"SCHED_OTHER","priority":1}"#, "priority"),
            (r#"{"policy":"SCHED_FIFO","priority":100}"#, "priority"),
            (r#"{"policy":"SCHED_OTHER","runtime":1}"#, "runtime"),
            (r#"{"policy":"SCHED_OTHER","flags":["X"]}"#, "flags"),
        ] {
            let text = of(&format!(r#""scheduler":{json}"#))
                .unwrap_err()
                .to_string();
            assert!(
                text.starts_with(&format!("process.scheduler.{field} is")),
                "{text}"
            );
        }
    }

    #[test]
    fn the_priority_of_io_is_class_and_level() {
        let read = of(r#""ioPriority":{"class":"IOPRIO_CLASS_BE","priority":5}"#).unwrap();
        assert_eq!(read.io_priority, Some(2 << 13 | 5));
        assert!(of(r#""ioPriority":{"class":"IOPRIO_CLASS_BE","priority":8}"#).is_err());
        assert!(of(r#""ioPriority":{"class":"IOPRIO_CLASS_NONE","priority":0}"#).is_err());
    }

    #[test]
    fn a_policy_of_memory_is_mode_flags_and_nodes() {
        let linux = serde_json::from_str(
            r#"{"memoryPolicy":{"mode":"MPOL_BIND","nodes":"0,2-3","flags":["MPOL_F_STATIC_NODES"]}}"#,
        );
        let read = Schedule::parse(&Process::default(), Some(&linux.unwrap())).unwrap();
        assert_eq!(read.memory_policy, Some((2 | 1 << 15, vec![0, 2, 3])));
    }

    #[test]
    fn a_personality_is_linux_or_its_32_bit_form() {
        let of = |json: &str| domain(&serde_json::from_str(json).unwrap());
        assert_eq!(of("{}").unwrap(), None);
        assert_eq!(
            of(r#"{"personality":{"domain":"LINUX32"}}"#).unwrap(),
            Some(8)
        );
        assert!(of(r#"{"personality":{"domain":"BSD"}}"#).is_err());
        assert!(of(r#"{"personality":{"domain":"LINUX","flags":["X"]}}"#).is_err());
    }

    #[test]
    fn lists_of_cpus_have_ranges() {
        assert_eq!(numbers("x", "7, 0-2,1").unwrap(), [0, 1, 2, 7]);
        for list in ["3-1", "a", "0-4000000000", "1024", "-"] {
            assert!(numbers("x", list).is_err(), "{list}");
        }
    }

    proptest! {
        #[test]
        fn any_list_is_read_within_bounds(list in "[0-9,\\- ]{0,40}|.*") {
            if let Ok(numbers) = numbers("x", &list) {
                prop_assert!(numbers.len() <= HIGHEST as usize + 1);
                prop_assert!(numbers.iter().all(|number| *number <= HIGHEST));
            }
        }
    }
}
