//! Interrupt controllers, timer and clock, as KVM emulates them.
use serde::{Deserialize, Serialize};

use crate::{
    hex::Hex,
    section::{Saved, required},
};

/// The interrupt controllers and the timer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chips {
    /// The first 8259.
    pub pic_master: Pic,
    /// The second 8259.
    pub pic_slave: Pic,
    /// The I/O APIC.
    pub ioapic: IoApic,
    /// The 8254.
    pub pit: Pit,
}

impl Saved for Chips {
    const KIND: &'static str = "interrupt-controllers";
    const VERSION: u32 = 1;
}

/// `struct kvm_pic_state`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the KVM API")]
pub struct Pic {
    pub last_irr: u8,
    pub irr: u8,
    pub imr: u8,
    pub isr: u8,
    pub priority_add: u8,
    pub irq_base: u8,
    pub read_reg_select: u8,
    pub poll: u8,
    pub special_mask: u8,
    pub init_state: u8,
    pub auto_eoi: u8,
    pub rotate_on_auto_eoi: u8,
    pub special_fully_nested_mode: u8,
    pub init4: u8,
    pub elcr: u8,
    pub elcr_mask: u8,
}

/// `struct kvm_ioapic_state`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the KVM API")]
pub struct IoApic {
    pub base_address: Hex<u64>,
    pub ioregsel: u32,
    pub id: u32,
    pub irr: Hex<u32>,
    /// The redirection table.
    pub redirtbl: [Hex<u64>; 24],
}

/// `struct kvm_pit_state2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the KVM API")]
pub struct Pit {
    pub channels: [PitChannel; 3],
    pub flags: Hex<u32>,
}

/// `struct kvm_pit_channel_state`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "named as in the KVM API")]
pub struct PitChannel {
    pub count: u32,
    pub latched_count: u16,
    pub count_latched: u8,
    pub status_latched: u8,
    pub status: u8,
    pub read_state: u8,
    pub write_state: u8,
    pub write_latch: u8,
    pub rw_mode: u8,
    pub mode: u8,
    pub bcd: u8,
    pub gate: u8,
    pub count_load_time: i64,
}

/// The guest's paravirtual clock when it was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clock {
    /// Its value, in nanoseconds.
    pub nanoseconds: u64,
    /// The host's date then: nanoseconds since 1970, UTC; `null` where the host did not report it.
    #[serde(deserialize_with = "required")]
    pub date: Option<u64>,
}

impl Saved for Clock {
    const KIND: &'static str = "clock";
    const VERSION: u32 = 1;
}
