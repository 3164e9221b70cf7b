//! The virtio-mmio transport, version 2 (virtio 1.3, section 4.2): registers on top of the core
//! that all transports share (`transport/`).
//!
//! The guest reads registers straight from the page (see [`registers`]), so after every write the
//! page must already hold what a read has to return.
pub mod registers;
mod saved;
#[cfg(test)]
mod tests;

use std::{io, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

use self::registers::{CONFIG, INTERRUPT_STATUS, Registers, STATUS};
use super::{
    Interrupt, VirtioDevice,
    interrupt::INT_CONFIG,
    transport::{Half, QueueField, TransportCore},
};
use crate::{
    Device, Memory,
    bus::BusDevice,
    irq::Line,
    state::{Section, StateError},
    worker::IoThread,
};

const MAGIC: usize = 0x00;
const VERSION: usize = 0x04;
const DEVICE_ID: usize = 0x08;
const VENDOR_ID: usize = 0x0c;
const DEVICE_FEATURES: usize = 0x10;
const DEVICE_FEATURES_SEL: usize = 0x14;
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SEL: usize = 0x24;
const QUEUE_SEL: usize = 0x30;
const QUEUE_SIZE_MAX: usize = 0x34;
const QUEUE_SIZE: usize = 0x38;
const QUEUE_READY: usize = 0x44;
/// Offset of QueueNotify: the driver writes a queue's index.
pub const QUEUE_NOTIFY: usize = 0x50;
/// Offset of InterruptACK. Writing [`INT_USED`](super::interrupt::INT_USED) alone changes nothing.
pub const INTERRUPT_ACK: usize = 0x64;
const QUEUE_DESC_LOW: usize = 0x80;
const QUEUE_DESC_HIGH: usize = 0x84;
const QUEUE_DRIVER_LOW: usize = 0x90;
const QUEUE_DRIVER_HIGH: usize = 0x94;
const QUEUE_DEVICE_LOW: usize = 0xa0;
const QUEUE_DEVICE_HIGH: usize = 0xa4;
/// Registers that only remember what is written: first byte and number of bytes of each group.
/// Until the driver accesses another register, it cannot tell whether the write has been made.
pub const REMEMBERED: [(usize, u32); 3] = [
    (DRIVER_FEATURES, (DRIVER_FEATURES_SEL + 4 - DRIVER_FEATURES) as u32),
    (QUEUE_SIZE, 4),
    (QUEUE_DESC_LOW, (QUEUE_DEVICE_HIGH + 4 - QUEUE_DESC_LOW) as u32),
];
/// SHMLenLow, SHMLenHigh, SHMBaseLow, SHMBaseHigh: all ones where there is no such region.
const SHM: [usize; 4] = [0xb0, 0xb4, 0xb8, 0xbc];

/// "virt" in little-endian, as the driver sees it.
const MAGIC_VALUE: u32 = 0x7472_6976;
const MMIO_VERSION: u32 = 2;
/// No vendor is registered for this field; drivers only check the device id.
const VENDOR: u32 = 0;

/// A virtio device behind a page of virtio-mmio registers. Where the device's type is known, it can
/// be accessed as that type.
pub struct Transport<D: VirtioDevice + ?Sized = dyn VirtioDevice> {
    core: TransportCore<D>,
    registers: Registers,
    line: Line,
}

impl<D: VirtioDevice + ?Sized> Transport<D> {
    /// Attach `device` to `registers`, which are all zero. Its worker will run on `thread` and
    /// interrupt by `line`.
    ///
    /// # Errors
    /// When the process has no descriptors left for the queues' notifications.
    pub fn new(
        device: Box<D>,
        memory: Memory,
        registers: Registers,
        line: Line,
        thread: Arc<dyn IoThread>,
    ) -> io::Result<Self> {
        registers.store(MAGIC, MAGIC_VALUE);
        registers.store(VERSION, MMIO_VERSION);
        registers.store(DEVICE_ID, device.device_type());
        registers.store(VENDOR_ID, VENDOR);
        for offset in SHM {
            registers.store(offset, u32::MAX);
        }
        let interrupt = Interrupt::Line(line.clone(), registers.clone());
        let core = TransportCore::new(device, memory, interrupt, thread)?;
        let transport = Self { core, registers, line };
        transport.show_selected();
        Ok(transport)
    }

    /// One eventfd for each queue, which the machine signals when the driver writes the queue's
    /// index to [`QUEUE_NOTIFY`].
    pub fn notifiers(&self) -> &Arc<[EventFd]> {
        self.core.notifiers()
    }

    /// The interrupt line.
    pub fn line(&self) -> &Line {
        &self.line
    }

    /// The device.
    pub fn device(&self) -> &D {
        self.core.device()
    }

    /// The device, for changes that are not visible to its driver.
    pub fn device_mut(&mut self) -> &mut D {
        self.core.device_mut()
    }

    /// Change the device's configuration (hot-plug, resize, link) and notify its driver if it has
    /// changed visibly.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut D) -> R) -> R {
        let result = change(self.core.device_mut());
        self.show_selected();
        self.core.config_updated();
        result
    }

    fn write_register(&mut self, offset: usize, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => {
                self.core.select_device_features(value);
                self.show_selected();
            }
            DRIVER_FEATURES_SEL => self.core.select_driver_features(value),
            DRIVER_FEATURES => self.core.write_features(value),
            QUEUE_SEL => {
                self.core.select_queue(value);
                self.show_selected();
            }
            QUEUE_SIZE => self.core.write_queue(QueueField::Size, value),
            QUEUE_READY => {
                self.core.write_queue_ready(value & 1 != 0);
                self.show_selected();
            }
            QUEUE_NOTIFY => self.core.notify(value),
            INTERRUPT_ACK => self.registers.clear(INTERRUPT_STATUS, value & INT_CONFIG),
            STATUS if value == 0 => self.reset(),
            STATUS => self.core.write_status(value),
            QUEUE_DESC_LOW => self.core.write_queue(QueueField::Descriptors(Half::Low), value),
            QUEUE_DESC_HIGH => self.core.write_queue(QueueField::Descriptors(Half::High), value),
            QUEUE_DRIVER_LOW => self.core.write_queue(QueueField::Driver(Half::Low), value),
            QUEUE_DRIVER_HIGH => self.core.write_queue(QueueField::Driver(Half::High), value),
            QUEUE_DEVICE_LOW => self.core.write_queue(QueueField::Device(Half::Low), value),
            QUEUE_DEVICE_HIGH => self.core.write_queue(QueueField::Device(Half::High), value),
            _ => {}
        }
    }

    /// Show the words that depend on a selector.
    fn show_selected(&self) {
        self.registers.store(DEVICE_FEATURES, self.core.selected_features());
        let (max, ready) = self.core.selected_queue();
        self.registers.store(QUEUE_SIZE_MAX, max.into());
        self.registers.store(QUEUE_READY, ready.into());
    }
}

impl<D: VirtioDevice + ?Sized> BusDevice for Transport<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = self.registers.byte(start.saturating_add(n));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(in_config) = offset.checked_sub(CONFIG) {
            self.core.write_config(in_config, data);
        } else if let Ok(word) = data.try_into()
            && offset % 4 == 0
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

impl<D: VirtioDevice + ?Sized> Device for Transport<D> {
    fn id(&self) -> &str {
        self.core.device().id()
    }

    fn pause(&mut self) {
        self.core.device_mut().pause();
    }

    fn resume(&mut self) {
        self.core.resume();
    }

    fn reset(&mut self) {
        self.core.begin_reset();
        self.show_selected();
        self.core.end_reset();
    }

    fn save(&self) -> Result<Section, StateError> {
        saved::save(self)
    }

    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        let result = saved::restore(self, section);
        if result.is_err() {
            self.reset();
        }
        result
    }
}
