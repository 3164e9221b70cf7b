//! x86-64: its names in QMP, and what its threads ask of KVM.
use qmp::schema::{CpuInfoArch, SysEmuTarget};

/// The guest's architecture.
pub const TARGET: SysEmuTarget = SysEmuTarget::X86_64;
/// The same, in `query-cpus`.
pub const CPU_INFO: CpuInfoArch = CpuInfoArch::X86;
/// The only model of vCPUs: the host's.
pub const CPU_MODEL: &str = "host-x86_64-cpu";
/// Its type in `query-hotpluggable-cpus`, as StratoVirt has it.
pub const HOTPLUGGABLE_CPU: &str = "host-x86-cpu";

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
pub const AUDIT_ARCH: u32 = 0xc000_003e;

/// KVM's ioctls of a vCPU's thread: to run it, and to read and write its state.
pub const VCPU_IOCTLS: &[u8] = &[
    0x80, // RUN
    0x67, 0x68, // REGISTER_COALESCED_MMIO, UNREGISTER_COALESCED_MMIO
    0xad, // KVMCLOCK_CTRL
    0xe1, 0xe2, // SET_DEVICE_ATTR, GET_DEVICE_ATTR
    0xa2, 0xa3, // SET_TSC_KHZ, GET_TSC_KHZ
    0x81, 0x82, // GET_REGS, SET_REGS
    0x83, 0x84, // GET_SREGS, SET_SREGS
    0x88, 0x89, // GET_MSRS, SET_MSRS
    0x8e, 0x8f, // GET_LAPIC, SET_LAPIC
    0x98, 0x99, // GET_MP_STATE, SET_MP_STATE
    0x9f, 0xa0, // GET_VCPU_EVENTS, SET_VCPU_EVENTS
    0xa1, // GET_DEBUGREGS; SET_DEBUGREGS has the number of SET_TSC_KHZ
    0xa4, 0xa5, // GET_XSAVE, SET_XSAVE
    0xa6, 0xa7, // GET_XCRS, SET_XCRS
    0xbe, 0xbf, // GET_NESTED_STATE, SET_NESTED_STATE
];

/// KVM's ioctls of the main thread: the machine as a whole. A reset creates a new one, with its
/// vCPUs.
pub const MACHINE_IOCTLS: &[u8] = &[
    0x01, // CREATE_VM
    0x03, 0x04, 0x05, // CHECK_EXTENSION, GET_VCPU_MMAP_SIZE, GET_SUPPORTED_CPUID
    0x41, // CREATE_VCPU
    0x46, 0x47, 0x48, // SET_USER_MEMORY_REGION, SET_TSS_ADDR, SET_IDENTITY_MAP_ADDR
    0x60, 0x76, 0x77, 0x79, // CREATE_IRQCHIP, IRQFD, CREATE_PIT2, IOEVENTFD
    0x67, // REGISTER_COALESCED_MMIO
    0x90, // SET_CPUID2
    0x81, 0x82, // GET_REGS, SET_REGS
    0x83, 0x84, // GET_SREGS, SET_SREGS
    0x88, 0x89, // GET_MSRS, SET_MSRS
    0x42, // GET_DIRTY_LOG
    0x62, 0x63, // GET_IRQCHIP, SET_IRQCHIP
    0x7b, 0x7c, // SET_CLOCK, GET_CLOCK
    0x9f, 0xa0, // GET_PIT2, SET_PIT2
    0xa3, // GET_TSC_KHZ
];
