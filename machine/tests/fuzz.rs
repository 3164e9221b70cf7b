//! The entry function of `fuzz/`, with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "../../fuzz/src/kernel.rs"]
mod kernel;
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/restore.rs"]
mod restore;
#[path = "../../fuzz/src/saved.rs"]
mod saved;

use machine::boot::Protocol;

fn put(file: &mut [u8], fields: &[(usize, &[u8])]) {
    for (at, bytes) in fields {
        file[*at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// A 64-bit ELF file of one page, to be loaded at 2 MiB, with this note.
fn elf(owner: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let at = 0x20_0000u64.to_le_bytes();
    let mut file = vec![0x90; 4096];
    file[..0x200].fill(0);
    let owner_room = owner.len().next_multiple_of(4);
    let notes = (12 + owner_room + desc.len()) as u64;
    put(
        &mut file,
        &[
            (0, b"\x7fELF\x02\x01\x01"),
            // An executable for x86-64, with two program headers.
            (16, &[2, 0, 62, 0, 1]),
            (24, &at),
            (32, &[64]),
            (52, &[64, 0, 56, 0, 2]),
            // To be loaded: from 0x200 on.
            (64, &[1, 0, 0, 0, 5]),
            (64 + 8, &0x200u64.to_le_bytes()),
            (64 + 16, &at),
            (64 + 24, &at),
            (64 + 32, &0xe00u64.to_le_bytes()),
            (64 + 40, &0x1000u64.to_le_bytes()),
            // Notes: at 0x100.
            (120, &[4, 0, 0, 0, 4]),
            (120 + 8, &0x100u64.to_le_bytes()),
            (120 + 32, &notes.to_le_bytes()),
            (120 + 40, &notes.to_le_bytes()),
            (0x100, &(owner.len() as u32).to_le_bytes()),
            (0x104, &(desc.len() as u32).to_le_bytes()),
            (0x108, &kind.to_le_bytes()),
            (0x10c, owner),
            (0x10c + owner_room, desc),
        ],
    );
    file
}

/// A bzImage of protocol 2.15 with one setup sector and a page of code.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0x90; 1024 + 4096];
    file[0x1f1..0x280].fill(0);
    put(
        &mut file,
        &[
            (0x1f1, &[1]),
            (0x1f4, &(4096u32 / 16).to_le_bytes()),
            (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),
            (0x202, b"HdrS\x0f\x02"),
            (0x211, &[1]),
            (0x22c, &0x7fff_ffffu32.to_le_bytes()),
            (0x234, &[1, 0, 0x3f, 0]),
            (0x238, &2047u32.to_le_bytes()),
            (0x258, &0x100_0000u64.to_le_bytes()),
            (0x260, &0x10_0000u32.to_le_bytes()),
        ],
    );
    file
}

#[test]
fn files_that_are_nearly_kernels() {
    let with = |with: u8, kernel: &[u8]| [&[with][..], kernel].concat();
    let pvh = elf(b"Xen\0", 18, &0x20_0000u64.to_le_bytes());
    let linux = elf(b"Linux\0", 0x100, b"x\0\0\0");
    // The seeds are valid kernels.
    for (kernel, protocol) in
        [(&pvh, Protocol::Pvh), (&linux, Protocol::Linux64), (&bzimage(), Protocol::Linux64)]
    {
        assert_eq!(kernel::load_all(&with(0, kernel)).unwrap().unwrap().protocol, protocol);
    }
    let seeds = [with(2, &pvh), with(7, &linux), with(7, &bzimage()), vec![7]];
    mutate::hammer("kernel", &seeds, 3000, kernel::entry);
}

#[test]
fn states_that_are_nearly_a_machines() {
    let mut file = Vec::new();
    state::testing::state().write(&mut file).unwrap();
    let mut seeds = vec![saved::frames(&file)];
    // States saved by released programs, with every device.
    for name in ["9d2bfdc-everything", "bd6521f-everything"] {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../state/tests/golden");
        seeds.push(saved::frames(&std::fs::read(format!("{golden}/{name}/state")).unwrap()));
    }
    mutate::hammer("restore", &seeds, 3000, restore::entry);
}
