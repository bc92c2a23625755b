//! Puts a kernel into memory and says where it starts: the 64-bit boot
//! protocol (Linux `Documentation/arch/x86/boot.rst`, section 1.15), which
//! unlike PVH can pass a random seed.

use std::{fs::File, io};

use linux_loader::{
    bootparam::{boot_params, setup_header},
    loader::{self, KernelLoader, KernelLoaderResult, bzimage::BzImage, elf::Elf},
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{acpi, kernel_file::KernelFile, layout};
use crate::virtio::Memory;

/// What goes wrong before the guest runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is neither an ELF image nor a bzImage.
    #[error("the kernel is neither an ELF vmlinux nor a bzImage")]
    NotAKernel,
    /// The ELF image cannot be loaded.
    #[error(
        "cannot load the kernel's ELF image (is it truncated, or larger than the guest's memory?): {0}"
    )]
    Elf(#[source] loader::Error),
    /// The bzImage cannot be loaded.
    #[error(
        "cannot load the kernel's bzImage (is it truncated, or larger than the guest's memory?): {0}"
    )]
    BzImage(#[source] loader::Error),
    /// The bzImage ends before what it says of itself.
    #[error("the kernel's bzImage has {len} of its {wanted} compressed bytes (is it truncated?)")]
    Truncated {
        /// How many bytes there are.
        len: u64,
        /// How many it says.
        wanted: u64,
    },
    /// The bzImage unpacks itself behind the memory's end.
    #[error(
        "the kernel needs memory up to {end:#x} to unpack itself, and low memory ends at {low_end:#x}"
    )]
    NoRoom {
        /// Where what it needs ends.
        end: u64,
        /// Where low memory ends.
        low_end: u64,
    },
    /// The file cannot be read.
    #[error("cannot read the {what}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The initramfs leaves no room.
    #[error(
        "the initramfs of {bytes} bytes does not fit above the kernel's end at {kernel_end:#x} into the guest's memory"
    )]
    InitrdTooLarge {
        /// Its size.
        bytes: u64,
        /// Where the kernel ends.
        kernel_end: u64,
    },
    /// The command line is too long.
    #[error("the kernel's command line has {len} bytes, at most {} are possible", layout::CMDLINE_MAX - 1)]
    CommandLine {
        /// Its length.
        len: usize,
    },
    /// A structure does not fit into the guest's memory.
    #[error("cannot write the guest's {what}")]
    Write {
        /// Which structure.
        what: &'static str,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// What is booted.
pub struct Boot<'a> {
    /// An ELF vmlinux or a bzImage.
    pub kernel: &'a File,
    /// An initramfs.
    pub initrd: Option<&'a mut File>,
    /// The whole command line.
    pub cmdline: &'a str,
    /// CPUs declared to the guest.
    pub cpus: u8,
    /// Guest memory in bytes.
    pub ram_bytes: u64,
    /// A read-only image that becomes `/dev/pmem0`, as (address, length).
    pub image: Option<(u64, u64)>,
    /// Bytes from the host for the guest's random number generator.
    pub seed: [u8; 32],
}

/// Where the first processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Instruction pointer, in 64-bit mode.
    pub rip: u64,
    /// Where `boot_params` lies, for RSI.
    pub boot_params: u64,
}

/// Writes kernel, initramfs, command line, ACPI tables and `boot_params`.
///
/// # Errors
/// When one of them cannot be read or does not fit.
pub fn load(memory: &Memory, boot: Boot<'_>) -> Result<Entry, Error> {
    let Boot {
        kernel,
        initrd,
        cmdline,
        cpus,
        ram_bytes,
        image,
        seed,
    } = boot;
    let (loaded, rip) = load_kernel(memory, kernel, ram_bytes)?;
    let initrd = initrd
        .map(|file| load_initrd(memory, file, &loaded, ram_bytes))
        .transpose()?;
    write_cmdline(memory, cmdline)?;
    let tables = acpi::tables(cpus);
    write(memory, "ACPI tables", layout::ACPI, &tables)?;
    write(
        memory,
        "random seed",
        layout::SETUP_DATA,
        &seed_setup_data(seed),
    )?;
    let mut params = boot_params {
        hdr: header(&loaded),
        ..Default::default()
    };
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    params.hdr.setup_data = layout::SETUP_DATA;
    if let Some((address, len)) = initrd {
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = len as u32;
    }
    params.acpi_rsdp_addr = layout::ACPI;
    let map = memory_map(ram_bytes, image);
    params.e820_entries = map.len() as u8;
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(map) {
        entry.addr = addr;
        entry.size = size;
        entry.type_ = kind;
    }
    write(
        memory,
        "boot parameters",
        layout::BOOT_PARAMS,
        params.as_slice(),
    )?;
    Ok(Entry {
        rip,
        boot_params: layout::BOOT_PARAMS,
    })
}

fn load_kernel(
    memory: &Memory,
    kernel: &File,
    ram_bytes: u64,
) -> Result<(KernelLoaderResult, u64), Error> {
    let kernel = &mut match KernelFile::map(kernel) {
        Ok(kernel) => kernel,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(Error::NotAKernel);
        }
        Err(source) => {
            return Err(Error::Read {
                what: "kernel",
                source,
            });
        }
    };
    let start = Some(GuestAddress(layout::HIGH_START));
    match Elf::load(memory, None, kernel, start) {
        Ok(loaded) => {
            let entry = loaded.kernel_load.0;
            return Ok((loaded, entry));
        }
        Err(loader::Error::Elf(loader::elf::Error::InvalidElfMagicNumber)) => {}
        Err(loader::Error::Elf(loader::elf::Error::ReadElfHeader)) => {
            return Err(Error::NotAKernel);
        }
        Err(error) => return Err(Error::Elf(error)),
    }
    match BzImage::load(memory, None, kernel, start) {
        Ok(mut loaded) => {
            let low_end = ram_bytes.min(layout::HOLE_START);
            loaded.kernel_end = unpacked_end(&loaded, low_end)?;
            // The 64-bit entry point (boot.rst, section 1.15).
            let entry = loaded.kernel_load.0 + 0x200;
            Ok((loaded, entry))
        }
        Err(loader::Error::Bzimage(loader::bzimage::Error::InvalidBzImage)) => {
            Err(Error::NotAKernel)
        }
        Err(error) => Err(Error::BzImage(error)),
    }
}

/// Where the memory ends that a whole bzImage, loaded, needs until it finds out about the rest:
/// for itself, and for what it unpacks (boot.rst, `init_size`).
fn unpacked_end(loaded: &KernelLoaderResult, low_end: u64) -> Result<u64, Error> {
    let (start, end) = (loaded.kernel_load.0, loaded.kernel_end);
    let header = loaded.setup_header.unwrap_or_default();
    let (len, wanted) = (end - start, u64::from(header.syssize) * 16);
    if len < wanted {
        return Err(Error::Truncated { len, wanted });
    }
    let preferred = header.pref_address;
    let runs_at = match header.relocatable_kernel {
        0 => Some(preferred),
        _ => start
            .max(preferred)
            .checked_next_multiple_of(u64::from(header.kernel_alignment).max(1)),
    };
    let unpacked = runs_at.and_then(|start| start.checked_add(u64::from(header.init_size)));
    let end = unpacked.map_or(u64::MAX, |unpacked| unpacked.max(end));
    if end > low_end {
        return Err(Error::NoRoom { end, low_end });
    }
    Ok(end)
}

/// The header that the kernel came with, or for an ELF image one that says the least.
fn header(loaded: &KernelLoaderResult) -> setup_header {
    let mut header = loaded.setup_header.unwrap_or(setup_header {
        boot_flag: 0xaa55,
        header: 0x5372_6448, // "HdrS"
        version: 0x020f,
        kernel_alignment: 0x0100_0000,
        ..Default::default()
    });
    header.type_of_loader = 0xff;
    header
}

/// The initramfs goes as high as low RAM allows, at a page boundary.
fn load_initrd(
    memory: &Memory,
    file: &mut File,
    kernel: &KernelLoaderResult,
    ram_bytes: u64,
) -> Result<(u64, u64), Error> {
    let read = |source| Error::Read {
        what: "initramfs",
        source,
    };
    let len = file.metadata().map_err(read)?.len();
    let kernel_end = kernel.kernel_end;
    let low_end = ram_bytes.min(layout::HOLE_START);
    let address = low_end
        .checked_sub(len)
        .map(|address| address & !0xfff)
        .filter(|address| *address >= kernel_end)
        .ok_or(Error::InitrdTooLarge {
            bytes: len,
            kernel_end,
        })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), file, len as usize)
        .map_err(|source| Error::Write {
            what: "initramfs",
            source,
        })?;
    Ok((address, len))
}

fn write_cmdline(memory: &Memory, cmdline: &str) -> Result<(), Error> {
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(Error::CommandLine { len: cmdline.len() });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(memory, "command line", layout::CMDLINE, &bytes)
}

/// `struct setup_data` of type `SETUP_RNG_SEED` (boot.rst, `setup_data`).
fn seed_setup_data(seed: [u8; 32]) -> Vec<u8> {
    const SETUP_RNG_SEED: u32 = 9;
    let mut data = vec![0; 8];
    data.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data.extend_from_slice(&(seed.len() as u32).to_le_bytes());
    data.extend_from_slice(&seed);
    data
}

/// The memory map as (address, length, type), types as in E820.
fn memory_map(ram_bytes: u64, image: Option<(u64, u64)>) -> Vec<(u64, u64, u32)> {
    const RAM: u32 = 1;
    /// What Linux calls `E820_TYPE_PRAM`: memory of the legacy `pmem` driver.
    const PRAM: u32 = 12;
    let mut map = vec![(0, layout::LOW_END, RAM)];
    for (start, len) in layout::ram_ranges(ram_bytes) {
        let skip = if start == 0 { layout::HIGH_START } else { 0 };
        map.push((start + skip, len - skip, RAM));
    }
    map.extend(image.map(|(address, len)| (address, len, PRAM)));
    map
}

fn write(memory: &Memory, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|source| Error::Write { what, source })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap()
    }

    fn boot(kernel: &File, cmdline: &str) -> Result<Entry, Error> {
        let boot = Boot {
            kernel,
            initrd: None,
            cmdline,
            cpus: 1,
            ram_bytes: 64 << 20,
            image: None,
            seed: [7; 32],
        };
        load(&memory(), boot)
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_text_file_is_no_kernel() {
        let kernel = file(&[b'x'; 8192]);
        assert!(matches!(boot(&kernel, ""), Err(Error::NotAKernel)));
    }

    #[test]
    fn an_empty_file_is_no_kernel() {
        let kernel = file(&[]);
        assert!(matches!(boot(&kernel, ""), Err(Error::NotAKernel)));
    }

    #[test]
    fn a_truncated_elf_image_is_refused() {
        let mut bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        bytes.truncate(4096);
        let kernel = file(&bytes);
        assert!(matches!(boot(&kernel, ""), Err(Error::Elf(_))));
    }

    /// A bzImage of one sector of set-up and 4096 bytes that would be a kernel.
    fn compressed(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            syssize: 4096 / 16,
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            version: 0x020f,
            loadflags: 1,
            code32_start: layout::HIGH_START as u32,
            kernel_alignment: 2 << 20,
            pref_address: 16 << 20,
            init_size: 20 << 20,
            ..Default::default()
        };
        change(&mut header);
        let mut image = vec![0; 1024 + 4096];
        image[0x1f1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
        image
    }

    #[test]
    fn a_bzimage_starts_at_its_64_bit_entry_point() {
        let entry = boot(&file(&compressed(|_| {})), "").unwrap();
        assert_eq!(entry.rip, layout::HIGH_START + 0x200);
    }

    #[test]
    fn a_truncated_bzimage_is_refused() {
        let whole = compressed(|_| {});
        for len in [whole.len() - 1, 1024, 1100] {
            let booted = boot(&file(&whole[..len]), "");
            assert!(
                matches!(booted, Err(Error::Truncated { wanted: 4096, .. })),
                "{len}: {booted:?}"
            );
        }
        assert!(matches!(
            boot(&file(&whole[..700]), ""),
            Err(Error::BzImage(_))
        ));
    }

    #[test]
    fn a_bzimage_without_room_to_unpack_itself_is_refused() {
        let large = file(&compressed(|header| header.init_size = 49 << 20));
        let (end, low_end) = (65 << 20, 64 << 20);
        let booted = boot(&large, "");
        assert!(
            matches!(booted, Err(Error::NoRoom { end: e, low_end: l }) if (e, l) == (end, low_end)),
            "{booted:?}"
        );
        let nowhere = file(&compressed(|header| header.pref_address = u64::MAX));
        assert!(matches!(boot(&nowhere, ""), Err(Error::NoRoom { .. })));
        let anywhere = file(&compressed(|header| {
            header.relocatable_kernel = 1;
            header.kernel_alignment = 0;
            header.pref_address = u64::MAX;
        }));
        assert!(matches!(boot(&anywhere, ""), Err(Error::NoRoom { .. })));
    }

    #[test]
    fn an_initramfs_stays_clear_of_what_a_bzimage_unpacks() {
        let kernel = file(&compressed(|_| {}));
        let mut initrd = tempfile::tempfile().unwrap();
        initrd.set_len(29 << 20).unwrap();
        let boot = Boot {
            kernel: &kernel,
            initrd: Some(&mut initrd),
            cmdline: "",
            cpus: 1,
            ram_bytes: 64 << 20,
            image: None,
            seed: [7; 32],
        };
        let loaded = load(&memory(), boot);
        assert!(
            matches!(loaded, Err(Error::InitrdTooLarge { kernel_end, .. }) if kernel_end == 36 << 20),
            "{loaded:?}"
        );
    }

    #[test]
    fn the_memory_map_leaves_out_the_first_megabyte_s_end_and_the_hole() {
        let map = memory_map(5 << 30, Some((8 << 30, 2 << 20)));
        assert_eq!(
            map,
            [
                (0, layout::LOW_END, 1),
                (1 << 20, (3 << 30) - (1 << 20), 1),
                (4 << 30, 2 << 30, 1),
                (8 << 30, 2 << 20, 12)
            ]
        );
    }

    #[test]
    fn a_command_line_of_2048_bytes_is_too_long() {
        let line = "x".repeat(2048);
        assert!(matches!(
            write_cmdline(&memory(), &line),
            Err(Error::CommandLine { len: 2048 })
        ));
    }
}
