//! ACPI tables of a hardware-reduced platform (ACPI 6.5, 4.1): RSDP, XSDT, FADT, MADT, DSDT.
//!
//! The only ACPI hardware is four byte-wide ports ([`layout::ACPI_POWER_PORT`]): sleep control,
//! sleep status, reset and event status. Events arrive through a generic event device that reads
//! the last one.
use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use config::places::VirtioSlot;
use devices::Memory;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::Platform;
use crate::arch::layout;

const OEM_ID: [u8; 6] = *b"STRATO";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
const HEADER_SIZE: u32 = 36;

/// FADT boot architecture flags (ACPI 6.5, 5.2.9.3): devices on ISA, 8042, no VGA, no MSI before
/// there is PCI, no ASPM. "CMOS RTC not present" is not set, as there is one.
const BOOT_ARCHITECTURE: u16 = 1 | 1 << 1 | 1 << 2;
/// Event status bits.
const POWER_BUTTON: u8 = 1;
const GENERATION: u8 = 2;
/// Notification values: power button pressed; generation id changed.
const NOTIFY: u8 = 0x80;

/// Why the ACPI tables could not be written.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// More devices than the reserved area has room for.
    #[error("they need {size} bytes, and there is room for {max}: remove some devices")]
    TooBig {
        /// Bytes of all tables.
        size: u64,
        /// Bytes of the reserved area.
        max: u64,
    },
    /// There is no memory in the first megabyte.
    #[error("they cannot be written at {:#x}", layout::BIOS_AREA)]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Write the tables; the RSDP, which comes first, is found by its address or by searching.
///
/// # Errors
/// When they do not fit into the reserved area.
pub(super) fn write(memory: &Memory, platform: &Platform) -> Result<GuestAddress, AcpiError> {
    let mut blob = Blob { bytes: vec![0; Rsdp::len()] };
    let dsdt = blob.push(&dsdt(platform));
    let fadt = blob.push(&fadt(dsdt));
    let madt = blob.push(&madt(platform.cpu_ids));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = blob.push(&xsdt);
    let max = layout::MP_TABLE - layout::BIOS_AREA;
    let size = blob.bytes.len() as u64;
    if size > max {
        return Err(AcpiError::TooBig { size, max });
    }
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    if let Some(start) = blob.bytes.get_mut(..rsdp.len()) {
        start.copy_from_slice(&rsdp);
    }
    memory.write_slice(&blob.bytes, GuestAddress(layout::BIOS_AREA))?;
    Ok(GuestAddress(layout::BIOS_AREA))
}

/// Tables, one after another.
struct Blob {
    bytes: Vec<u8>,
}

impl Blob {
    /// Append a table; returns its address for the guest.
    fn push(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = layout::BIOS_AREA + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn port(offset: u16) -> GAS {
    let address = u64::from(layout::ACPI_POWER_PORT + offset);
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // If set: not fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.sleep_control_reg = port(0);
    fadt.sleep_status_reg = port(1);
    fadt.reset_reg = port(2);
    fadt.reset_value = layout::ACPI_RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"STRATOVR").into();
    fadt.finalize()
}

/// MADT (ACPI 6.5, 5.2.12). KVM connects each ISA interrupt to the pin of the same number, so there
/// are no overrides.
fn madt(apic_ids: &[u8]) -> impl Aml {
    /// There is a dual 8259.
    const PCAT_COMPAT: u32 = 1;
    let mut body = low32(layout::LAPIC).to_le_bytes().to_vec();
    body.extend(PCAT_COMPAT.to_le_bytes());
    for (uid, id) in (0u8..).zip(apic_ids) {
        ProcessorLocalApic::new(uid, *id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(super::ioapic_id(apic_ids), low32(layout::IOAPIC), 0).to_aml_bytes(&mut body);
    // Local APIC NMI: type 4, length 6, all processors, flags as on the bus, LINT1.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    let mut madt = Sdt::new(*b"APIC", HEADER_SIZE, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append_slice(&body);
    madt
}

fn dsdt(platform: &Platform) -> impl Aml {
    let mut devices = Vec::new();
    for (number, slot) in platform.slots.iter().enumerate() {
        virtio(number, *slot, &mut devices);
    }
    legacy(platform, &mut devices);
    events(platform, &mut devices);
    let mut body = Scope::raw(Path::new("\\_SB_"), devices);
    let sleep: Vec<&dyn Aml> = vec![&layout::ACPI_S5, &0_u8, &0_u8, &0_u8];
    Name::new(Path::new("_S5_"), &Package::new(sleep)).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_SIZE, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// An exclusive edge-triggered, active-high interrupt.
fn edge(irq: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, irq)
}

fn virtio(number: usize, slot: VirtioSlot, out: &mut Vec<u8>) {
    let registers = Memory32Fixed::new(true, slot.address, low32(layout::VIRTIO_MMIO_STEP));
    let interrupt = edge(slot.irq);
    Device::new(
        // Names have four characters; far fewer devices than 4096 fit.
        Path::new(&format!("V{:03X}", number & 0xfff)),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &low32(number as u64)),
            &Name::new(Path::new("_CCA"), &1_u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(out);
}

/// The devices at fixed ports.
fn legacy(platform: &Platform, out: &mut Vec<u8>) {
    let ports = |port: u16, len: u8| IO::new(port, port, 1, len);
    let mut device = |name: &str, id: &dyn Aml, resources: Vec<&dyn Aml>| {
        Device::new(
            Path::new(name),
            vec![
                &Name::new(Path::new("_HID"), id),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
            ],
        )
        .to_aml_bytes(out);
    };
    if platform.serial {
        device(
            "COM1",
            &EISAName::new("PNP0501"),
            vec![&ports(layout::SERIAL_PORT, 8), &edge(layout::SERIAL_IRQ)],
        );
    }
    device(
        "PS2K",
        &EISAName::new("PNP0303"),
        vec![
            &ports(layout::I8042_PORT, 1),
            &ports(layout::I8042_PORT + 4, 1),
            &edge(layout::KEYBOARD_IRQ),
        ],
    );
    device("RTC_", &EISAName::new("PNP0B00"), vec![&ports(layout::CMOS_PORT, 2)]);
    device("PEVT", &"QEMU0001", vec![&ports(layout::PVPANIC_PORT, 1)]);
}

/// The power button, the generation id, and the generic event device (ACPI 6.5, 5.6.9) that reports
/// their events.
fn events(platform: &Platform, out: &mut Vec<u8>) {
    Device::new(Path::new("PWRB"), vec![&Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"))])
        .to_aml_bytes(out);
    if let Some(address) = platform.vmgenid {
        let address = address.0;
        let (low, high) = (low32(address & 0xffff_ffff), low32(address >> 32));
        Device::new(
            Path::new("VGEN"),
            vec![
                &Name::new(Path::new("_HID"), &"QEMUVGID"),
                &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
                &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
                &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
            ],
        )
        .to_aml_bytes(out);
    }
    let status = Path::new("ESTS");
    let region = OpRegion::new(
        Path::new("EREG"),
        OpRegionSpace::SystemIO,
        &(layout::ACPI_POWER_PORT + 3),
        &1_u8,
    );
    let field = Field::new(
        Path::new("EREG"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"ESTS", 8)],
    );
    // Reading clears the events, so read once.
    let read = Store::new(&Local(0), &status);
    let (button, generation) = (Path::new("PWRB"), Path::new("VGEN"));
    let notify_button = Notify::new(&button, &NOTIFY);
    let notify_generation = Notify::new(&generation, &NOTIFY);
    let zero = acpi_tables::aml::Zero {};
    let button_bit = And::new(&zero, &Local(0), &POWER_BUTTON);
    let button_bit = Equal::new(&button_bit, &POWER_BUTTON);
    let generation_bit = And::new(&zero, &Local(0), &GENERATION);
    let generation_bit = Equal::new(&generation_bit, &GENERATION);
    let on_button = If::new(&button_bit, vec![&notify_button]);
    let on_generation = If::new(&generation_bit, vec![&notify_generation]);
    let mut body: Vec<&dyn Aml> = vec![&read, &on_button];
    if platform.vmgenid.is_some() {
        body.push(&on_generation);
    }
    let interrupt = edge(layout::GED_IRQ);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(Path::new("_CRS"), &resources),
            &region,
            &field,
            &Method::new(Path::new("_EVT"), 1, true, body),
        ],
    )
    .to_aml_bytes(out);
}

fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
