//! Flat images, and files that are not kernels.
use std::path::Path;

use config::BootConfig;

use super::super::tests::{MIB, PLATFORM, chain, config, file, memory, read, refusal};
use crate::arch::layout;
use crate::boot::{self, Protocol};

#[test]
fn a_flat_image_lies_at_16_mib_and_is_entered_at_its_start() {
    let kernel = file(b"\x66\xba\xf8\x03\xb0\x41\xee\xf4");
    let memory = memory(64 * MIB);
    let entry = boot::load(&memory, &config(&kernel), &PLATFORM).unwrap();
    assert_eq!((entry.protocol, entry.registers.rip), (Protocol::Linux64, layout::FLAT_KERNEL));
    assert_eq!(read(&memory, layout::FLAT_KERNEL, 8), b"\x66\xba\xf8\x03\xb0\x41\xee\xf4");
}

#[test]
fn a_flat_image_that_begins_with_the_pvh_entry_is_entered_so() {
    let kernel = file(b"\xfc\x8b\x03\x8d\x63\x04\xe8\0\0\0\0");
    let entry = boot::load(&memory(64 * MIB), &config(&kernel), &PLATFORM).unwrap();
    assert_eq!((entry.protocol, entry.registers.rip), (Protocol::Pvh, layout::FLAT_KERNEL));
}

#[test]
fn what_is_not_a_kernel_is_named() {
    let at = |offset: usize, mark: &[u8], fill: u8| {
        let mut bytes = vec![fill; 8192];
        bytes[offset..offset + mark.len()].copy_from_slice(mark);
        bytes
    };
    let cases: [(&str, Vec<u8>); 17] = [
        ("it is an empty file; a kernel is an x86-64 ELF vmlinux", vec![]),
        ("it is a file of 1 byte;", vec![0xf4]),
        ("it is a file of 7 bytes;", vec![0x90; 7]),
        ("it is a text file;", b"Hello, this is not a kernel.\n".to_vec()),
        ("it is a text file;", "Gr\u{fc}\u{df}e ".repeat(1000).into_bytes()),
        ("it is a script;", b"#!/bin/sh\nexit 0\n".to_vec()),
        ("it is a gzip file;", at(0, b"\x1f\x8b\x08", 0x90)),
        ("unpack it with `unzstd`", at(0, b"\x28\xb5\x2f\xfd", 0x90)),
        ("it is an xz file;", at(0, b"\xfd7zXZ\0", 0x90)),
        ("it is an aarch64 kernel Image;", at(0x38, b"ARM\x64", 0x90)),
        ("it is a RISC-V kernel Image;", at(0x38, b"RSC\x05", 0x90)),
        ("it is an EFI program without a Linux boot header;", at(0, b"MZ", 0x90)),
        ("it is a cpio archive;", at(0, b"070701", 0x90)),
        ("it is an ext2/3/4 file system;", at(0x438, b"\x53\xef", 0)),
        ("it is a disk image;", at(510, b"\x55\xaa", 0)),
        ("it is a qcow2 disk image;", at(0, b"QFI\xfb", 0)),
        ("it is a file that begins with zeros;", vec![0; 8192]),
    ];
    for (what, bytes) in cases {
        let text = refusal(&bytes);
        assert!(text.contains(what), "{what:?} not in {text:?}");
        assert!(text.starts_with("cannot boot the kernel /"), "{text}");
    }
    // Two bytes that happen to occur in code are not a signature.
    let kernel = file(&at(510, b"\x55\xaa", 0x90));
    assert!(boot::load(&memory(64 * MIB), &config(&kernel), &PLATFORM).is_ok());
}

#[test]
fn a_flat_image_that_is_bigger_than_ram_is_refused() {
    let kernel = file(&[0x90; 4096]);
    let text = chain(&boot::load(&memory(16 * MIB), &config(&kernel), &PLATFORM).unwrap_err());
    assert!(text.contains("the flat image needs 0x1000000 to 0x1001000"), "{text}");
    assert!(text.contains("is 0x100000 to 0x1000000: give the machine more memory (-m)"), "{text}");
}

#[test]
fn only_regular_files_are_read() {
    let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let fifo = directory.as_path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    let cases = [
        (fifo.to_str().unwrap(), "it is a FIFO, not a regular file"),
        ("/nonexistent", "it cannot be opened: No such file or directory"),
        ("/", "it is a directory, not a regular file"),
        ("/dev/zero", "it is a character device or socket"),
    ];
    for (path, what) in cases {
        let config =
            BootConfig { kernel: Path::new(path).to_owned(), initrd: None, cmdline: String::new() };
        let text = chain(&boot::load(&memory(16 * MIB), &config, &PLATFORM).unwrap_err());
        assert!(text.contains(what), "{what:?} not in {text:?}");
    }
}
