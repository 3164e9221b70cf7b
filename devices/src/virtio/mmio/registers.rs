//! The register page: a device's virtio-mmio registers as guest-readable memory. Reading a register
//! of virtio-mmio (virtio 1.3, section 4.2.2) has no side effects, so the page holds the registers'
//! values, and the guest reads them without leaving guest mode: the machine maps the pages of all
//! slots as one read-only memory slot, and only writes exit. Interrupts are edge-triggered and not
//! shared, so InterruptStatus bit 0 (used buffer) stays set while the device lives; an
//! acknowledgement of that bit alone changes nothing and can be swallowed in the kernel. So
//! interrupt handling needs no exit to user space at all.
use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use vm_memory::{MmapRegion, VolatileMemory};

/// Bytes of one device's register page.
pub const PAGE: usize = 4096;
/// Offset of InterruptStatus.
pub const INTERRUPT_STATUS: usize = 0x60;
/// Offset of Status.
pub const STATUS: usize = 0x70;
/// Offset of ConfigGeneration.
pub const CONFIG_GENERATION: usize = 0xfc;
/// Offset of the device-specific configuration space.
pub const CONFIG: usize = 0x100;

/// One device's page in a window that several devices share.
#[derive(Clone, Debug)]
pub struct Registers {
    window: Arc<MmapRegion>,
    base: usize,
}

impl Registers {
    /// Page `slot` of `window`; `None` when the window is too small.
    pub fn new(window: Arc<MmapRegion>, slot: usize) -> Option<Self> {
        let base = slot.checked_mul(PAGE)?;
        let end = base.checked_add(PAGE)?;
        (end <= window.size()).then_some(Self { window, base })
    }

    /// The register at `offset`, a multiple of 4 below [`PAGE`]; anything else reads as zero.
    pub fn load(&self, offset: usize) -> u32 {
        self.with(offset, |r| r.load(Ordering::Acquire)).unwrap_or(0)
    }

    /// The byte at `offset`; zero from [`PAGE`] on.
    pub fn byte(&self, offset: usize) -> u8 {
        let word = self.load(offset & !3).to_le_bytes();
        word.get(offset & 3).copied().unwrap_or(0)
    }

    /// Make `value` visible to the guest at `offset`, a multiple of 4 below [`PAGE`].
    pub fn store(&self, offset: usize, value: u32) {
        self.with(offset, |r| r.store(value, Ordering::Release));
    }

    /// Set bits, visible to the guest and to other threads at once.
    pub fn set(&self, offset: usize, bits: u32) {
        self.with(offset, |r| r.fetch_or(bits, Ordering::AcqRel));
    }

    /// Clear bits.
    pub fn clear(&self, offset: usize, bits: u32) {
        self.with(offset, |r| r.fetch_and(!bits, Ordering::AcqRel));
    }

    /// Add one, wrapping.
    pub fn bump(&self, offset: usize) {
        self.with(offset, |r| r.fetch_add(1, Ordering::AcqRel));
    }

    /// Show `config` as the device-specific configuration space, which has `shown` bytes so far. A
    /// driver that reads it meanwhile finds that the generation has changed (section 4.2.2.1),
    /// unless its whole read falls between the two steps: it reads memory, so it cannot be delayed.
    /// If the driver is ready, it is interrupted afterwards, and reads again. False when `config`
    /// has not changed.
    pub(crate) fn show_config(&self, config: &[u8], shown: usize) -> bool {
        let same = |(n, byte): (usize, &u8)| self.byte(CONFIG + n) == *byte;
        if config.len() == shown && config.iter().enumerate().all(same) {
            return false;
        }
        let mut words = config.chunks(4).map(|bytes| {
            let mut word = [0; 4];
            word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            u32::from_le_bytes(word)
        });
        self.bump(CONFIG_GENERATION);
        for offset in (CONFIG..CONFIG + config.len().max(shown)).step_by(4) {
            self.store(offset, words.next().unwrap_or(0));
        }
        self.bump(CONFIG_GENERATION);
        true
    }

    fn with<T>(&self, offset: usize, f: impl FnOnce(&AtomicU32) -> T) -> Option<T> {
        if offset >= PAGE {
            return None;
        }
        let at = self.base.checked_add(offset)?;
        self.window.get_atomic_ref::<AtomicU32>(at).ok().map(f)
    }
}
