//! The state of the interrupt controllers and the timer that KVM emulates.
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use state::{chips as saved, hex::Hex};

use crate::kvm::{KvmError, Vm, refused};

/// Both PICs, the IOAPIC and the PIT. Plain data: KVM checks its values on restore.
#[derive(Clone)]
pub struct ChipState {
    pics: [kvm_pic_state; 2],
    ioapic: kvm_ioapic_state,
    pit: kvm_pit_state2,
}

impl ChipState {
    /// Read them from a machine that is not running.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(vm: &Vm) -> Result<Self, KvmError> {
        let read = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.fd.get_irqchip(&mut chip).map_err(refused("read an interrupt controller"))?;
            Ok::<_, KvmError>(chip.chip)
        };
        let pic = |chip| {
            // SAFETY: every bit pattern is a value of it, and KVM has filled in the one of a PIC.
            read(chip).map(|chip| unsafe { chip.pic })
        };
        let pics = [pic(KVM_IRQCHIP_PIC_MASTER)?, pic(KVM_IRQCHIP_PIC_SLAVE)?];
        // SAFETY: every bit pattern is a value of it, and KVM has filled in the one of an IOAPIC.
        let ioapic = unsafe { read(KVM_IRQCHIP_IOAPIC)?.ioapic };
        let pit = vm.fd.get_pit2().map_err(refused("read the timer (PIT)"))?;
        Ok(Self { pics, ioapic, pit })
    }

    /// Restore them into a machine that is not running.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&self, vm: &Vm) -> Result<(), KvmError> {
        let [master, slave] = self.pics;
        for (chip_id, pic) in [(KVM_IRQCHIP_PIC_MASTER, master), (KVM_IRQCHIP_PIC_SLAVE, slave)] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            chip.chip.pic = pic;
            vm.fd.set_irqchip(&chip).map_err(refused("set an interrupt controller"))?;
        }
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        chip.chip.ioapic = self.ioapic;
        vm.fd.set_irqchip(&chip).map_err(refused("set an interrupt controller"))?;
        vm.fd.set_pit2(&self.pit).map_err(refused("set the timer (PIT)"))
    }
}

impl From<ChipState> for saved::Chips {
    fn from(chips: ChipState) -> Self {
        let ChipState { pics: [master, slave], ioapic, pit } = chips;
        Self {
            pic_master: save_pic(master),
            pic_slave: save_pic(slave),
            ioapic: saved::IoApic {
                base_address: Hex(ioapic.base_address),
                ioregsel: ioapic.ioregsel,
                id: ioapic.id,
                irr: Hex(ioapic.irr),
                // SAFETY: every bit pattern is valid, and both fields are the same 64 bits.
                redirtbl: ioapic.redirtbl.map(|entry| Hex(unsafe { entry.bits })),
            },
            pit: saved::Pit { channels: pit.channels.map(save_channel), flags: Hex(pit.flags) },
        }
    }
}

impl From<saved::Chips> for ChipState {
    fn from(chips: saved::Chips) -> Self {
        let saved::Chips { pic_master, pic_slave, ioapic: from, pit } = chips;
        let mut ioapic = kvm_ioapic_state {
            base_address: from.base_address.0,
            ioregsel: from.ioregsel,
            id: from.id,
            irr: from.irr.0,
            ..Default::default()
        };
        for (to, Hex(bits)) in ioapic.redirtbl.iter_mut().zip(from.redirtbl) {
            to.bits = bits;
        }
        let pit = kvm_pit_state2 {
            channels: pit.channels.map(restore_channel),
            flags: pit.flags.0,
            ..Default::default()
        };
        Self { pics: [pic_master, pic_slave].map(restore_pic), ioapic, pit }
    }
}

fn save_pic(p: kvm_pic_state) -> saved::Pic {
    saved::Pic {
        last_irr: p.last_irr,
        irr: p.irr,
        imr: p.imr,
        isr: p.isr,
        priority_add: p.priority_add,
        irq_base: p.irq_base,
        read_reg_select: p.read_reg_select,
        poll: p.poll,
        special_mask: p.special_mask,
        init_state: p.init_state,
        auto_eoi: p.auto_eoi,
        rotate_on_auto_eoi: p.rotate_on_auto_eoi,
        special_fully_nested_mode: p.special_fully_nested_mode,
        init4: p.init4,
        elcr: p.elcr,
        elcr_mask: p.elcr_mask,
    }
}

fn restore_pic(p: saved::Pic) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: p.last_irr,
        irr: p.irr,
        imr: p.imr,
        isr: p.isr,
        priority_add: p.priority_add,
        irq_base: p.irq_base,
        read_reg_select: p.read_reg_select,
        poll: p.poll,
        special_mask: p.special_mask,
        init_state: p.init_state,
        auto_eoi: p.auto_eoi,
        rotate_on_auto_eoi: p.rotate_on_auto_eoi,
        special_fully_nested_mode: p.special_fully_nested_mode,
        init4: p.init4,
        elcr: p.elcr,
        elcr_mask: p.elcr_mask,
    }
}

fn save_channel(c: kvm_pit_channel_state) -> saved::PitChannel {
    saved::PitChannel {
        count: c.count,
        latched_count: c.latched_count,
        count_latched: c.count_latched,
        status_latched: c.status_latched,
        status: c.status,
        read_state: c.read_state,
        write_state: c.write_state,
        write_latch: c.write_latch,
        rw_mode: c.rw_mode,
        mode: c.mode,
        bcd: c.bcd,
        gate: c.gate,
        count_load_time: c.count_load_time,
    }
}

fn restore_channel(c: saved::PitChannel) -> kvm_pit_channel_state {
    kvm_pit_channel_state {
        count: c.count,
        latched_count: c.latched_count,
        count_latched: c.count_latched,
        status_latched: c.status_latched,
        status: c.status,
        read_state: c.read_state,
        write_state: c.write_state,
        write_latch: c.write_latch,
        rw_mode: c.rw_mode,
        mode: c.mode,
        bcd: c.bcd,
        gate: c.gate,
        count_load_time: c.count_load_time,
    }
}
