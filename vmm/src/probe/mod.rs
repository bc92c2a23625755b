//! What a host's KVM can do and how fast it is, found out by running a few
//! bytes of guest code.
//!
//! A KVM may take every ioctl and still be of no use: one that emulates in
//! software runs guest code thousands of times slower than the processor, or
//! fails in the middle.

use std::time::{Duration, Instant};

use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};

mod sys;

use sys::GuestPage;

/// The only version of KVM's interface that ever was stable.
pub const API_VERSION: i32 = 12;

/// What a microVM needs of KVM, with the names that the kernel's documentation has.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// How long each measurement may take.
const BUDGET: Duration = Duration::from_millis(500);

/// What KVM offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The interface's version; [`API_VERSION`] is needed.
    pub api_version: i32,
    /// Needed capabilities that are there.
    pub present: Vec<&'static str>,
    /// Needed capabilities that are not.
    pub missing: Vec<&'static str>,
}

/// How fast guest code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speed {
    /// Picoseconds that a guest instruction takes.
    pub instruction_ps: u64,
    /// Nanoseconds from the guest to this process and back.
    pub exit_ns: u64,
    /// Nanoseconds from the guest to the kernel and back.
    pub kernel_exit_ns: u64,
}

/// Guest code slower than this does not boot a kernel in any useful time: about one percent of
/// what an emulated machine with hardware virtualization reaches.
const SLOWEST_INSTRUCTION_PS: u64 = 200_000;

/// Why guest code did not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused an ioctl.
    #[error("KVM refused to {what}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The guest stopped where it should have gone on.
    #[error("guest code failed inside KVM: it left with {exit} instead of port I/O")]
    Exit {
        /// The exit's name.
        exit: String,
    },
}

impl Offer {
    /// Asks /dev/kvm.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn ask() -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(refused("be opened"))?;
        let (present, missing): (Vec<_>, Vec<_>) = NEEDED
            .iter()
            .partition(|(capability, _)| kvm.check_extension(*capability));
        let names = |capabilities: Vec<&(Cap, &'static str)>| {
            capabilities.into_iter().map(|(_, name)| *name).collect()
        };
        Ok(Self {
            api_version: kvm.get_api_version(),
            present: names(present),
            missing: names(missing),
        })
    }

    /// Whether it is all that is needed.
    pub fn suffices(&self) -> bool {
        self.api_version == API_VERSION && self.missing.is_empty()
    }
}

impl Speed {
    /// Runs small loops in a guest. It takes at most about two seconds, unless KVM never comes
    /// back from one: call it on a thread that can be left behind.
    ///
    /// # Errors
    /// When KVM refuses a step or the guest does not run.
    pub fn measure() -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(refused("be opened"))?;
        let mut guest = Guest::new(&kvm)?;
        // Few instructions, so that even the slowest KVM ends each round soon.
        let exit_ns = guest.run(&countdown(1), 2000)?;
        let long_ns = guest.run(&countdown(LOOPS), 200)?;
        let kernel_ns = guest.run(&cpuids(CPUIDS), 100)?;
        let instructions = 2 * (u64::from(LOOPS) - 1);
        Ok(Self {
            instruction_ps: long_ns.saturating_sub(exit_ns) * 1000 / instructions,
            exit_ns,
            kernel_exit_ns: kernel_ns.saturating_sub(exit_ns) / u64::from(CPUIDS),
        })
    }

    /// Whether a kernel boots at this speed in any useful time.
    pub fn suffices(&self) -> bool {
        self.instruction_ps <= SLOWEST_INSTRUCTION_PS
    }
}

const LOOPS: u16 = 5000;
const CPUIDS: u16 = 20;

/// Real-mode code that counts down from `count`, writes to a port, and begins again.
fn countdown(count: u16) -> Vec<u8> {
    let [low, high] = count.to_le_bytes();
    let mut code = vec![0xb9, low, high]; // mov cx, count
    code.extend([0x49, 0x75, 0xfd]); // dec cx; jnz to it
    code.extend([0xe6, 0x10]); // out 0x10, al
    code.extend([0xeb, 0xf6]); // jmp to the begin
    code
}

/// Real-mode code that leaves to the kernel `count` times, writes to a port, and begins again.
fn cpuids(count: u16) -> Vec<u8> {
    let [low, high] = count.to_le_bytes();
    let mut code = vec![0xbe, low, high]; // mov si, count
    code.extend([0x0f, 0xa2]); // cpuid
    code.extend([0x4e, 0x75, 0xfb]); // dec si; jnz to cpuid
    code.extend([0xe6, 0x10]); // out 0x10, al
    code.extend([0xeb, 0xf4]); // jmp to the begin
    code
}

/// One processor in real mode with one page of memory.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    page: GuestPage,
}

/// Where the page lies in the guest.
const PAGE_AT: u64 = 0x1000;

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, Error> {
        let vm = kvm.create_vm().map_err(refused("make a virtual machine"))?;
        // Processors that cannot run real mode natively need it.
        vm.set_tss_address(0xfffb_d000)
            .map_err(refused("set the TSS address"))?;
        let page = GuestPage::map(&vm, PAGE_AT).map_err(refused("take guest memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(refused("make a processor"))?;
        let mut sregs = vcpu.get_sregs().map_err(refused("read registers"))?;
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            segment.base = 0;
            segment.selector = 0;
        }
        vcpu.set_sregs(&sregs).map_err(refused("set registers"))?;
        Ok(Self {
            vcpu,
            _vm: vm,
            page,
        })
    }

    /// Runs `code` until it has written to the port `rounds` times or the budget is used up.
    /// Returns the nanoseconds of a round.
    fn run(&mut self, code: &[u8], rounds: u64) -> Result<u64, Error> {
        self.page.write(code);
        let mut regs = self.vcpu.get_regs().map_err(refused("read registers"))?;
        regs.rip = PAGE_AT;
        regs.rflags = 2;
        self.vcpu
            .set_regs(&regs)
            .map_err(refused("set registers"))?;
        self.round()?;
        let begin = Instant::now();
        let mut done = 0;
        while done < rounds && (done == 0 || begin.elapsed() < BUDGET) {
            self.round()?;
            done += 1;
        }
        Ok(begin.elapsed().as_nanos() as u64 / done)
    }

    fn round(&mut self) -> Result<(), Error> {
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(_, _)) => Ok(()),
            Ok(other) => Err(Error::Exit {
                exit: format!("{other:?}"),
            }),
            Err(source) => Err(refused("run guest code")(source)),
        }
    }
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Refused { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a backward jump at the end of `code` leads to.
    fn target(code: &[u8], jump_end: usize) -> usize {
        (jump_end as isize + isize::from(code[jump_end - 1] as i8)) as usize
    }

    #[test]
    fn the_loops_jump_where_they_should() {
        let code = countdown(5);
        assert_eq!((target(&code, 6), target(&code, 10)), (3, 0));
        let code = cpuids(5);
        assert_eq!((target(&code, 8), target(&code, 12)), (3, 0));
    }

    #[test]
    fn a_processor_suffices_and_an_emulator_does_not() {
        let speed = |instruction_ps| Speed {
            instruction_ps,
            exit_ns: 1000,
            kernel_exit_ns: 500,
        };
        assert!(speed(300).suffices());
        assert!(speed(5_000).suffices());
        assert!(!speed(900_000).suffices());
    }

    #[test]
    fn an_offer_without_a_capability_does_not_suffice() {
        let whole = Offer {
            api_version: API_VERSION,
            present: Vec::new(),
            missing: Vec::new(),
        };
        assert!(whole.suffices());
        let lacking = Offer {
            missing: vec!["KVM_CAP_IRQFD"],
            ..whole
        };
        assert!(!lacking.suffices());
    }
}
