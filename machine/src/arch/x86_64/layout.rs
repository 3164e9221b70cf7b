//! The guest's address map (x86_64): the only definition of its addresses, ports and interrupts.
//!
//! ```text
//! 0x0000_0000 .. 0x0009_fc00   RAM: zero page, boot GDT, page tables, command line
//! 0x0009_fc00 .. 0x0010_0000   reserved in the memory map: generation id, ACPI and MP tables
//! 0x0010_0000 .. 0xc000_0000   RAM: kernel, initrd
//! 0xc000_0000 .. 0x1_0000_0000 hole: virtio-mmio, IOAPIC, LAPIC, TSS, identity map
//! 0x1_0000_0000 ..             RAM above the hole
//! ```

// The addresses of the virtio-mmio slots: a saved configuration is checked against them.
pub use config::places::{VIRTIO_IRQS, VIRTIO_MMIO, VIRTIO_MMIO_STEP};

/// First byte of the hole below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// First byte above the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Boot GDT.
pub const BOOT_GDT: u64 = 0x500;
/// `struct hvm_start_info` of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// `struct hvm_modlist_entry` of the initrd.
pub const PVH_MODULES: u64 = 0x6040;
/// `struct hvm_memmap_table_entry`s, up to the zero page.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// Linux's zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer; the stack is the page below it.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Boot page tables: one PML4, one PDPT, four page directories of 2 MiB pages; six pages.
pub const BOOT_PML4: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x20000;
/// Bytes for the command line, terminator included.
pub const CMDLINE_MAX: usize = config::limits::MAX_CMDLINE + 1;
/// Extended BIOS data area, empty: from here to the end of the first megabyte no RAM is free.
pub const EBDA: u64 = 0x9fc00;
/// The generation id's 16 bytes, in a reserved page of their own. Not at the page's beginning,
/// where Linux looks for ROMs.
pub const GENERATION_ID: u64 = 0xdf010;
/// ACPI tables, the RSDP first; an operating system searches for it from here on (ACPI 6.5,
/// 5.2.5.1).
pub const BIOS_AREA: u64 = 0xe0000;
/// MP floating pointer and table. Not in the EBDA, whose 1 KiB holds 40 processors. An operating
/// system searches here, too (MultiProcessor Specification 1.4, 4.1).
pub const MP_TABLE: u64 = 0xf0000;
/// End of the first megabyte.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Load address of a flat `vmlinux.bin`.
pub const FLAT_KERNEL: u64 = 0x100_0000;

/// IOAPIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages for KVM's task state segment.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page for KVM's identity map.
pub const KVM_IDENTITY: u64 = 0xfffb_c000;

/// Interrupt of the ACPI generic event device (power button).
pub const GED_IRQ: u32 = 9;
/// Interrupt of the keyboard.
pub const KEYBOARD_IRQ: u32 = 1;
/// Interrupt of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// Pins of the IOAPIC. KVM's default routing connects interrupt n to pin n, including the timer's
/// 0, so neither table needs an exception.
pub const IOAPIC_PINS: u32 = 24;

/// First serial port, eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// i8042 data port; command port is +4.
pub const I8042_PORT: u16 = 0x60;
/// CMOS index port; data port is +1.
pub const CMOS_PORT: u16 = 0x70;
/// Where a PC has the address register of its PCI configuration space, four ports. There is none
/// here, but Linux looks for devices that way unless it is told `pci=off`.
pub const PCI_ADDRESS_PORT: u16 = 0xcf8;
/// pvpanic, one port (the port QEMU uses).
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI power block: sleep control, sleep status, reset, event status; one byte each.
pub const ACPI_POWER_PORT: u16 = 0x600;
/// ACPI sleep type that means S5 in the sleep control register.
pub const ACPI_S5: u8 = 5;
/// Value for the ACPI reset register.
pub const ACPI_RESET_VALUE: u8 = 1;
