//! Recognises image formats other than raw by their first bytes.
use std::{
    fs::File,
    io::{Seek, SeekFrom},
    os::unix::fs::FileExt,
};

/// The first bytes of an image, the name of its format, and `qemu-img`'s name for it.
const FORMATS: [(&[u8], &str, &str); 6] = [
    (b"QFI\xfb", "qcow2", "qcow2"),
    (VHD, "VHD", "vpc"),
    (b"vhdxfile", "VHDX", "vhdx"),
    (b"KDMV", "VMDK", "vmdk"),
    (b"COWD", "VMDK", "vmdk"),
    (b"# Disk DescriptorFile", "VMDK", "vmdk"),
];
const VHD: &[u8] = b"conectix";
/// Bytes of the structure that ends a VHD, and that also begins a dynamic one: a fixed-size VHD has
/// only the one at the end.
const VHD_FOOTER: u64 = 512;

/// The name of the format that `file` seems to have, and `qemu-img`'s name for it, if it is one of
/// those known here. A file that cannot be read has none: its first reader reports the cause.
pub fn other_than_raw(file: &File) -> Option<(&'static str, &'static str)> {
    let begins = |at: u64, magic: &[u8]| {
        let mut found = vec![0; magic.len()];
        file.read_exact_at(&mut found, at).is_ok() && found == magic
    };
    let footer = { file }.seek(SeekFrom::End(0)).ok()?.saturating_sub(VHD_FOOTER);
    let seems = |magic: &[u8]| begins(0, magic) || magic == VHD && begins(footer, magic);
    let found = FORMATS.iter().find(|(magic, ..)| seems(magic));
    found.map(|(_, name, qemu_name)| (*name, *qemu_name))
}
