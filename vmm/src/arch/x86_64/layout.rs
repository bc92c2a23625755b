//! The guest's physical address space.
//!
//! ```text
//!   0x0000_0000  boot parameters, page tables, command line    (below 640 KiB)
//!   0x000E_0000  ACPI tables
//!   0x0010_0000  RAM, the kernel where its ELF headers say
//!   0xC000_0000  end of low RAM at most; the hole begins
//!   0xD000_0000  kernel log ring (ramoops), a memslot
//!   0xE000_0000  PCI configuration space (ECAM), a read-only memslot
//!   0xE010_0000  register pages of the devices, a read-only memslot
//!   0xE020_0000  notify pages of the devices, ioeventfds
//!   0xFEE0_0000  local APICs, in KVM
//!   0x1_0000_0000  high RAM, then images (pmem), each from a boundary of 1 GiB
//! ```

/// Scratch GDT of the first processor.
pub const GDT: u64 = 0x500;
/// `boot_params`, the zero page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// The `setup_data` with the random seed.
pub const SETUP_DATA: u64 = 0x8000;
/// First page of the identity-mapping page tables: PML4, PDPT, one PD per GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub const CMDLINE: u64 = 0x2_0000;
/// The longest command line with its terminating zero (x86 `COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX: usize = 2048;
/// End of the memory below 1 MiB that the guest may use.
pub const LOW_END: u64 = 0x9_fc00;
/// The ACPI tables, RSDP first.
pub const ACPI: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_MAX: usize = 0x1_0000;
/// Start of the memory above 1 MiB.
pub const HIGH_START: u64 = 0x10_0000;
/// Where low RAM ends at most.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where high RAM starts.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// The kernel log ring.
pub const CONSOLE_LOG: u64 = 0xd000_0000;
/// The largest kernel log ring.
pub const CONSOLE_LOG_MAX: u64 = 16 << 20;
/// PCI configuration space of bus 0.
pub const ECAM: u64 = 0xe000_0000;
/// Size of the configuration space of one bus.
pub const ECAM_LEN: u64 = 1 << 20;
/// Register pages (BAR 0), one page of 4 KiB per PCI slot.
pub const REGISTERS: u64 = 0xe010_0000;
/// Notify pages (BAR 2), one page of 4 KiB per PCI slot.
pub const NOTIFY: u64 = 0xe020_0000;
/// End of the PCI window that ACPI announces.
pub const PCI_WINDOW_END: u64 = 0xe030_0000;
/// Three pages for KVM's use on Intel processors.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// A page for KVM's use on Intel processors.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// ACPI sleep control register (ACPI 6.5, section 4.8.3.7), an I/O port.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register, an I/O port.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register, an I/O port.
pub const RESET_PORT: u16 = 0x602;
/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Keyboard controller: a write of 0xFE resets (`reboot=k`).
pub const KEYBOARD_PORT: u16 = 0x64;
/// Images start at a multiple of this.
pub const IMAGE_ALIGN: u64 = 1 << 30;

/// The RAM ranges of a guest with `bytes` of memory, as (address, length).
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= HOLE_START {
        vec![(0, bytes)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, bytes - HOLE_START)]
    }
}

/// Where the first image goes.
pub fn images_start(ram_bytes: u64) -> u64 {
    let end = ram_ranges(ram_bytes)
        .last()
        .map_or(HOLE_END, |(start, len)| start + len);
    end.max(HOLE_END).next_multiple_of(IMAGE_ALIGN)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ram_keeps_its_size_and_stays_out_of_the_hole(mib in 64u64..=524_288) {
            let bytes = mib << 20;
            let ranges = ram_ranges(bytes);
            prop_assert_eq!(ranges.iter().map(|(_, len)| len).sum::<u64>(), bytes);
            for (start, len) in ranges {
                prop_assert!(start + len <= HOLE_START || start >= HOLE_END);
            }
            prop_assert!(images_start(bytes) >= bytes);
            prop_assert_eq!(images_start(bytes) % IMAGE_ALIGN, 0);
        }
    }
}
