//! The five sets of capabilities of a process.

use crate::{log, spec, sys};

/// Linux's capabilities, each at the place of its number.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The sets, a bit for each capability.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

impl Capabilities {
    /// Reads the sets of the configuration. Names that this kernel does not know are left out,
    /// as the specification demands, and logged.
    pub(super) fn parse(sets: &spec::Capabilities) -> Self {
        let known = u64::MAX >> (63 - sys::last_capability().min(63));
        let bits = |names: &[String]| names.iter().fold(0, |bits, name| bits | bit(name)) & known;
        let inheritable = bits(&sets.inheritable);
        let permitted = bits(&sets.permitted);
        Self {
            bounding: bits(&sets.bounding),
            effective: bits(&sets.effective),
            inheritable,
            permitted,
            // The kernel refuses others. Configurations name them nonetheless: those that
            // `runc spec` writes have an ambient set and no inheritable one.
            ambient: bits(&sets.ambient) & inheritable & permitted,
        }
    }

    /// Drops from the bounding set what is not in it. Needs the right to do so, so this comes
    /// before the change of the user.
    pub(super) fn bound(&self) -> std::io::Result<()> {
        (0..=sys::last_capability())
            .filter(|number| self.bounding & 1 << number == 0)
            .try_for_each(sys::drop_bounding)
    }

    /// Makes every capability that is still permitted effective, for the last steps that need one.
    pub(super) fn keep_all() -> std::io::Result<()> {
        let all = sys::permitted()?;
        sys::capset(all, all, 0)
    }

    /// Takes the other four sets on.
    pub(super) fn assume(&self) -> std::io::Result<()> {
        sys::capset(self.effective, self.permitted, self.inheritable)?;
        (0..64)
            .filter(|number| self.ambient & 1 << number != 0)
            .try_for_each(sys::raise_ambient)
    }
}

/// The bit of `CAP_...`; 0 for no known capability.
fn bit(name: &str) -> u64 {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    match NAMES.iter().position(|known| *known == short) {
        Some(number) => 1 << number,
        None => {
            log!("the capability {name} is unknown and left out");
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::List;

    #[test]
    fn names_stand_for_the_kernels_numbers() {
        assert_eq!(bit("CAP_CHOWN"), 1);
        assert_eq!(bit("CAP_SYS_ADMIN"), 1 << 21);
        assert_eq!(bit("CAP_CHECKPOINT_RESTORE"), 1 << 40);
    }

    #[test]
    fn an_ambient_capability_that_cannot_be_inherited_is_left_out() {
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()
        };
        let sets = spec::Capabilities {
            permitted: List(names(&["CAP_KILL", "CAP_CHOWN"])),
            inheritable: List(names(&["CAP_CHOWN"])),
            ambient: List(names(&["CAP_KILL", "CAP_CHOWN", "CAP_SETUID"])),
            ..Default::default()
        };
        assert_eq!(Capabilities::parse(&sets).ambient, bit("CAP_CHOWN"));
    }

    #[test]
    fn an_unknown_name_stands_for_nothing() {
        assert_eq!(bit("CAP_FLY"), 0);
    }
}
