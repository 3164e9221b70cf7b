//! A distribution's kernel in the three formats that a monitor boots, and its modules in load
//! order.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, Object, ObjectSection, elf};
use ruzstd::decoding::StreamingDecoder;

/// Magic number of the LZ4 "legacy" frame, the format of the payload of Debian's kernels.
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
/// Magic number of a Zstandard frame, the format of Ubuntu's.
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// Largest block of an LZ4 legacy frame.
const LZ4_BLOCK: usize = 8 << 20;
/// No kernel here is larger.
const KERNEL_MAX: usize = 256 << 20;

/// The ELF `vmlinux` inside a bzImage (Linux, Documentation/arch/x86/boot.rst, `payload_offset`).
///
/// # Errors
/// Not a bzImage, or its payload is neither LZ4 nor Zstandard.
pub fn vmlinux(bzimage: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        bzimage.get(0x202..0x206) == Some(b"HdrS".as_slice()),
        "not a bzImage: no HdrS at 0x202"
    );
    let word = |at: usize| -> Result<usize> {
        let bytes = bzimage.get(at..at + 4).context("a bzImage that ends in its header")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    // Zero setup sectors mean four, for historical reasons.
    let sectors = match bzimage.get(0x1f1) {
        Some(0) | None => 4,
        Some(&sectors) => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    let payload = bzimage.get(start..).and_then(|rest| rest.get(..word(0x24c).ok()?));
    let payload = payload.context("a bzImage whose payload lies outside of it")?;
    let image = if let Some(blocks) = payload.strip_prefix(LZ4_LEGACY) {
        lz4(blocks)?
    } else if payload.starts_with(ZSTD) {
        zstd(payload)?
    } else {
        bail!(
            "a bzImage whose payload is neither LZ4 nor Zstandard: it starts with {:02x?}",
            payload.get(..4)
        );
    };
    ensure!(image.starts_with(&elf::ELFMAG), "the bzImage's payload is not an ELF file");
    Ok(image)
}

/// Each block has its length in front, in four bytes; the kernel's build appends the unpacked size.
fn lz4(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut image = Vec::new();
    while rest.len() > 4 {
        let (length, tail) = rest.split_at(4);
        let length = u32::from_le_bytes(length.try_into()?) as usize;
        let block = tail.get(..length).context("an LZ4 block that ends early")?;
        image.extend(lz4_flex::block::decompress(block, LZ4_BLOCK).context("a broken LZ4 block")?);
        ensure!(image.len() <= KERNEL_MAX, "a kernel of more than {KERNEL_MAX} bytes");
        rest = tail.get(length..).unwrap_or_default();
    }
    Ok(image)
}

/// Unpacks one frame and ignores what follows it.
fn zstd(frame: &[u8]) -> Result<Vec<u8>> {
    let unpacked = StreamingDecoder::new_with_max_window_size(frame, KERNEL_MAX as u64)
        .context("a broken Zstandard frame")?;
    let mut content = Vec::new();
    unpacked.take(KERNEL_MAX as u64 + 1).read_to_end(&mut content)?;
    ensure!(content.len() <= KERNEL_MAX, "more than {KERNEL_MAX} bytes in a Zstandard frame");
    Ok(content)
}

/// The flat image of an ELF kernel, as `objcopy -O binary` makes it: the contents of its loadable
/// segments, from the lowest physical address on.
///
/// # Errors
/// Not a 64-bit ELF file, or one without anything to load.
pub fn flat(vmlinux: &[u8]) -> Result<Vec<u8>> {
    let header = elf::FileHeader64::<Endianness>::parse(vmlinux)?;
    let endian = header.endian()?;
    let segments: Vec<_> = header
        .program_headers(endian, vmlinux)?
        .iter()
        .filter(|segment| segment.p_type(endian) == elf::PT_LOAD && segment.p_filesz(endian) > 0)
        .collect();
    let base = segments
        .iter()
        .map(|segment| segment.p_paddr(endian))
        .min()
        .context("an ELF file without loadable segments")?;
    let mut image = Vec::new();
    for segment in segments {
        let Ok(data) = segment.data(endian, vmlinux) else {
            bail!("a segment that lies outside of its file")
        };
        let start = usize::try_from(segment.p_paddr(endian) - base)?;
        let end = start.checked_add(data.len()).filter(|end| *end <= KERNEL_MAX);
        let end = end.context("segments too far apart for a flat image")?;
        if image.len() < end {
            image.resize(end, 0);
        }
        image
            .get_mut(start..end)
            .context("segments too far apart for a flat image")?
            .copy_from_slice(data);
    }
    Ok(image)
}

/// [`flat`] for monitors that enter an image at its beginning. If the kernel's 64-bit entry lies
/// elsewhere, a jump to it overwrites the beginning, which then holds another entry's code (Xen's,
/// for PVH).
///
/// # Errors
/// As with [`flat`], or the entry lies outside of the image.
pub fn flat_entered_at_start(vmlinux: &[u8]) -> Result<Vec<u8>> {
    const JUMP: usize = 5;
    let mut image = flat(vmlinux)?;
    let header = elf::FileHeader64::<Endianness>::parse(vmlinux)?;
    let endian = header.endian()?;
    let loads = header.program_headers(endian, vmlinux)?.iter();
    let loads = loads.filter(|segment| segment.p_type(endian) == elf::PT_LOAD);
    let base = loads.map(|segment| segment.p_paddr(endian)).min().unwrap_or_default();
    let entry = header.e_entry(endian).checked_sub(base);
    let entry = entry.filter(|&entry| entry < image.len() as u64).context("an entry outside")?;
    if entry > 0 {
        let distance = i32::try_from(entry)? - i32::try_from(JUMP)?;
        let start = image.get_mut(..JUMP).context("an image shorter than a jump")?;
        start.copy_from_slice(&[&[0xe9][..], &distance.to_le_bytes()].concat());
    }
    Ok(image)
}

/// One kernel module, unpacked.
pub struct Module {
    /// Its name with `.ko`.
    pub file: String,
    /// What the kernel loads.
    pub content: Vec<u8>,
}

/// The modules `names` and their dependencies in load order, without those that are built into the
/// kernel.
///
/// # Errors
/// A module is missing or is not an ELF file.
pub fn modules(dir: &Path, names: &[&str]) -> Result<Vec<Module>> {
    let mut there = There { files: BTreeMap::new(), builtin: BTreeSet::new() };
    there.find(dir)?;
    let mut order = Vec::new();
    for name in names {
        load(name, &there, &mut order)?;
    }
    Ok(order)
}

/// All modules in the directory.
struct There {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl There {
    fn find(&mut self, dir: &Path) -> Result<()> {
        for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() {
                self.find(&path)?;
            } else if name == "modules.builtin" {
                let paths = fs::read_to_string(&path)?;
                self.builtin.extend(paths.lines().filter_map(module_name));
            } else if let Some(name) = module_name(name) {
                self.files.insert(name, path);
            }
        }
        Ok(())
    }
}

/// The module in a file, `kernel/drivers/NAME.ko` or `NAME.ko.xz`.
fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    Some(plain(file.split_once(".ko")?.0))
}

/// In module names `-` and `_` are equivalent.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

fn load(name: &str, there: &There, order: &mut Vec<Module>) -> Result<()> {
    let name = plain(name);
    let file = format!("{name}.ko");
    if there.builtin.contains(&name) || order.iter().any(|module| module.file == file) {
        return Ok(());
    }
    let path =
        there.files.get(&name).with_context(|| format!("the kernel has no module {name}"))?;
    let mut content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    match path.extension().and_then(|ext| ext.to_str()) {
        Some("xz") => {
            let mut plain = Vec::new();
            lzma_rs::xz_decompress(&mut content.as_slice(), &mut plain)
                .map_err(|error| anyhow::anyhow!("cannot unpack {}: {error}", path.display()))?;
            content = plain;
        }
        Some("zst") => {
            content =
                zstd(&content).with_context(|| format!("cannot unpack {}", path.display()))?;
        }
        _ => {}
    }
    for needed in depends(&content).with_context(|| {
        format!(
            "{} is not a \
                                                             module",
            path.display()
        )
    })? {
        load(&needed, there, order)?;
    }
    order.push(Module { file, content });
    Ok(())
}

/// `depends=` in a module's `.modinfo`, a list of strings that end in NUL.
fn depends(module: &[u8]) -> Result<Vec<String>> {
    let file = ElfFile64::<Endianness>::parse(module)?;
    let section = file.section_by_name(".modinfo").context("no .modinfo")?;
    let info = String::from_utf8_lossy(section.data()?).into_owned();
    let depends = info.split('\0').find_map(|entry| entry.strip_prefix("depends="));
    let names = depends.unwrap_or_default().split(',').filter(|name| !name.is_empty());
    Ok(names.map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kernel_is_told_so() {
        assert!(vmlinux(b"").is_err());
        assert!(vmlinux(&[0; 4096]).is_err());
        assert!(flat(b"\x7fELF").is_err());
    }

    /// A bzImage with that payload and the size that the kernel's build appends to it.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
        [&image[..], payload, &[0; 4]].concat()
    }

    #[test]
    fn a_payload_is_lz4_or_zstandard() {
        let kernel = [&elf::ELFMAG[..], &[7; 5000]].concat();
        let block = lz4_flex::block::compress(&kernel);
        let lz4 = [LZ4_LEGACY, &(block.len() as u32).to_le_bytes(), &block].concat();
        assert_eq!(vmlinux(&bzimage(&lz4)).unwrap(), kernel);
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let zstd = ruzstd::encoding::compress_to_vec(kernel.as_slice(), level);
        assert_eq!(vmlinux(&bzimage(&zstd)).unwrap(), kernel);
        let error = vmlinux(&bzimage(b"BZh91AY")).unwrap_err().to_string();
        assert!(error.contains("neither LZ4 nor Zstandard"), "{error}");
    }

    #[test]
    fn what_is_part_of_the_kernel_is_no_module() {
        let dir = std::env::temp_dir().join(format!("modules.{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("modules.builtin"), "kernel/drivers/virtio/virtio-mmio.ko\n").unwrap();
        let found = modules(&dir, &["virtio_mmio"]);
        let missing = modules(&dir, &["tun"]).err();
        fs::remove_dir_all(dir).unwrap();
        assert!(found.unwrap().is_empty());
        assert_eq!(missing.unwrap().to_string(), "the kernel has no module tun");
    }

    #[test]
    fn a_payload_outside_of_its_bzimage_is_refused() {
        let mut image = vec![0; 4096];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x250].fill(0xff);
        assert!(vmlinux(&image).is_err());
    }
}
