//! Maps address ranges to devices. Ranges are fixed once the machine is built, so a lookup takes no
//! lock.
use std::sync::Arc;

use parking_lot::Mutex;

/// Registers, as the guest accesses them.
pub trait BusDevice: Send {
    /// Guest read at `offset` from the start of the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Guest write at `offset` from the start of the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// One occupied range.
struct Slot {
    start: u64,
    end: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Why a range could not be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Zero length, or past the end of the address space.
    #[error("invalid range {start:#x}+{len:#x}")]
    #[expect(missing_docs, reason = "shown by the message")]
    InvalidRange { start: u64, len: u64 },
    /// The range overlaps one that is attached already.
    #[error("range {start:#x}+{len:#x} overlaps a device already on the bus")]
    #[expect(missing_docs, reason = "shown by the message")]
    Overlap { start: u64, len: u64 },
}

/// A bus under construction.
#[derive(Default)]
pub struct BusBuilder(Vec<Slot>);

impl BusBuilder {
    /// Put `device` at `start..start+len`.
    pub fn attach(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|n| start.checked_add(n));
        let end = last.ok_or(BusError::InvalidRange { start, len })?;
        let at = self.0.partition_point(|s| s.end < start);
        if self.0.get(at).is_some_and(|s| s.start <= end) {
            return Err(BusError::Overlap { start, len });
        }
        self.0.insert(at, Slot { start, end, device });
        Ok(())
    }

    /// End construction; the result is shared between vCPU threads.
    pub fn freeze(self) -> Arc<Bus> {
        Arc::new(Bus(self.0.into_boxed_slice()))
    }
}

/// A finished bus.
pub struct Bus(Box<[Slot]>);

impl Bus {
    /// Dispatch a guest read; false when no device is at `addr`.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        self.find(addr).map(|s| s.device.lock().read(addr - s.start, data)).is_some()
    }

    /// Dispatch a guest write; false when no device is at `addr`.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.find(addr).map(|s| s.device.lock().write(addr - s.start, data)).is_some()
    }

    fn find(&self, addr: u64) -> Option<&Slot> {
        let at = self.0.partition_point(|s| s.end < addr);
        self.0.get(at).filter(|s| s.start <= addr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);
    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&mut self, offset: u64, _: &[u8]) {
            self.0 = offset;
        }
    }

    #[test]
    fn finds_the_device_and_rejects_overlap() {
        let mut b = BusBuilder::default();
        let dev = || Arc::new(Mutex::new(Echo(0)));
        b.attach(0x100, 0x10, dev()).unwrap();
        b.attach(0x80, 0x10, dev()).unwrap();
        assert_eq!(b.attach(0x10f, 1, dev()), Err(BusError::Overlap { start: 0x10f, len: 1 }));
        assert!(matches!(b.attach(u64::MAX, 2, dev()), Err(BusError::InvalidRange { .. })));
        let bus = b.freeze();
        let mut d = [0];
        assert!(bus.read(0x10f, &mut d) && d[0] == 0xf);
        assert!(!bus.read(0x110, &mut d));
    }
}
