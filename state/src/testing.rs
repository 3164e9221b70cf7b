#![expect(clippy::expect_used, reason = "a mistake here is one of the tests")]
//! A small made-up machine: one vCPU, the devices that every machine has, an empty slot for disks.
use serde_json::json;

use crate::{
    Config, Section, Sections, State,
    config::{Contents, Disk},
    device,
};

/// Bytes of its memory. Not a multiple of a checksum block.
pub const MEMORY: u64 = 17 << 20;

fn from<T: serde::de::DeserializeOwned>(json: serde_json::Value) -> T {
    serde_json::from_value(json).expect("this is in the form of that type")
}

/// Its configuration, with the given id.
pub fn config(id: u128) -> Config {
    let mut config: Config = from(json!({
        "id": "00000000000000000000000000000000",
        "machine": {
            "name": "m", "uuid": "00000000-0000-0000-0000-000000000000", "vcpus": 1,
            "topology": {"sockets": 1, "dies": 1, "clusters": 1, "cores": 1, "threads": 1},
            "memory": {"size": MEMORY, "shared": false, "path": null, "prealloc": false, "dump": true},
            "boot": {"kernel": "k", "initrd": null, "cmdline": ""},
            "iothreads": [], "serial": null,
        },
        "slots": [{
            "id": "disk0", "address": "0xf0100000", "interrupt": 5, "queue_sizes": [256],
            "iothread": null, "contents": {"disk": null},
        }],
        "halted": null, "base": null,
    }));
    config.id = id.into();
    config
}

/// A disk of `size` bytes, for its slot.
pub fn disk(id: &str, size: u64) -> Contents {
    let disk: Disk = from(json!({
        "id": id, "backend": null, "path": "image", "size": size, "readonly": false,
        "direct": false, "aio": "auto", "discard": false, "serial": null, "iops": null, "bps": null,
        "kept": null,
    }));
    Contents::Disk(Some(disk))
}

/// All of its state but the configuration.
pub fn sections() -> Sections {
    let segment = json!({
        "base": "0x0", "limit": "0xffff", "selector": "0x0", "type": 3, "present": 1, "dpl": 0,
        "db": 0, "s": 1, "l": 0, "g": 0, "avl": 0, "unusable": 0,
    });
    let table = json!({"base": "0x0", "limit": "0xffff"});
    let pic = json!({
        "last_irr": 0, "irr": 0, "imr": 0, "isr": 0, "priority_add": 0, "irq_base": 0,
        "read_reg_select": 0, "poll": 0, "special_mask": 0, "init_state": 0, "auto_eoi": 0,
        "rotate_on_auto_eoi": 0, "special_fully_nested_mode": 0, "init4": 0, "elcr": 0,
        "elcr_mask": 0,
    });
    let channel = json!({
        "count": 0, "latched_count": 0, "count_latched": 0, "status_latched": 0, "status": 0,
        "read_state": 0, "write_state": 0, "write_latch": 0, "rw_mode": 0, "mode": 0, "bcd": 0,
        "gate": 0, "count_load_time": -1,
    });
    let zero = |count| vec!["0x0"; count];
    let registers: serde_json::Map<_, _> =
        "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 \
        r15 rip rflags"
            .split_whitespace()
            .map(|name| (name.to_owned(), json!("0x2")))
            .collect();
    let mut system = serde_json::Map::new();
    for name in ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"] {
        system.insert(name.into(), segment.clone());
    }
    system.extend([("gdt".into(), table.clone()), ("idt".into(), table)]);
    for name in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"] {
        system.insert(name.into(), json!("0x0"));
    }
    system.insert("interrupt_bitmap".into(), json!(zero(4)));
    let vcpu = json!({
        "mp_state": 0, "registers": registers, "system": system, "xsave": "00".repeat(4096),
        "xcrs": [[0, "0x7"]],
        "debug": {"db": zero(4), "dr6": "0xffff0ff0", "dr7": "0x400", "flags": "0x0"},
        "lapic": "00".repeat(1024),
        "events": {
            "exception": {
                "injected": 0, "nr": 0, "has_error_code": 0, "pending": 0, "error_code": "0x0",
                "has_payload": 0, "payload": "0x0",
            },
            "interrupt": {"injected": 0, "nr": 0, "soft": 0, "shadow": 0},
            "nmi": {"injected": 0, "pending": 0, "masked": 0},
            "sipi_vector": 0, "flags": "0x0",
            "smi": {"smm": 0, "pending": 0, "smm_inside_nmi": 0, "latched_init": 0},
            "triple_fault_pending": 0,
        },
        "msrs": [["0x10", "0xffffffffffffffff"]], "tsc_khz": 2_000_000, "nested": "",
    });
    let keyboard: device::I8042 = from(json!({
        "control": 0, "answer": null, "command": null, "last_was_command": false, "sent": "1e9e",
        "keyboard_command": null, "scanning": true,
    }));
    let cmos: device::Cmos = from(json!({"index": 0, "ram": "00".repeat(128)}));
    let disk: device::Disk = from(json!({
        "size": 0, "writeback": true, "queues": null, "in_flight": [], "mark": null,
    }));
    let part = |id: &str, part: Result<Section, _>| {
        part.map(|part| Section { id: id.into(), ..part }).expect("it has a form in JSON")
    };
    let slot: device::VirtioMmio = from(json!({
        "device_type": 2, "device_features": "0x130006e44", "status": 0, "interrupt_status": 0,
        "config_generation": 0, "device_features_sel": 0, "driver_features_sel": 0,
        "driver_features": "0x0", "unknown_features": false, "queue_sel": 0,
        "queues": [{
            "size": 0, "ready": false, "descriptors": "0x0", "driver": "0x0", "device": "0x0",
        }],
        "active": false, "device": part("disk0", Section::of("", &disk)),
    }));
    Sections {
        cpu: from(json!({"cpuid": [{
            "function": "0x0", "index": "0x0", "flags": "0x0", "eax": "0x10", "ebx": "0x68747541",
            "ecx": "0x444d4163", "edx": "0x69746e65",
        }]})),
        vcpus: vec![from(vcpu)],
        chips: from(json!({
            "pic_master": pic, "pic_slave": pic,
            "ioapic": {
                "base_address": "0xfec00000", "ioregsel": 0, "id": 0, "irr": "0x0",
                "redirtbl": zero(24),
            },
            "pit": {"channels": [channel, channel, channel], "flags": "0x0"},
        })),
        clock: from(json!({"nanoseconds": 5, "date": 6})),
        devices: vec![
            part("i8042", Section::of("", &keyboard)),
            part("cmos", Section::of("", &cmos)),
            part("power", Section::of("", &device::Power { events: 0 })),
            part("pvpanic", Section::of("", &device::Pvpanic {})),
            part("disk0", Section::of("", &slot)),
        ],
    }
}

/// The whole machine.
pub fn state() -> State {
    let sums = (0..9).collect();
    State { config: config(7), sections: sections(), changed: Vec::new(), sums }
}
