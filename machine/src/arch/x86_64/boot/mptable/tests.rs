//! The MP table, read as an operating system reads it.
use super::super::tests::memory;
use super::*;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table, found by searching where the specification says.
fn find(apic_ids: &[u8]) -> Vec<u8> {
    let memory = memory(16 << 20);
    write(&memory, apic_ids).unwrap();
    let mut rom = vec![0; 0x1_0000];
    memory.read_slice(&mut rom, GuestAddress(0xf_0000)).unwrap();
    let pointer = rom.chunks(16).find(|paragraph| paragraph.starts_with(b"_MP_")).unwrap();
    assert_eq!((pointer[8], pointer[9], sum(pointer)), (1, 4, 0));
    assert_eq!(pointer[11..], [0; 5], "no default configuration, no IMCR");
    let start = u32::from_le_bytes(pointer[4..8].try_into().unwrap()) as usize - 0xf_0000;
    let len = usize::from(u16::from_le_bytes(rom[start + 4..start + 6].try_into().unwrap()));
    let table = rom[start..start + len].to_vec();
    assert!(rom[start + len..].iter().all(|byte| *byte == 0));
    table
}

#[test]
fn every_number_of_processors_fits_and_is_listed() {
    // One, many, and with gaps, as with three cores per socket.
    let many: Vec<u8> = (0..254).collect();
    for (apic_ids, ioapic) in [(&[0][..], 1), (&many, 254), (&[0, 1, 2, 4, 5, 6], 7)] {
        let table = find(apic_ids);
        assert_eq!((&table[..4], table[6], sum(&table)), (&b"PCMP"[..], 4, 0));
        assert_eq!(table[36..40], 0xfee0_0000_u32.to_le_bytes());
        let mut entries = &table[44..];
        let (mut count, mut processors, mut pins, mut locals) = (0, Vec::new(), Vec::new(), vec![]);
        while let Some(kind) = entries.first() {
            let (entry, rest) = entries.split_at(if *kind == 0 { 20 } else { 8 });
            match kind {
                0 => processors.push((entry[1], entry[3])),
                1 => assert_eq!(entry, b"\x01\0ISA   "),
                2 => {
                    assert_eq!((entry[1], entry[3]), (ioapic, 1), "an id that no processor has");
                    assert_eq!(entry[4..], 0xfec0_0000_u32.to_le_bytes());
                }
                3 => pins.push((entry[1], entry[5], entry[6], entry[7])),
                4 => locals.push((entry[1], entry[6], entry[7])),
                other => panic!("entry of type {other}"),
            }
            entries = rest;
            count += 1;
        }
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), count);
        let expected: Vec<_> =
            apic_ids.iter().map(|id| (*id, if *id == 0 { 3 } else { 1 })).collect();
        assert_eq!(processors, expected);
        assert_eq!(pins, (0..24).map(|pin| (0, pin, ioapic, pin)).collect::<Vec<_>>());
        assert_eq!(locals, [(3, 0xff, 0), (1, 0xff, 1)]);
    }
}
