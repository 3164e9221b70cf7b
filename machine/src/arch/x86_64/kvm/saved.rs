//! The saved form of a vCPU's state, and the conversion back. KVM's structs have padding and change
//! with the kernel's headers; the saved form has neither problem.
use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::KvmNestedStateBuffer;
use state::{
    cpu as saved,
    hex::{Hex, HexArray, HexBytes},
};

use super::state::VcpuState;

/// Why a saved vCPU cannot be converted to KVM's form.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum VcpuError {
    #[error("an XSAVE area of {0} bytes; it has {XSAVE}")]
    Xsave(usize),
    #[error("{0} extended control registers; at most 16 are allowed")]
    Xcrs(usize),
    #[error("a nested state of {0} bytes; at most {NESTED} are allowed")]
    Nested(usize),
}

/// Bytes of the XSAVE area of a guest without dynamically enabled features.
const XSAVE: usize = size_of::<kvm_xsave>();
const NESTED: usize = size_of::<KvmNestedStateBuffer>();

impl From<VcpuState> for saved::Vcpu {
    fn from(state: VcpuState) -> Self {
        let VcpuState { regs, sregs, xsave, xcrs, debug, lapic, mp, events, msrs, .. } = state;
        let count = xcrs.nr_xcrs as usize;
        Self {
            mp_state: mp.mp_state,
            registers: save_registers(&regs),
            system: save_system(&sregs),
            xsave: HexBytes(xsave.iter().flat_map(|word| word.to_le_bytes()).collect()),
            xcrs: xcrs.xcrs.iter().take(count).map(|x| (x.xcr, Hex(x.value))).collect(),
            debug: saved::Debug {
                db: debug.db.map(Hex),
                dr6: Hex(debug.dr6),
                dr7: Hex(debug.dr7),
                flags: Hex(debug.flags),
            },
            lapic: HexArray(lapic.regs.map(i8::cast_unsigned)),
            events: save_events(&events),
            msrs: msrs.into_iter().map(|(index, value)| (Hex(index), Hex(value))).collect(),
            tsc_khz: state.tsc_khz,
            nested: HexBytes(state.nested),
        }
    }
}

impl TryFrom<saved::Vcpu> for VcpuState {
    type Error = VcpuError;

    fn try_from(vcpu: saved::Vcpu) -> Result<Self, VcpuError> {
        if vcpu.xsave.0.len() != XSAVE {
            return Err(VcpuError::Xsave(vcpu.xsave.0.len()));
        }
        if vcpu.nested.0.len() > NESTED {
            return Err(VcpuError::Nested(vcpu.nested.0.len()));
        }
        let (words, _) = vcpu.xsave.0.as_chunks::<4>();
        let mut xcrs = kvm_xcrs::default();
        if vcpu.xcrs.len() > xcrs.xcrs.len() {
            return Err(VcpuError::Xcrs(vcpu.xcrs.len()));
        }
        xcrs.nr_xcrs = vcpu.xcrs.len() as u32;
        for (to, (xcr, Hex(value))) in xcrs.xcrs.iter_mut().zip(vcpu.xcrs) {
            *to = kvm_xcr { xcr, value, ..Default::default() };
        }
        let saved::Debug { db, dr6, dr7, flags } = vcpu.debug;
        Ok(Self {
            regs: restore_registers(&vcpu.registers),
            sregs: restore_system(&vcpu.system),
            xsave: words.iter().map(|word| u32::from_le_bytes(*word)).collect(),
            xcrs,
            debug: kvm_debugregs {
                db: db.map(|register| register.0),
                dr6: dr6.0,
                dr7: dr7.0,
                flags: flags.0,
                ..Default::default()
            },
            lapic: kvm_lapic_state { regs: vcpu.lapic.0.map(u8::cast_signed) },
            mp: kvm_mp_state { mp_state: vcpu.mp_state },
            events: restore_events(&vcpu.events),
            msrs: vcpu.msrs.into_iter().map(|(index, value)| (index.0, value.0)).collect(),
            tsc_khz: vcpu.tsc_khz,
            host_khz: 0,
            read_at: 0,
            nested: vcpu.nested.0,
        })
    }
}

fn save_registers(r: &kvm_regs) -> saved::Registers {
    saved::Registers {
        rax: Hex(r.rax),
        rbx: Hex(r.rbx),
        rcx: Hex(r.rcx),
        rdx: Hex(r.rdx),
        rsi: Hex(r.rsi),
        rdi: Hex(r.rdi),
        rsp: Hex(r.rsp),
        rbp: Hex(r.rbp),
        r8: Hex(r.r8),
        r9: Hex(r.r9),
        r10: Hex(r.r10),
        r11: Hex(r.r11),
        r12: Hex(r.r12),
        r13: Hex(r.r13),
        r14: Hex(r.r14),
        r15: Hex(r.r15),
        rip: Hex(r.rip),
        rflags: Hex(r.rflags),
    }
}

fn restore_registers(r: &saved::Registers) -> kvm_regs {
    kvm_regs {
        rax: r.rax.0,
        rbx: r.rbx.0,
        rcx: r.rcx.0,
        rdx: r.rdx.0,
        rsi: r.rsi.0,
        rdi: r.rdi.0,
        rsp: r.rsp.0,
        rbp: r.rbp.0,
        r8: r.r8.0,
        r9: r.r9.0,
        r10: r.r10.0,
        r11: r.r11.0,
        r12: r.r12.0,
        r13: r.r13.0,
        r14: r.r14.0,
        r15: r.r15.0,
        rip: r.rip.0,
        rflags: r.rflags.0,
    }
}

fn save_system(s: &kvm_sregs) -> saved::System {
    saved::System {
        cs: save_segment(&s.cs),
        ds: save_segment(&s.ds),
        es: save_segment(&s.es),
        fs: save_segment(&s.fs),
        gs: save_segment(&s.gs),
        ss: save_segment(&s.ss),
        tr: save_segment(&s.tr),
        ldt: save_segment(&s.ldt),
        gdt: saved::Table { base: Hex(s.gdt.base), limit: Hex(s.gdt.limit) },
        idt: saved::Table { base: Hex(s.idt.base), limit: Hex(s.idt.limit) },
        cr0: Hex(s.cr0),
        cr2: Hex(s.cr2),
        cr3: Hex(s.cr3),
        cr4: Hex(s.cr4),
        cr8: Hex(s.cr8),
        efer: Hex(s.efer),
        apic_base: Hex(s.apic_base),
        interrupt_bitmap: s.interrupt_bitmap.map(Hex),
    }
}

fn restore_system(s: &saved::System) -> kvm_sregs {
    let table =
        |t: &saved::Table| kvm_dtable { base: t.base.0, limit: t.limit.0, ..Default::default() };
    kvm_sregs {
        cs: restore_segment(&s.cs),
        ds: restore_segment(&s.ds),
        es: restore_segment(&s.es),
        fs: restore_segment(&s.fs),
        gs: restore_segment(&s.gs),
        ss: restore_segment(&s.ss),
        tr: restore_segment(&s.tr),
        ldt: restore_segment(&s.ldt),
        gdt: table(&s.gdt),
        idt: table(&s.idt),
        cr0: s.cr0.0,
        cr2: s.cr2.0,
        cr3: s.cr3.0,
        cr4: s.cr4.0,
        cr8: s.cr8.0,
        efer: s.efer.0,
        apic_base: s.apic_base.0,
        interrupt_bitmap: s.interrupt_bitmap.map(|word| word.0),
    }
}

fn save_segment(s: &kvm_segment) -> saved::Segment {
    saved::Segment {
        base: Hex(s.base),
        limit: Hex(s.limit),
        selector: Hex(s.selector),
        kind: s.type_,
        present: s.present,
        dpl: s.dpl,
        db: s.db,
        s: s.s,
        l: s.l,
        g: s.g,
        avl: s.avl,
        unusable: s.unusable,
    }
}

fn restore_segment(s: &saved::Segment) -> kvm_segment {
    kvm_segment {
        base: s.base.0,
        limit: s.limit.0,
        selector: s.selector.0,
        type_: s.kind,
        present: s.present,
        dpl: s.dpl,
        db: s.db,
        s: s.s,
        l: s.l,
        g: s.g,
        avl: s.avl,
        unusable: s.unusable,
        padding: 0,
    }
}

fn save_events(e: &kvm_vcpu_events) -> saved::Events {
    saved::Events {
        exception: saved::Exception {
            injected: e.exception.injected,
            nr: e.exception.nr,
            has_error_code: e.exception.has_error_code,
            pending: e.exception.pending,
            error_code: Hex(e.exception.error_code),
            has_payload: e.exception_has_payload,
            payload: Hex(e.exception_payload),
        },
        interrupt: saved::Interrupt {
            injected: e.interrupt.injected,
            nr: e.interrupt.nr,
            soft: e.interrupt.soft,
            shadow: e.interrupt.shadow,
        },
        nmi: saved::Nmi { injected: e.nmi.injected, pending: e.nmi.pending, masked: e.nmi.masked },
        sipi_vector: e.sipi_vector,
        flags: Hex(e.flags),
        smi: saved::Smi {
            smm: e.smi.smm,
            pending: e.smi.pending,
            smm_inside_nmi: e.smi.smm_inside_nmi,
            latched_init: e.smi.latched_init,
        },
        triple_fault_pending: e.triple_fault.pending,
    }
}

fn restore_events(e: &saved::Events) -> kvm_vcpu_events {
    let mut to = kvm_vcpu_events {
        sipi_vector: e.sipi_vector,
        flags: e.flags.0,
        exception_has_payload: e.exception.has_payload,
        exception_payload: e.exception.payload.0,
        ..Default::default()
    };
    to.exception.injected = e.exception.injected;
    to.exception.nr = e.exception.nr;
    to.exception.has_error_code = e.exception.has_error_code;
    to.exception.pending = e.exception.pending;
    to.exception.error_code = e.exception.error_code.0;
    to.interrupt.injected = e.interrupt.injected;
    to.interrupt.nr = e.interrupt.nr;
    to.interrupt.soft = e.interrupt.soft;
    to.interrupt.shadow = e.interrupt.shadow;
    to.nmi.injected = e.nmi.injected;
    to.nmi.pending = e.nmi.pending;
    to.nmi.masked = e.nmi.masked;
    to.smi.smm = e.smi.smm;
    to.smi.pending = e.smi.pending;
    to.smi.smm_inside_nmi = e.smi.smm_inside_nmi;
    to.smi.latched_init = e.smi.latched_init;
    to.triple_fault.pending = e.triple_fault_pending;
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vCPU in which all fields of a type differ, so that no two can be swapped unnoticed.
    #[test]
    fn every_field_comes_back_to_its_place() {
        let mut value = serde_json::to_value(&state::testing::sections().vcpus[0]).unwrap();
        let mut next = 1;
        number(&mut value, &mut next);
        let vcpu: saved::Vcpu = serde_json::from_value(value).unwrap();
        let again = saved::Vcpu::from(VcpuState::try_from(vcpu.clone()).unwrap());
        assert_eq!(again, vcpu);
    }

    fn number(value: &mut serde_json::Value, next: &mut u8) {
        use serde_json::Value;
        match value {
            Value::Number(_) => *value = (*next).into(),
            Value::String(text) if text.starts_with("0x") => *text = format!("{:#x}", *next),
            Value::Array(list) => list.iter_mut().for_each(|value| number(value, next)),
            Value::Object(fields) => fields.values_mut().for_each(|value| number(value, next)),
            _ => {}
        }
        // Fits into a byte, and differs from its neighbours.
        *next = *next % 251 + 1;
    }

    #[test]
    fn areas_that_kvm_cannot_take_are_refused() {
        let vcpu = state::testing::sections().vcpus.remove(0);
        for length in [0, XSAVE - 4, XSAVE + 4] {
            let other = saved::Vcpu { xsave: HexBytes(vec![0; length]), ..vcpu.clone() };
            assert!(VcpuState::try_from(other).is_err());
        }
        let long = saved::Vcpu { nested: HexBytes(vec![0; NESTED + 1]), ..vcpu.clone() };
        assert!(VcpuState::try_from(long).is_err());
        let many = saved::Vcpu { xcrs: vec![(0, Hex(1)); 17], ..vcpu };
        assert!(VcpuState::try_from(many).is_err());
    }
}
