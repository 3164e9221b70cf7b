//! A kernel file, an initrd and a command line.
use std::io::Write;

use config::{BootConfig, places::VirtioSlot};
use machine::Memory;
use machine::boot::{BootError, Entry, Platform, load};
use vm_memory::GuestAddress;
use vmm_sys_util::tempfile::TempFile;

/// Loaded, or refused with a named error.
pub fn entry(input: &[u8]) {
    if let Some(Err(error)) = load_all(input) {
        assert!(!error.to_string().is_empty());
    }
}

/// The first byte chooses what accompanies the kernel, which is the rest.
pub fn load_all(input: &[u8]) -> Option<Result<Entry, BootError>> {
    let (with, kernel) = input.split_first()?;
    let file = TempFile::new().unwrap();
    file.as_file().write_all(kernel).unwrap();
    let tail = kernel.get(kernel.len().saturating_sub(usize::from(*with))..).unwrap_or_default();
    let boot = BootConfig {
        kernel: file.as_path().to_owned(),
        initrd: (with & 1 != 0).then(|| file.as_path().to_owned()),
        cmdline: if with & 2 != 0 { String::from_utf8_lossy(tail).into() } else { "quiet".into() },
    };
    let slots = [VirtioSlot { address: 0xf010_0000, irq: 5 }];
    let vmgenid = (with & 4 != 0).then_some(GuestAddress(0x8000));
    let platform = Platform { cpu_ids: &[0, 1], slots: &slots, serial: true, vmgenid };
    let memory = Memory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    Some(load(&memory, &boot, &platform))
}
