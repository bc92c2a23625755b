//! The state that a processor starts in: 64-bit mode with the first gigabyte
//! identity mapped, as the 64-bit boot protocol wants it.

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::{boot::Entry, layout};
use crate::virtio::Memory;

/// Why a processor cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refuses.
    #[error("kvm refuses to {what} of cpu {cpu}")]
    Kvm {
        /// What was being tried.
        what: &'static str,
        /// The processor's number.
        cpu: u8,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM took some of the model-specific registers only.
    #[error("kvm refuses model-specific register {register:#x} of cpu {cpu}")]
    Msr {
        /// The register.
        register: u32,
        /// The processor's number.
        cpu: u8,
    },
    /// GDT or page tables do not fit.
    #[error("cannot write the page tables of the guest's first processor")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Sets up what every processor needs; the kernel starts the others itself.
///
/// # Errors
/// When KVM refuses.
pub fn set_up(vcpu: &VcpuFd, cpu: u8, cpus: u8, supported: &CpuId) -> Result<(), Error> {
    let kvm = |what| move |source| Error::Kvm { what, cpu, source };
    vcpu.set_cpuid2(&cpuid(supported, cpu, cpus))
        .map_err(kvm("set the CPUID"))?;
    if let Some(xcrs) = extended_state(supported) {
        vcpu.set_xcrs(&xcrs)
            .map_err(kvm("set the extended control register"))?;
    }
    let msrs = boot_msrs();
    let done = vcpu
        .set_msrs(&msrs)
        .map_err(kvm("set the model-specific registers"))?;
    if let Some(refused) = msrs.as_slice().get(done) {
        return Err(Error::Msr {
            register: refused.index,
            cpu,
        });
    }
    Ok(())
}

/// Points the first processor at the kernel.
///
/// # Errors
/// When KVM refuses or the page tables do not fit into memory.
pub fn set_entry(vcpu: &VcpuFd, memory: &Memory, entry: Entry) -> Result<(), Error> {
    let kvm = |what| {
        move |source| Error::Kvm {
            what,
            cpu: 0,
            source,
        }
    };
    write_page_tables(memory)?;
    write_gdt(memory)?;
    let mut sregs = vcpu.get_sregs().map_err(kvm("read the system registers"))?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs)
        .map_err(kvm("set the system registers"))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: entry.rip,
        rsi: entry.boot_params,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("set the registers"))?;
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(kvm("set the floating point registers"))
}

/// What the guest's processors say of themselves: what KVM supports but for what
/// [`withhold`] takes away, with their own numbers and the TSC deadline timer, without which the
/// kernel spends 216 M instructions on calibrating its timer.
fn cpuid(supported: &CpuId, cpu: u8, cpus: u8) -> CpuId {
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const HYPER_THREADING: u32 = 1 << 28;
    /// KVM ignores the guest's MTRRs, and a kernel that sees them reads each three times.
    const MTRR: u32 = 1 << 12;
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        withhold(entry);
        match entry.function {
            0x1 => {
                entry.ebx =
                    (entry.ebx & 0x0000_ffff) | u32::from(cpu) << 24 | u32::from(cpus) << 16;
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                entry.edx &= !MTRR;
                if cpus > 1 {
                    entry.edx |= HYPER_THREADING;
                } else {
                    entry.edx &= !HYPER_THREADING;
                }
            }
            // Cores share nothing: each is a package's core with its own caches.
            0x4 => entry.eax = entry.eax & 0x0000_3fff | (u32::from(cpus) - 1) << 26,
            0xb | 0x1f => topology_level(entry, cpu, cpus),
            0x8000_0008 => {
                entry.ecx =
                    (entry.ecx & !0xf0ff) | (u32::from(cpus) - 1) | (apic_id_bits(cpus) << 12);
            }
            0x8000_001e => {
                entry.eax = u32::from(cpu);
                entry.ebx = u32::from(cpu);
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

/// Takes away what leads deep into KVM and no container needs: virtual machines in the guest, and
/// performance counters (`docs/decisions/0161-no-nested-machines-no-counters.md`). KVM refuses
/// the instructions and registers of what the CPUID does not name.
fn withhold(entry: &mut kvm_cpuid_entry2) {
    const VMX: u32 = 1 << 5;
    /// Debug store and its 64-bit layout, and the register of what the counters can do.
    const DTES64: u32 = 1 << 2;
    const PDCM: u32 = 1 << 15;
    const DS: u32 = 1 << 21;
    const SVM: u32 = 1 << 2;
    /// Counters of the core, of the north bridge and of the last cache.
    const AMD_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
    const ARCH_LBR: u32 = 1 << 19;
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ecx &= !(VMX | DTES64 | PDCM);
            entry.edx &= !DS;
        }
        (0x7, 0) => entry.edx &= !ARCH_LBR,
        (0x8000_0001, _) => entry.ecx &= !(SVM | AMD_COUNTERS),
        // Architectural counters, last branch records; SVM, AMD's second version of counters.
        (0xa | 0x1c | 0x8000_000a | 0x8000_0022, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

/// Leaves 0xB and 0x1F (Intel SDM, CPUID): one thread a core, all cores in one package.
fn topology_level(entry: &mut kvm_cpuid_entry2, cpu: u8, cpus: u8) {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, THREADS),
        1 => (apic_id_bits(cpus), u32::from(cpus), CORES | 1),
        index => (0, 0, index),
    };
    entry.edx = u32::from(cpu);
}

fn apic_id_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

/// XCR0 with every component on that the processor may have (CPUID leaf 0xD), as firmware leaves
/// it; none on a processor without. KVM derives the size of the state that it tells the guest from
/// this register, and does not learn of the guest's own write where the processor below it, an
/// emulated one, lets that pass: the guest would find a size of 576 bytes too small and give up
/// its vector registers.
fn extended_state(supported: &CpuId) -> Option<kvm_xcrs> {
    let leaf = |function, index| {
        let mut entries = supported.as_slice().iter();
        entries.find(|entry| entry.function == function && entry.index == index)
    };
    const XSAVE: u32 = 1 << 26;
    if leaf(1, 0)?.ecx & XSAVE == 0 {
        return None;
    }
    let components = leaf(0xd, 0)?;
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = u64::from(components.eax) | u64::from(components.edx) << 32;
    Some(xcrs)
}

fn boot_msrs() -> Msrs {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRING: u64 = 1;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry(IA32_MISC_ENABLE, FAST_STRING)]).expect("one entry is few")
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    const CR0_PE: u64 = 1;
    const CR0_ET: u64 = 1 << 4;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (8 * GDT_ENTRIES.len() - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    // boot.rst: code at selector 0x10, data at 0x18.
    sregs.cs = segment(0x10, 0xb, true);
    let data = segment(0x18, 0x3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0xffff,
        selector: 0x20,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
}

fn segment(selector: u16, kind: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// Null, unused, 64-bit code, data, and two for the task state.
const GDT_ENTRIES: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
    0,
];

fn write_gdt(memory: &Memory) -> Result<(), vm_memory::GuestMemoryError> {
    for (i, entry) in GDT_ENTRIES.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(layout::GDT + 8 * i as u64))?;
    }
    Ok(())
}

/// Maps the first GiB onto itself with pages of 2 MiB.
fn write_page_tables(memory: &Memory) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let (pml4, pdpt, pd) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    memory.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    let entries: Vec<u8> = (0..512u64)
        .flat_map(|i| ((i << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes())
        .collect();
    memory.write_slice(&entries, GuestAddress(pd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processor_says_its_own_number() {
        let leaf = kvm_cpuid_entry2 {
            function: 1,
            ..Default::default()
        };
        let supported = CpuId::from_entries(&[leaf]).unwrap();
        let cpuid = cpuid(&supported, 5, 8);
        assert_eq!(cpuid.as_slice()[0].ebx >> 24, 5);
        assert_eq!(cpuid.as_slice()[0].ebx >> 16 & 0xff, 8);
    }

    #[test]
    fn a_guest_has_neither_virtual_machines_nor_counters() {
        let leaf = |function| kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let leaves = [
            0x1,
            0x7,
            0xa,
            0x1c,
            0x8000_0001,
            0x8000_000a,
            0x8000_0022,
            0x8000_0000,
        ];
        let supported = CpuId::from_entries(&leaves.map(leaf)).unwrap();
        let cpuid = cpuid(&supported, 0, 1);
        let [
            basic,
            features,
            counters,
            records,
            extended,
            svm,
            amd_counters,
            other,
        ] = cpuid.as_slice()
        else {
            panic!("no leaf is left out");
        };
        assert_eq!(!basic.ecx, 1 << 5 | 1 << 2 | 1 << 15);
        assert_eq!(basic.edx & 1 << 21, 0);
        assert_eq!(!features.edx, 1 << 19);
        assert_eq!(!extended.ecx, 1 << 2 | 1 << 23 | 1 << 24 | 1 << 28);
        for empty in [counters, records, svm, amd_counters] {
            assert_eq!([empty.eax, empty.ebx, empty.ecx, empty.edx], [0; 4]);
        }
        assert_eq!(*other, leaf(0x8000_0000));
    }

    #[test]
    fn every_component_of_the_extended_state_is_on() {
        let leaf = |function, eax, ecx| kvm_cpuid_entry2 {
            function,
            eax,
            ecx,
            ..Default::default()
        };
        let with = CpuId::from_entries(&[leaf(1, 0, 1 << 26), leaf(0xd, 7, 0)]).unwrap();
        assert_eq!(extended_state(&with).unwrap().xcrs[0].value, 7);
        let without = CpuId::from_entries(&[leaf(1, 0, 0), leaf(0xd, 7, 0)]).unwrap();
        assert!(extended_state(&without).is_none());
    }

    #[test]
    fn the_apic_id_has_as_many_bits_as_it_needs() {
        assert_eq!([1, 2, 3, 32].map(apic_id_bits), [0, 1, 2, 5]);
    }
}
