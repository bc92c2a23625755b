//! What the host is, as far as it concerns virtual machines.

use std::{fs, path::Path};

use serde::Serialize;

use crate::text::printable;

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Its kernel's release.
    pub kernel: String,
    /// Its CPU's name.
    pub cpu: String,
    /// Whether it is a virtual machine itself.
    pub virtual_machine: bool,
    /// What is behind /dev/kvm.
    pub kvm: Kvm,
    /// Its memory.
    pub memory_mib: u64,
}

/// What is behind /dev/kvm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kvm {
    /// AMD's SVM.
    Amd,
    /// Intel's VMX.
    Intel,
    /// A module that does without the processor's help, by its name.
    Software(String),
    /// The processor has the extension, but its module is not loaded.
    NotLoaded,
    /// Nothing.
    None,
}

impl Host {
    /// Looks at this host.
    pub fn examine() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let modules = modules(Path::new("/sys/module"));
        let cpuinfo = read("/proc/cpuinfo");
        let memory = nix::sys::sysinfo::sysinfo();
        Self {
            kernel: printable(read("/proc/sys/kernel/osrelease").trim(), 80),
            cpu: field(&cpuinfo, "model name").unwrap_or_else(|| "an unknown CPU".to_owned()),
            virtual_machine: has_flag(&cpuinfo, "hypervisor"),
            kvm: kvm(&cpuinfo, &modules),
            memory_mib: memory.map_or(0, |memory| memory.ram_total() >> 20),
        }
    }
}

impl std::fmt::Display for Kvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Amd => f.write_str("AMD SVM (kvm_amd)"),
            Self::Intel => f.write_str("Intel VMX (kvm_intel)"),
            Self::Software(module) => write!(f, "a software KVM ({module})"),
            Self::NotLoaded => {
                f.write_str("nothing: the module kvm_amd or kvm_intel is not loaded")
            }
            Self::None => f.write_str("nothing: the CPU shows neither SVM nor VMX"),
        }
    }
}

/// The names of KVM's modules, loaded or built in.
fn modules(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("kvm_")).collect()
}

fn kvm(cpuinfo: &str, modules: &[String]) -> Kvm {
    let loaded = |module: &str| modules.iter().any(|name| name == module);
    match (has_flag(cpuinfo, "svm"), has_flag(cpuinfo, "vmx")) {
        (true, _) if loaded("kvm_amd") => Kvm::Amd,
        (_, true) if loaded("kvm_intel") => Kvm::Intel,
        (false, false) => match modules.first() {
            Some(module) => Kvm::Software(printable(module, 40)),
            None => Kvm::None,
        },
        _ => Kvm::NotLoaded,
    }
}

fn field(cpuinfo: &str, name: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
    let value = line.split_once(':')?.1;
    Some(printable(value.trim(), 80))
}

fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|word| word == flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuinfo(flags: &str) -> String {
        format!(
            "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {flags} sse\n\nprocessor\t: 1\n"
        )
    }

    #[test]
    fn the_module_and_the_flag_tell_what_is_behind_kvm() {
        let of = |flags: &str, modules: &[&str]| {
            let modules: Vec<_> = modules.iter().map(|name| (*name).to_owned()).collect();
            kvm(&cpuinfo(flags), &modules)
        };
        assert_eq!(of("svm npt", &["kvm_amd"]), Kvm::Amd);
        assert_eq!(of("vmx", &["kvm_intel"]), Kvm::Intel);
        assert_eq!(of("svm", &[]), Kvm::NotLoaded);
        assert_eq!(of("", &[]), Kvm::None);
        assert_eq!(
            of("hypervisor", &["kvm_pvm"]),
            Kvm::Software("kvm_pvm".to_owned())
        );
    }

    #[test]
    fn a_flag_is_a_whole_word() {
        assert!(has_flag(&cpuinfo("svm"), "svm"));
        assert!(!has_flag(&cpuinfo("svm_lock"), "svm"));
        assert_eq!(
            field(&cpuinfo(""), "model name").as_deref(),
            Some("Some CPU")
        );
    }
}
