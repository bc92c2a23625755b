//! The virtual machine: [`Vm::new`] is the recipe, a line per step;
//! [`Vm::run`] lets it live until the guest or the host ends it.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use nix::fcntl::{FcntlArg, fcntl};
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

mod commands;
pub mod images;
pub mod interrupts;
pub mod memory;
pub mod serial;
pub mod statistics;
mod sys;
pub mod trace;
pub mod vcpu;

use self::{
    images::{Images, Placed},
    interrupts::Interrupts,
    serial::Serial,
    statistics::Statistics,
    sys::{Backing, add_memory},
    trace::Trace,
    vcpu::{Gate, Machine, Vcpus},
};
use crate::{
    arch::x86_64::{boot, cpu, layout},
    config::VmConfig,
    control::message::State,
    counters::ExitCounters,
    descriptors::{self, Descriptors},
    pci::{Bus, virtio::VirtioPci},
    virtio::{Memory, VirtioDevice, build},
};

/// Why a VM cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refuses something.
    #[error("kvm refuses to {what}")]
    Kvm {
        /// What was being tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The number of processors is out of bounds.
    #[error("cpus is {0}: a guest has 1 to 32 cpus")]
    Cpus(u8),
    /// The memory of the guest or of an image.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Kernel, initramfs or command line.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// A processor.
    #[error(transparent)]
    Cpu(#[from] cpu::Error),
    /// A resource of the configuration.
    #[error(transparent)]
    Descriptor(#[from] descriptors::Error),
    /// The root image.
    #[error(transparent)]
    Image(#[from] images::Error),
    /// A device.
    #[error(transparent)]
    Device(#[from] build::Error),
    /// A device cannot be put on the bus.
    #[error("cannot put the {device} device on the pci bus")]
    Bus {
        /// Its kind.
        device: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread cannot be started.
    #[error("cannot start the threads of the vm")]
    Threads(#[source] io::Error),
    /// The kernel's log ring has an impossible size.
    #[error("console_log has {0} bytes: it must be a power of two of 8 KiB to 16 MiB")]
    ConsoleLog(u64),
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's processor gave up: what a kernel without a way to reset does.
    TripleFault,
    /// The host asked for it.
    Stopped,
    /// It cannot go on.
    Failed(String),
}

/// A microVM.
pub struct Vm {
    // Dropped in this order: no processor runs when the devices go, no memslot is left when the
    // memory goes.
    vcpus: Option<Vcpus>,
    idle_vcpus: Vec<VcpuFd>,
    machine: Arc<Machine>,
    /// Devices that were taken out and whose threads have not ended.
    leaving: Vec<VirtioPci>,
    end: mpsc::Receiver<End>,
    trace: Trace,
    state: State,
    _vm: Arc<VmFd>,
    images: Images,
    _console_log: Option<MmapRegion>,
    _memory: Memory,
}

impl Vm {
    /// Makes a VM from its configuration, ready to run.
    ///
    /// # Errors
    /// When KVM, the kernel image or a resource is not what it should be.
    pub fn new(config: &VmConfig, descriptors: &mut Descriptors) -> Result<Self, Error> {
        let mut trace = Trace::start();
        let (kvm, vm) = open_kvm(config, descriptors)?;
        let vm = Arc::new(vm);
        let memory = memory::guest_ram(config.memory_mib)?;
        let slot = memslot(&vm, 0, &Backing::Ram(&memory))?;
        trace.mark("kvm and memory made");

        let console_log = open_console_log(config, descriptors)?;
        let slot = match &console_log {
            Some(log) => memslot(&vm, slot, &Backing::Shared(log, layout::CONSOLE_LOG))?,
            None => slot,
        };
        // The bus takes two memslots, whatever the images take comes behind.
        let mut images = Images::new(Arc::clone(&vm), slot + 2, config.memory_mib << 20);
        let root = match &config.boot.image {
            Some(image) => Some(images.add(descriptors.take("boot.image", image)?, true)?),
            None => None,
        };
        let entry = load_kernel(config, descriptors, &memory, console_log.as_ref(), root)?;
        trace.mark("kernel loaded");

        let vcpus = make_vcpus(&kvm, &vm, config.cpus, &memory, entry)?;
        let statistics = vcpus
            .iter()
            .filter_map(sys::statistics)
            .filter_map(|file| Statistics::new(file).ok())
            .collect();
        trace.mark("vcpus made");

        let interrupts = Interrupts::new(Arc::clone(&vm));
        let bus = Bus::new(config.devices.len(), memory.clone(), interrupts)?;
        memslot(&vm, slot, &Backing::Bus(&bus))?;
        let serial = match &config.serial {
            Some(output) => Some(Serial::new(File::from(descriptors.take("serial", output)?))),
            None => None,
        };
        let (tell_end, end) = mpsc::sync_channel(1);
        let machine = Arc::new(Machine {
            bus: bus.into(),
            serial: serial.map(Into::into),
            exits: ExitCounters::default(),
            statistics,
            gate: Gate::default(),
            end: tell_end,
            ended: EventFd::new(EFD_NONBLOCK).map_err(Error::Threads)?,
        });
        let mut this = Self {
            vcpus: None,
            idle_vcpus: vcpus,
            machine,
            leaving: Vec::new(),
            end,
            trace,
            state: State::Running,
            _vm: vm,
            images,
            _console_log: console_log,
            _memory: memory,
        };
        for (index, device) in config.devices.iter().enumerate() {
            let device = build::build(
                &format!("devices[{index}]"),
                device,
                descriptors,
                &mut this.images,
                build::Jail::Open,
            )?;
            this.add(device)?;
        }
        this.trace.mark("devices made");
        Ok(this)
    }

    /// Puts a device on the bus.
    fn add(&mut self, device: Box<dyn VirtioDevice>) -> Result<u8, Error> {
        let name = device.kind().name();
        let bus = |source| Error::Bus {
            device: name,
            source,
        };
        self.machine.bus().add(device).map_err(bus)
    }

    /// Starts the processors and the devices' threads.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn start(&mut self) -> Result<(), Error> {
        make_room_for_descriptors().map_err(Error::Threads)?;
        let vcpus = std::mem::take(&mut self.idle_vcpus);
        self.trace.mark("guest entered");
        // The guest needs its devices only after its kernel is up.
        self.vcpus = Some(Vcpus::start(vcpus, &self.machine).map_err(Error::Threads)?);
        let slots: Vec<u8> = self
            .machine
            .bus()
            .devices()
            .map(|device| device.slot())
            .collect();
        for slot in slots {
            self.machine.bus().start(slot).map_err(Error::Threads)?;
        }
        Ok(())
    }

    /// What the processors' exits reach, for counters and control.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// When the steps of the start were done.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// The running processors.
    pub fn vcpus(&self) -> Option<&Vcpus> {
        self.vcpus.as_ref()
    }

    /// Signalled when the VM has ended.
    pub fn ended(&self) -> &EventFd {
        &self.machine.ended
    }

    /// Waits for the end.
    pub fn wait(&self) -> End {
        // The machine that sends lives as long as this.
        self.end.recv().unwrap_or(End::Stopped)
    }

    /// Lets processors and devices finish what they are about, and gives everything back. What
    /// does not end in time, such as a device that waits for a file system of the host, is left
    /// to the end of the process, which must come next.
    pub fn shut_down(self) {
        const PATIENCE: Duration = Duration::from_secs(5);
        let deadline = Instant::now() + PATIENCE;
        if let Some(vcpus) = &self.vcpus {
            vcpus.stop();
        }
        let ended = {
            let bus = self.machine.bus();
            let devices = || bus.devices().chain(&self.leaving);
            devices().for_each(VirtioPci::stop);
            let mut devices = devices();
            devices.all(|device| device.ended_by(deadline))
        } && self
            .vcpus
            .as_ref()
            .is_none_or(|vcpus| vcpus.ended_by(deadline));
        if !ended {
            // Its memory must stay as long as somebody uses it.
            std::mem::forget(self);
        }
    }
}

fn open_kvm(config: &VmConfig, descriptors: &mut Descriptors) -> Result<(Kvm, VmFd), Error> {
    let kvm = match &config.kvm {
        Some(resource) => sys::kvm_from(descriptors.take("kvm", resource)?),
        None => Kvm::new().map_err(|source| Error::Kvm {
            what: "open",
            source: source.into(),
        })?,
    };
    let refused = |what| {
        move |source: kvm_ioctls::Error| Error::Kvm {
            what,
            source: source.into(),
        }
    };
    let vm = kvm.create_vm().map_err(refused("create a vm"))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(refused("set the tss address"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(refused("set the identity map address"))?;
    vm.create_irq_chip()
        .map_err(refused("create an interrupt controller"))?;
    withhold_counters(&vm).map_err(refused("withhold performance counters"))?;
    Ok((kvm, vm))
}

/// Tells KVM to give the guest no performance counters. AMD's first ones have no bit in the CPUID
/// that could be withheld. A kernel before 5.18 knows no such wish.
fn withhold_counters(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let known = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if known & KVM_PMU_CAP_DISABLE as i32 == 0 {
        return Ok(());
    }
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
        ..Default::default()
    })
}

/// Lets the kernel grow the table of descriptors now, while one thread uses it. Growing it under
/// several waits for all processors of the host to have let go of the old one (an RCU grace
/// period, some ten milliseconds), and would fall to the first device that the guest starts.
fn make_room_for_descriptors() -> io::Result<()> {
    /// Some twenty devices; the table takes 8 bytes for each.
    const ROOM: i32 = 512;
    let highest = fcntl(io::stderr(), FcntlArg::F_DUPFD_CLOEXEC(ROOM - 1))?;
    Ok(nix::unistd::close(highest)?)
}

fn memslot(vm: &VmFd, first: u32, backing: &Backing<'_>) -> Result<u32, Error> {
    add_memory(vm, first, backing).map_err(|source| Error::Kvm {
        what: "map memory into the guest",
        source,
    })
}

fn open_console_log(
    config: &VmConfig,
    descriptors: &mut Descriptors,
) -> Result<Option<MmapRegion>, Error> {
    let Some(resource) = &config.console_log else {
        return Ok(None);
    };
    let file = File::from(descriptors.take("console_log", resource)?);
    let bytes = file.metadata().map(|metadata| metadata.len()).unwrap_or(0);
    if !bytes.is_power_of_two() || !(8 << 10..=layout::CONSOLE_LOG_MAX).contains(&bytes) {
        return Err(Error::ConsoleLog(bytes));
    }
    Ok(Some(memory::map_shared(
        "the kernel's log ring",
        OwnedFd::from(file),
        bytes,
    )?))
}

fn load_kernel(
    config: &VmConfig,
    descriptors: &mut Descriptors,
    memory: &Memory,
    console_log: Option<&MmapRegion>,
    root: Option<Placed>,
) -> Result<boot::Entry, Error> {
    let kernel = File::from(descriptors.take("boot.kernel", &config.boot.kernel)?);
    let mut initrd = match &config.boot.initrd {
        Some(resource) => Some(File::from(descriptors.take("boot.initrd", resource)?)),
        None => None,
    };
    let mut cmdline = config.boot.cmdline.clone();
    cmdline.push_str(FOR_THIS_MACHINE);
    if let Some(log) = console_log {
        cmdline.push_str(&ramoops(log.size()));
    }
    let seed = sys::random().map_err(|source| Error::Kvm {
        what: "go on without the host's random numbers",
        source,
    })?;
    let boot = boot::Boot {
        kernel: &kernel,
        initrd: initrd.as_mut(),
        cmdline: &cmdline,
        cpus: config.cpus,
        ram_bytes: config.memory_mib << 20,
        image: root.map(|root| (root.address, root.len)),
        seed,
    };
    Ok(boot::load(memory, boot)?)
}

/// What spares the kernel work on a machine such as this: it need not scan a bus for quirks of
/// hardware that is not there.
const FOR_THIS_MACHINE: &str = " pci=noearly";

/// Tells the kernel to keep its log in the ring, all of it for the console.
fn ramoops(bytes: usize) -> String {
    format!(
        " ramoops.mem_address={:#x} ramoops.mem_size={bytes:#x} ramoops.console_size={bytes:#x} \
         ramoops.record_size=0 ramoops.ftrace_size=0 ramoops.pmsg_size=0 ramoops.mem_type=2",
        layout::CONSOLE_LOG
    )
}

fn make_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    cpus: u8,
    memory: &Memory,
    entry: boot::Entry,
) -> Result<Vec<VcpuFd>, Error> {
    if !(1..=32).contains(&cpus) {
        return Err(Error::Cpus(cpus));
    }
    let refused = |what| {
        move |source: kvm_ioctls::Error| Error::Kvm {
            what,
            source: source.into(),
        }
    };
    let supported = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("tell what it supports"))?;
    let mut vcpus = Vec::new();
    for number in 0..cpus {
        let vcpu = vm
            .create_vcpu(u64::from(number))
            .map_err(refused("create a vcpu"))?;
        cpu::set_up(&vcpu, number, cpus, &supported)?;
        vcpus.push(vcpu);
    }
    cpu::set_entry(&vcpus[0], memory, entry)?;
    Ok(vcpus)
}
