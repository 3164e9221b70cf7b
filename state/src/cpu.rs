//! vCPUs, and the CPU features that they offer to the guest.
use serde::{Deserialize, Serialize};

use crate::{
    hex::{Hex, HexArray, HexBytes},
    section::Saved,
};

/// The features of the guest's CPUs, which another host's CPUs must therefore support.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// CPUID leaves of the boot vCPU.
    pub cpuid: Vec<Leaf>,
}

impl Saved for Cpu {
    const KIND: &'static str = "cpu";
    const VERSION: u32 = 1;
}

/// One CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the manuals")]
pub struct Leaf {
    pub function: Hex<u32>,
    pub index: Hex<u32>,
    /// KVM's flags: whether `index` is significant.
    pub flags: Hex<u32>,
    pub eax: Hex<u32>,
    pub ebx: Hex<u32>,
    pub ecx: Hex<u32>,
    pub edx: Hex<u32>,
}

/// The complete state of a vCPU. The names are those of the manuals and of the KVM API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vcpu {
    /// Runnable, halted, waiting for an INIT: KVM's `mp_state`.
    pub mp_state: u32,
    /// General registers.
    pub registers: Registers,
    /// Segment, table and control registers.
    pub system: System,
    /// XSAVE area.
    pub xsave: HexBytes,
    /// Extended control registers: index and value.
    pub xcrs: Vec<(u32, Hex<u64>)>,
    /// Debug registers.
    pub debug: Debug,
    /// Registers of the local APIC, in the layout of its register page.
    pub lapic: HexArray<1024>,
    /// Pending exceptions and interrupts.
    pub events: Events,
    /// Model-specific registers: index and value.
    pub msrs: Vec<(Hex<u32>, Hex<u64>)>,
    /// Time stamp counter ticks per millisecond.
    pub tsc_khz: u32,
    /// State of nested virtualisation, as `KVM_GET_NESTED_STATE` returns it; empty where there is
    /// none.
    pub nested: HexBytes,
}

impl Saved for Vcpu {
    const KIND: &'static str = "vcpu";
    const VERSION: u32 = 1;
}

/// General registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the manuals")]
pub struct Registers {
    pub rax: Hex<u64>,
    pub rbx: Hex<u64>,
    pub rcx: Hex<u64>,
    pub rdx: Hex<u64>,
    pub rsi: Hex<u64>,
    pub rdi: Hex<u64>,
    pub rsp: Hex<u64>,
    pub rbp: Hex<u64>,
    pub r8: Hex<u64>,
    pub r9: Hex<u64>,
    pub r10: Hex<u64>,
    pub r11: Hex<u64>,
    pub r12: Hex<u64>,
    pub r13: Hex<u64>,
    pub r14: Hex<u64>,
    pub r15: Hex<u64>,
    pub rip: Hex<u64>,
    pub rflags: Hex<u64>,
}

/// Segment, table and control registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the manuals")]
pub struct System {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: Table,
    pub idt: Table,
    pub cr0: Hex<u64>,
    pub cr2: Hex<u64>,
    pub cr3: Hex<u64>,
    pub cr4: Hex<u64>,
    pub cr8: Hex<u64>,
    pub efer: Hex<u64>,
    pub apic_base: Hex<u64>,
    /// External interrupts pending for the vCPU, one bit each.
    pub interrupt_bitmap: [Hex<u64>; 4],
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the manuals")]
pub struct Segment {
    pub base: Hex<u64>,
    pub limit: Hex<u32>,
    pub selector: Hex<u16>,
    #[serde(rename = "type")]
    pub kind: u8,
    pub present: u8,
    pub dpl: u8,
    pub db: u8,
    pub s: u8,
    pub l: u8,
    pub g: u8,
    pub avl: u8,
    pub unusable: u8,
}

/// A descriptor table register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the manuals")]
pub struct Table {
    pub base: Hex<u64>,
    pub limit: Hex<u16>,
}

/// Debug registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the manuals")]
pub struct Debug {
    /// DR0 to DR3.
    pub db: [Hex<u64>; 4],
    pub dr6: Hex<u64>,
    pub dr7: Hex<u64>,
    pub flags: Hex<u64>,
}

/// `struct kvm_vcpu_events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the KVM API")]
pub struct Events {
    pub exception: Exception,
    pub interrupt: Interrupt,
    pub nmi: Nmi,
    pub sipi_vector: u32,
    pub flags: Hex<u32>,
    pub smi: Smi,
    pub triple_fault_pending: u8,
}

/// A pending exception.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the KVM API")]
pub struct Exception {
    pub injected: u8,
    pub nr: u8,
    pub has_error_code: u8,
    pub pending: u8,
    pub error_code: Hex<u32>,
    pub has_payload: u8,
    pub payload: Hex<u64>,
}

/// A pending interrupt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the KVM API")]
pub struct Interrupt {
    pub injected: u8,
    pub nr: u8,
    pub soft: u8,
    pub shadow: u8,
}

/// A pending non-maskable interrupt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the KVM API")]
pub struct Nmi {
    pub injected: u8,
    pub pending: u8,
    pub masked: u8,
}

/// System management mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the KVM API")]
pub struct Smi {
    pub smm: u8,
    pub pending: u8,
    pub smm_inside_nmi: u8,
    pub latched_init: u8,
}
