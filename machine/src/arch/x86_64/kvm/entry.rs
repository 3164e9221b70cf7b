//! The boot vCPU's first registers.
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::{
    super::boot::{Registers, Segment},
    state::{get_msrs, set_msrs},
};
use crate::kvm::{KvmError, refused};

/// The general registers of `registers`, in KVM's form.
pub fn general(registers: &Registers) -> kvm_regs {
    kvm_regs {
        rip: registers.rip,
        rsp: registers.rsp,
        rbx: registers.rbx,
        rsi: registers.rsi,
        rflags: registers.rflags,
        ..Default::default()
    }
}

/// Set the system registers of a new vCPU to those of `registers`.
pub fn system(sregs: &mut kvm_sregs, registers: &Registers) {
    let data = segment(&registers.data);
    sregs.cs = segment(&registers.cs);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(&registers.tr);
    sregs.gdt =
        kvm_dtable { base: registers.gdt_base, limit: registers.gdt_limit, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = registers.cr0;
    sregs.cr3 = registers.cr3;
    sregs.cr4 = registers.cr4;
    sregs.efer = registers.efer;
}

/// What firmware sets up on each processor before a kernel runs, as far as this KVM supports it:
/// fast string instructions, and cached memory (Intel SDM 4, IA32_MISC_ENABLE and
/// IA32_MTRR_DEF_TYPE).
///
/// # Errors
/// When KVM refuses.
pub fn as_firmware_leaves_it(fd: &VcpuFd) -> Result<(), KvmError> {
    const MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const MTRR_DEF_TYPE: u32 = 0x2ff;
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    let wanted = [(MISC_ENABLE, FAST_STRINGS), (MTRR_DEF_TYPE, ENABLED_WRITE_BACK)];
    let there = get_msrs(fd, &wanted.map(|(index, _)| index))?;
    let with = |(index, value): (u32, u64)| {
        let wanted = wanted.iter().find(|(wanted, _)| *wanted == index);
        (index, value | wanted.map_or(0, |(_, bits)| *bits))
    };
    set_msrs(fd, &there.into_iter().map(with).collect::<Vec<_>>())
}

/// Make `fd`, a new vCPU, enter the guest with `registers`.
///
/// # Errors
/// When KVM refuses.
pub fn set(fd: &VcpuFd, registers: &Registers) -> Result<(), KvmError> {
    fd.set_regs(&general(registers)).map_err(refused("set the boot vCPU's registers"))?;
    let mut sregs = fd.get_sregs().map_err(refused("read a vCPU's system registers"))?;
    system(&mut sregs, registers);
    fd.set_sregs(&sregs).map_err(refused("set the boot vCPU's system registers"))
}

fn segment(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.type_,
        present: s.present,
        dpl: s.dpl,
        db: s.db,
        s: s.s,
        l: s.l,
        g: s.g,
        ..Default::default()
    }
}
