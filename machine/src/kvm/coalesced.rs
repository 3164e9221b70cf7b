//! Writes that KVM keeps in a ring instead of leaving the guest for each ("coalesced" MMIO and
//! PIO).
//!
//! An exit to user space costs the guest tens of microseconds, and for some registers it only
//! stores a value: an index, an address, half of a mask. Nothing that the guest could observe
//! depends on such a write until it accesses another register, and that access exits. So the writes
//! are applied, in order, by the next vCPU that leaves KVM_RUN, before its own access. A vCPU that
//! is kicked also applies them before it parks, so a paused machine has none pending.
//!
//! The ring belongs to the virtual machine; every vCPU's descriptor maps it.
use std::{io, mem::offset_of, os::fd::AsRawFd, sync::atomic::Ordering};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};

use super::shared_page::{PAGE, SharedPage};

const FIRST: usize = offset_of!(kvm_coalesced_mmio_ring, first);
const LAST: usize = offset_of!(kvm_coalesced_mmio_ring, last);
const ENTRIES: usize = size_of::<kvm_coalesced_mmio_ring>();
const ENTRY: usize = size_of::<kvm_coalesced_mmio>();
/// Entries of the ring (`KVM_COALESCED_MMIO_MAX`, linux/kvm.h). KVM leaves one of them free, and
/// lets the guest exit when the ring is full.
const COUNT: u32 = ((PAGE - ENTRIES) / ENTRY) as u32;

/// A write that was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// Port, or guest physical address.
    pub at: u64,
    /// `at` is a port.
    pub pio: bool,
    data: [u8; 8],
    len: usize,
}

impl Write {
    /// The bytes written, eight at most.
    pub fn data(&self) -> &[u8] {
        self.data.get(..self.len).unwrap_or(&self.data)
    }
}

/// The ring, as one vCPU maps it.
pub struct Ring(SharedPage);

impl Ring {
    /// Map the ring of the virtual machine that `vcpu` belongs to.
    ///
    /// # Errors
    /// When KVM has none, or the host refuses the mapping.
    pub fn map(vcpu: &impl AsRawFd) -> io::Result<Self> {
        SharedPage::map(vcpu, KVM_COALESCED_MMIO_PAGE_OFFSET).map(Self)
    }

    /// Whether all writes have been applied.
    pub fn is_empty(&self) -> bool {
        let first = self.0.word(FIRST).load(Ordering::Acquire);
        first == self.0.word(LAST).load(Ordering::Acquire)
    }

    /// Apply, in order, the writes that are pending now. Only one thread of the machine may do so
    /// at a time. A write leaves the ring only once it has been applied, so [`Ring::is_empty`] is
    /// false until then.
    pub fn drain(&self, mut apply: impl FnMut(&Write)) {
        // Not those that other vCPUs add meanwhile: they might never stop adding.
        let last = self.0.word(LAST).load(Ordering::Acquire) % COUNT;
        let mut first = self.0.word(FIRST).load(Ordering::Acquire) % COUNT;
        while first != last {
            apply(&self.entry(first));
            first = (first + 1) % COUNT;
            self.0.word(FIRST).store(first, Ordering::Release);
        }
    }

    fn entry(&self, index: u32) -> Write {
        let base = ENTRIES + index as usize * ENTRY;
        let word = |offset| self.0.word(base + offset).load(Ordering::Relaxed);
        let double = |offset| u64::from(word(offset)) | u64::from(word(offset + 4)) << 32;
        Write {
            at: double(offset_of!(kvm_coalesced_mmio, phys_addr)),
            pio: word(offset_of!(kvm_coalesced_mmio, __bindgen_anon_1)) != 0,
            data: double(offset_of!(kvm_coalesced_mmio, data)).to_le_bytes(),
            len: word(offset_of!(kvm_coalesced_mmio, len)) as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt};

    use super::*;

    /// Puts a write of `len` bytes into a ring that is a file, as KVM does.
    fn put(file: &File, index: u32, at: u64, pio: bool, len: u32) {
        let pages = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE as u64;
        let mut entry = at.to_le_bytes().to_vec();
        entry.extend(len.to_le_bytes());
        entry.extend(u32::from(pio).to_le_bytes());
        entry.extend([1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(entry.len(), ENTRY);
        file.write_all_at(&entry, pages + ENTRIES as u64 + u64::from(index) * 24).unwrap();
        let last = (index + 1) % COUNT;
        file.write_all_at(&last.to_le_bytes(), pages + LAST as u64).unwrap();
    }

    #[test]
    fn writes_leave_the_ring_in_order_and_around_its_end() {
        assert_eq!(COUNT, 170);
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET + 1) * PAGE as u64).unwrap();
        let ring = Ring::map(&file).unwrap();
        assert!(ring.is_empty());
        ring.drain(|write| panic!("{write:?}"));
        for round in 0..300 {
            let index = round * 2 % COUNT;
            put(&file, index, 0xf_0000_0020, false, 4);
            put(&file, (index + 1) % COUNT, 0x70, true, 1);
            let mut seen = Vec::new();
            ring.drain(|write| {
                assert!(!ring.is_empty(), "a write that is being applied is still in the ring");
                seen.push((write.at, write.pio, write.data().to_vec()));
            });
            assert_eq!(
                seen,
                [(0xf_0000_0020, false, vec![1, 2, 3, 4]), (0x70, true, vec![1])],
                "round {round}"
            );
            assert!(ring.is_empty());
        }
    }

    #[test]
    fn a_length_beyond_the_data_is_cut() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET + 1) * PAGE as u64).unwrap();
        let ring = Ring::map(&file).unwrap();
        put(&file, 0, 1, true, u32::MAX);
        ring.drain(|write| assert_eq!(write.data(), [1, 2, 3, 4, 5, 6, 7, 8]));
    }
}
