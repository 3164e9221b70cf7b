//! Flat images (`objcopy -O binary vmlinux vmlinux.bin`), and files that are not kernels.
//!
//! A flat image has no signature, so every file with a known signature is named and refused, and
//! the rest is assumed to be code.
use devices::Memory;

use super::{KernelError, Loaded, Protocol, linux};
use crate::arch::layout;
use crate::boot::ram::Ram;
use crate::boot::source::Source;

/// Shorter than any useful code.
const MIN: u64 = 8;

/// First bytes of a kernel of Linux 6.2 or newer with `CONFIG_PVH`: `pvh_start_xen`, which the
/// linker puts before `startup_64` there. `cld`, then loading the boot GDT or saving the word at
/// `ebx`.
const PVH_BEGINNINGS: [&[u8]; 2] = [b"\xfc\x0f\x01\x15", b"\xfc\x8b\x03\x8d\x63\x04\xe8"];

const UNPACK: &str = "; unpack it first";
const NOTHING: &str = "";

/// Signatures: offset and bytes.
const MARKS: &[(usize, &[u8], &str, &str)] = &[
    (0x38, b"ARM\x64", "an aarch64 kernel Image", NOTHING),
    (0x38, b"RSC\x05", "a RISC-V kernel Image", NOTHING),
    (0, b"\x1f\x8b", "a gzip file", "; unpack it with `gunzip`"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", "; unpack it with `unzstd`"),
    (0, b"\xfd7zXZ\0", "an xz file", "; unpack it with `unxz`"),
    (0, b"BZh", "a bzip2 file", "; unpack it with `bunzip2`"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file", "; unpack it with `unlz4`"),
    (0, b"\x02\x21\x4c\x18", "an LZ4 file", "; unpack it with `unlz4`"),
    (0, b"\x89LZO\0", "an LZO file", UNPACK),
    (0, b"\x5d\0\0", "an LZMA file", "; unpack it with `unlzma`"),
    (0, b"PK\x03\x04", "a zip file", UNPACK),
    (0, b"#!", "a script", NOTHING),
    (0, b"070701", "a cpio archive", "; give it as -initrd"),
    (0, b"070702", "a cpio archive", "; give it as -initrd"),
    (0, b"!<arch>\n", "an archive of object files or a Debian package", NOTHING),
    (0, b"\xed\xab\xee\xdb", "an RPM package", NOTHING),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x27\x05\x19\x56", "a U-Boot image", NOTHING),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image", NOTHING),
    (0, b"QFI\xfb", "a qcow2 disk image", "; give it as -drive, in raw form"),
    (0, b"hsqs", "a squashfs image", "; give it as -drive"),
    (0x438, b"\x53\xef", "an ext2/3/4 file system", "; give it as -drive"),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O file", NOTHING),
    (0, b"MZ", "an EFI program without a Linux boot header", NOTHING),
    (510, b"\x55\xaa", "a disk image", "; give it as -drive"),
];

pub(super) fn load(
    memory: &Memory,
    ram: &Ram,
    file: &Source<'_>,
    head: &[u8],
) -> Result<Loaded, KernelError> {
    if let Some((what, hint)) = other(file.len, head) {
        return Err(KernelError::NotAKernel { what, hint });
    }
    let start = layout::FLAT_KERNEL;
    let end = ram.check("the flat image", start, file.len)?;
    file.load(memory, 0, file.len, start)?;
    let pvh = PVH_BEGINNINGS.iter().any(|beginning| head.starts_with(beginning));
    Ok(Loaded {
        protocol: if pvh { Protocol::Pvh } else { Protocol::Linux64 },
        entry: start,
        linux: pvh,
        start,
        end,
        cmdline_max: linux::CMDLINE_MAX,
        initrd_max: linux::INITRD_MAX,
        header: None,
        image: std::iter::once(start..end).collect(),
    })
}

/// The file's type, if it is recognizably not a flat image.
fn other(len: u64, head: &[u8]) -> Option<(String, &'static str)> {
    if len == 0 {
        return Some(("an empty file".into(), NOTHING));
    }
    if len < MIN {
        return Some((format!("a file of {len} byte{}", if len == 1 { "" } else { "s" }), NOTHING));
    }
    // Two bytes far from the beginning may occur in code by chance, but code does not begin with
    // zeros.
    let mark = MARKS.iter().find(|(offset, mark, ..)| {
        head.get(*offset..).is_some_and(|rest| rest.starts_with(mark))
            && (*offset == 0 || mark.len() > 2 || begins_with_zeros(head))
    });
    if let Some((_, _, what, hint)) = mark {
        return Some(((*what).to_owned(), hint));
    }
    if begins_with_zeros(head) {
        return Some(("a file that begins with zeros".into(), NOTHING));
    }
    if is_text(head) {
        return Some(("a text file".into(), NOTHING));
    }
    None
}

fn begins_with_zeros(head: &[u8]) -> bool {
    head.iter().take(16).all(|byte| *byte == 0)
}

/// UTF-8 without control characters; the last character may be incomplete.
fn is_text(head: &[u8]) -> bool {
    let text = match std::str::from_utf8(head) {
        Ok(text) => Some(text),
        Err(error) if error.error_len().is_none() => {
            head.get(..error.valid_up_to()).and_then(|valid| std::str::from_utf8(valid).ok())
        }
        Err(_) => None,
    };
    let allowed = |c: char| !c.is_control() || matches!(c, '\t' | '\n' | '\r');
    text.is_some_and(|text| text.chars().all(allowed))
}

#[cfg(test)]
mod tests;
