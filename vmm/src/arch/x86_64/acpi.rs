//! The ACPI tables: the hardware-reduced model (ACPI 6.5, section 4.1) with
//! one PCI host bridge and no legacy device. There is no IO-APIC: every
//! interrupt is a message.

use acpi_tables::{
    Aml,
    aml::{self, AddressSpace, AddressSpaceCacheable, EISAName, Name, Path, ResourceTemplate},
    madt::{EnabledStatus, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::{GenericAddress, Sdt},
    xsdt::XSDT,
};

use super::layout;

const OEM_ID: [u8; 6] = *b"BULKHD";
const OEM_TABLE_ID: [u8; 8] = *b"BULKHEAD";
const OEM_REVISION: u32 = 1;

/// The sleep type that `\_S5` names for powering off.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// All tables as they are to lie at [`layout::ACPI`], the RSDP first.
pub fn tables(cpus: u8) -> Vec<u8> {
    let mut image = Image {
        bytes: vec![0; Rsdp::len().next_multiple_of(64)],
    };
    let dsdt = image.put(&dsdt());
    let fadt = image.put(&fadt(dsdt));
    let madt = image.put(&madt(cpus));
    let mcfg = image.put(&mcfg());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = image.put(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    debug_assert!(image.bytes.len() <= layout::ACPI_MAX);
    image.bytes
}

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table and returns its guest address.
    fn put(&mut self, table: &dyn Aml) -> u64 {
        let address = layout::ACPI + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        address
    }
}

/// FADT (ACPI 6.5, section 5.2.9), by its offsets.
fn fadt(dsdt: u64) -> Sdt {
    const RESET_REGISTER_SUPPORTED: u32 = 1 << 10;
    const HARDWARE_REDUCED: u32 = 1 << 20;
    const NO_VGA: u16 = 1 << 2;
    const NO_PCIE_ASPM: u16 = 1 << 4;
    const NO_CMOS_CLOCK: u16 = 1 << 5;
    let mut fadt = Sdt::new(*b"FACP", 276, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    fadt.write_u16(109, NO_VGA | NO_PCIE_ASPM | NO_CMOS_CLOCK);
    fadt.write_u32(112, RESET_REGISTER_SUPPORTED | HARDWARE_REDUCED);
    fadt.write(
        116,
        GenericAddress::io_port_address::<u8>(layout::RESET_PORT),
    );
    fadt.write_u8(128, 1); // the value that resets
    fadt.write_u8(131, 5); // minor version
    fadt.write_u64(140, dsdt);
    fadt.write(
        244,
        GenericAddress::io_port_address::<u8>(layout::SLEEP_CONTROL_PORT),
    );
    fadt.write(
        256,
        GenericAddress::io_port_address::<u8>(layout::SLEEP_STATUS_PORT),
    );
    fadt.write(268, *b"BULKHEAD");
    fadt.update_checksum();
    fadt
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC as u32),
    );
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}

/// The host bridge, the reservation of the ECAM (PCI firmware 3.3, section
/// 4.1.2 wants it in a motherboard resource) and the power-off state.
fn dsdt() -> Sdt {
    let buses = AddressSpace::<u16>::new_bus_number(0, 0);
    let window = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::REGISTERS as u32,
        layout::PCI_WINDOW_END as u32 - 1,
        None,
    );
    let bridge_resources = ResourceTemplate::new(vec![&buses, &window]);
    let (pcie_bridge, pci_bridge) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let hid = Name::new(Path::new("_HID"), &pcie_bridge);
    let cid = Name::new(Path::new("_CID"), &pci_bridge);
    let segment = Name::new(Path::new("_SEG"), &aml::ZERO);
    let bus = Name::new(Path::new("_BBN"), &aml::ZERO);
    let uid = Name::new(Path::new("_UID"), &aml::ZERO);
    let crs = Name::new(Path::new("_CRS"), &bridge_resources);
    let bridge = aml::Device::new(
        Path::new("PCI0"),
        vec![&hid, &cid, &segment, &bus, &uid, &crs],
    );

    let ecam = aml::Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_LEN as u32);
    let board_resources = ResourceTemplate::new(vec![&ecam]);
    let motherboard = EISAName::new("PNP0C02");
    let board_hid = Name::new(Path::new("_HID"), &motherboard);
    let board_uid = Name::new(Path::new("_UID"), &aml::ZERO);
    let board_crs = Name::new(Path::new("_CRS"), &board_resources);
    let board = aml::Device::new(Path::new("MBRD"), vec![&board_hid, &board_uid, &board_crs]);

    let scope = aml::Scope::new(Path::new("\\_SB_"), vec![&bridge, &board]);

    let off = aml::Package::new(vec![&SLEEP_TYPE_OFF, &aml::ZERO]);
    let s5 = Name::new(Path::new("\\_S5_"), &off);

    let mut code = Vec::new();
    scope.to_aml_bytes(&mut code);
    s5.to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let start = (address - layout::ACPI) as usize;
        let len = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().unwrap()) as usize;
        &bytes[start..start + len]
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        let bytes = tables(32);
        assert!(bytes.len() <= layout::ACPI_MAX);
        let xsdt = table(&bytes, u64_at(&bytes, 24));
        let mut signatures = Vec::new();
        for entry in xsdt[36..].chunks_exact(8) {
            let table = table(&bytes, u64_at(entry, 0));
            assert_eq!(
                table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
                0
            );
            signatures.push(String::from_utf8_lossy(&table[..4]).into_owned());
        }
        assert_eq!(signatures, ["FACP", "APIC", "MCFG"]);
    }
}
