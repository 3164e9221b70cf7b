//! The state of the interrupt controllers and the timer that KVM emulates.
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};

use serde::{Deserialize, Serialize};

use super::{KvmError, Vm, refused};

/// Both PICs, the IOAPIC and the PIT. Plain data: what it holds is checked by KVM on restore.
#[derive(Clone, Serialize, Deserialize)]
pub struct ChipState {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

impl ChipState {
    /// Read them from a machine that is not running.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(vm: &Vm) -> Result<Self, KvmError> {
        let mut irqchips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut irqchips {
            vm.fd.get_irqchip(chip).map_err(refused("read an interrupt controller"))?;
        }
        let pit = vm.fd.get_pit2().map_err(refused("read the timer (PIT)"))?;
        Ok(Self { irqchips, pit })
    }

    /// Give them to a machine that is not running.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&self, vm: &Vm) -> Result<(), KvmError> {
        for chip in &self.irqchips {
            vm.fd.set_irqchip(chip).map_err(refused("set an interrupt controller"))?;
        }
        vm.fd.set_pit2(&self.pit).map_err(refused("set the timer (PIT)"))
    }
}
