//! bzImages, valid and hostile.
use super::super::tests::{MIB, PLATFORM, config, file, memory, read, refusal, zero_page};
use crate::arch::layout;
use crate::boot::{self, Protocol};

const SETUP: usize = 5 * 512;
const CODE_SIZE: usize = 0x8000;

/// A 64-bit bzImage; `setup_sects` 4, code full of 0xf4.
pub(in crate::arch::x86_64::boot) fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0; SETUP];
    bytes.resize(SETUP + CODE_SIZE, 0xf4);
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    put(0x1f1, &[4]);
    put(0x1f4, &((CODE_SIZE / 16) as u32).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x234, &[1, 0, 0x3f, 0]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x248, &0x100_u32.to_le_bytes());
    put(0x24c, &0x1000_u32.to_le_bytes());
    put(0x258, &(16 * MIB).to_le_bytes());
    put(0x260, &(8 * MIB as u32).to_le_bytes());
    bytes
}

pub(in crate::arch::x86_64::boot) fn changed(offset: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = bzimage();
    bytes[offset..offset + value.len()].copy_from_slice(value);
    bytes
}

#[test]
fn a_bzimage_is_loaded_where_it_wants_to_be_and_entered_at_0x200() {
    let kernel = file(&bzimage());
    let memory = memory(64 * MIB);
    let entry = boot::load(&memory, &config(&kernel), &PLATFORM).unwrap();
    assert_eq!((entry.protocol, entry.registers.rip), (Protocol::Linux64, 16 * MIB + 0x200));
    assert_eq!(read(&memory, 16 * MIB, CODE_SIZE), [0xf4; CODE_SIZE]);
    assert_eq!(read(&memory, 16 * MIB + CODE_SIZE as u64, 4096), [0; 4096]);
    // The header is the kernel's own, with the loader's values filled in.
    let params = zero_page(&memory);
    let (version, size, loader) =
        (params.hdr.version, params.hdr.init_size, params.hdr.type_of_loader);
    assert_eq!((version, u64::from(size), loader), (0x20f, 8 * MIB, 0xff));
    let line = params.hdr.cmd_line_ptr;
    assert_eq!(u64::from(line), layout::CMDLINE);
}

#[test]
fn a_bzimage_may_have_odd_but_true_fields() {
    let loads = |bytes: &[u8]| {
        let kernel = file(bytes);
        boot::load(&memory(64 * MIB), &config(&kernel), &PLATFORM).map(|entry| entry.registers.rip)
    };
    // 0 setup sectors mean 4.
    assert_eq!(loads(&changed(0x1f1, &[0])).unwrap(), 16 * MIB + 0x200);
    // All 255 sectors are there.
    let mut long = changed(0x1f1, &[255]);
    long.splice(SETUP..SETUP, vec![0; 251 * 512]);
    assert_eq!(loads(&long).unwrap(), 16 * MIB + 0x200);
    // A signature after the code; the last paragraph incomplete.
    assert!(loads(&[bzimage(), vec![1; 1500]].concat()).is_ok());
    assert!(loads(&bzimage()[..SETUP + CODE_SIZE - 15]).is_ok());
}

#[test]
fn any_byte_of_the_header_may_be_wrong() {
    let memory = memory(32 * MIB);
    for offset in 0x1f1..0x268 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let kernel = file(&changed(offset, &[value]));
            // It is loaded or refused, and never does harm.
            if let Ok(entry) = boot::load(&memory, &config(&kernel), &PLATFORM) {
                assert!((MIB..32 * MIB).contains(&entry.registers.rip), "{offset:#x} {value:#x}");
            }
        }
    }
}

#[test]
fn a_bzimage_with_false_fields_is_refused_and_they_are_named() {
    let says = |kernel: &[u8], what: &str| {
        let text = refusal(kernel);
        assert!(text.contains(what), "{what:?} not in {text:?}");
    };
    says(
        &changed(0x1f1, &[255]),
        "truncated bzImage: the real-mode code ends at byte 131072, the file at 35328",
    );
    says(&changed(0x1f4, &[0xff; 4]), "the protected-mode code ends at byte 68719479280");
    says(
        &bzimage()[..SETUP + CODE_SIZE - 16],
        "the protected-mode code ends at byte 35328, the file at 35312",
    );
    says(&changed(0x1f4, &[0; 4]), "the protected-mode code ends at byte");
    says(&bzimage()[..SETUP], "the protected-mode code ends at byte");
    says(
        &changed(0x1f4, &0x100_u32.to_le_bytes()),
        "the payload ends at byte 4352 of the protected-mode code, which has 4096",
    );
    says(&changed(0x24c, &[0xff; 4]), "damaged bzImage: the payload ends at byte 4294967551");
    says(&changed(0x206, &[5, 2]), "without a 64-bit entry point (boot protocol 2.05)");
    says(&changed(0x206, &[6, 2]), "boot protocol 2.06");
    says(&changed(0x206, &[0, 0]), "boot protocol 0.00");
    says(&changed(0x236, &[0x3e]), "without a 64-bit entry point (boot protocol 2.15)");
    says(&changed(0x211, &[0]), "it is a zImage");
    // The second byte of the jump ends the header before the required fields.
    says(&changed(0x201, &[0x10]), "without a 64-bit entry point");
    says(&bzimage()[..0x210], "truncated bzImage: the setup header");
    says(&changed(0x258, &[0; 8]), "needs 0x0 to 0x800000");
    says(&changed(0x258, &[0xff; 8]), "its init_size at pref_address needs 0xffffffffffffffff");
    says(
        &changed(0x260, &[0xff; 4]),
        "needs 0x1000000 to 0x100ffffff, but the RAM for kernels is 0x100000 to 0x4000000",
    );
}
