//! The virtio-mmio transport, version 2 (virtio 1.3, section 4.2).
//!
//! The guest reads registers straight from the page (see [`super::registers`]), so every write
//! leaves the page showing what a read has to return. What the driver has written and cannot read
//! back (queue addresses, selectors, feature bits) is kept here in raw form and checked once, when
//! the driver says DRIVER_OK.
//!
//! ```text
//!            ACKNOWLEDGE     DRIVER       FEATURES_OK        DRIVER_OK
//!   0 (reset) ------> 1 -------> 3 ----------> 11 -------------> 15   queues checked, activated
//!   ^                        features       queue registers       |   or NEEDS_RESET is set
//!   +-------- writing 0, from anywhere: worker stopped first -----+
//! ```
//!
//! A write that does not fit the picture is ignored.
mod queue;
mod saved;
#[cfg(test)]
mod tests;

use std::{any::Any, io, sync::Arc};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::queue::{QueueFault, QueueRegisters};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_VERSION_1, Interrupt, VirtioDevice,
    registers::{
        CONFIG, CONFIG_GENERATION, DEVICE_NEEDS_RESET, INT_CONFIG, INT_USED, INTERRUPT_STATUS,
        PAGE, Registers, STATUS,
    },
};
use crate::{
    Device, Memory,
    bus::BusDevice,
    irq::Line,
    log_limit::log_seldom,
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
/// Offset of InterruptACK. Writing [`INT_USED`] alone changes nothing.
pub const INTERRUPT_ACK: usize = 0x64;
const QUEUE_DESC_LOW: usize = 0x80;
const QUEUE_DESC_HIGH: usize = 0x84;
const QUEUE_DRIVER_LOW: usize = 0x90;
const QUEUE_DRIVER_HIGH: usize = 0x94;
const QUEUE_DEVICE_LOW: usize = 0xa0;
const QUEUE_DEVICE_HIGH: usize = 0xa4;
/// SHMLenLow, SHMLenHigh, SHMBaseLow, SHMBaseHigh: all ones where there is no such region.
const SHM: [usize; 4] = [0xb0, 0xb4, 0xb8, 0xbc];

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const FAILED: u32 = 0x80;

/// "virt", as the driver sees it.
const MAGIC_VALUE: u32 = 0x7472_6976;
const MMIO_VERSION: u32 = 2;
/// No vendor is registered for this field; drivers look at the device id only.
const VENDOR: u32 = 0;

/// A virtio device behind a page of virtio-mmio registers.
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    registers: Registers,
    line: Line,
    thread: Arc<dyn IoThread>,
    notifiers: Vec<EventFd>,
    driver: Driver,
    config_len: usize,
    active: bool,
    /// The configuration's generation when the driver began to look at it. Unknown after a restore.
    generation_seen: Option<u32>,
    /// The activation came from a saved state: an interrupt may have been lost on the way.
    interrupt_owed: bool,
}

/// What the driver has written since the last reset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Driver {
    device_features_sel: u32,
    driver_features_sel: u32,
    features: u64,
    /// A bit above 63 was set: there is none that could have been offered.
    unknown_features: bool,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

impl Driver {
    fn new(queues: usize) -> Self {
        Self { queues: vec![QueueRegisters::default(); queues], ..Self::default() }
    }
}

/// Why DRIVER_OK led to NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("queue {0}: {1}")]
    Queue(u16, QueueFault),
    #[error(transparent)]
    Device(#[from] ActivateError),
    #[error("cannot duplicate a notification descriptor")]
    Notifier(#[from] io::Error),
}

impl Transport {
    /// Put `device` behind `registers`. Its worker will run on `thread` and interrupt by `line`.
    ///
    /// # Errors
    /// When the process has no descriptors left for the queues' notifications.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        registers: Registers,
        line: Line,
        thread: Arc<dyn IoThread>,
    ) -> io::Result<Self> {
        let queues = device.queue_sizes().len();
        let notifiers = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<Vec<_>>>()?;
        for offset in (0..PAGE).step_by(4) {
            registers.store(offset, 0);
        }
        registers.store(MAGIC, MAGIC_VALUE);
        registers.store(VERSION, MMIO_VERSION);
        registers.store(DEVICE_ID, device.device_type());
        registers.store(VENDOR_ID, VENDOR);
        for offset in SHM {
            registers.store(offset, u32::MAX);
        }
        let mut transport = Self {
            device,
            memory,
            registers,
            line,
            thread,
            notifiers,
            driver: Driver::new(queues),
            config_len: 0,
            active: false,
            generation_seen: None,
            interrupt_owed: false,
        };
        transport.show_config();
        transport.show_selected();
        Ok(transport)
    }

    /// One eventfd for each queue, for the machine to signal when the driver writes the queue's
    /// index to [`QUEUE_NOTIFY`].
    pub fn notifiers(&self) -> &[EventFd] {
        &self.notifiers
    }

    /// The interrupt line.
    pub fn line(&self) -> &Line {
        &self.line
    }

    /// The device, if it is a `T`. Use [`Transport::update`] to change what its driver can see.
    pub fn device<T: VirtioDevice>(&mut self) -> Option<&mut T> {
        (self.device.as_mut() as &mut dyn Any).downcast_mut()
    }

    /// Change the device's configuration (hot-plug, resize, link) and tell its driver if there is
    /// something to see. `None` when the device is not a `T`.
    pub fn update<T: VirtioDevice, R>(&mut self, change: impl FnOnce(&mut T) -> R) -> Option<R> {
        let result = change(self.device::<T>()?);
        let changed = self.show_config();
        self.show_selected();
        // Section 2.1.2: no notification before DRIVER_OK; the driver reads everything afresh.
        if changed && self.status() & DRIVER_OK != 0 {
            self.interrupt().config();
        }
        Some(result)
    }

    fn interrupt(&self) -> Interrupt {
        Interrupt::new(self.line.clone(), self.registers.clone())
    }

    fn status(&self) -> u32 {
        self.registers.load(STATUS)
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    fn write_register(&mut self, offset: usize, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => {
                self.driver.device_features_sel = value;
                self.show_selected();
            }
            DRIVER_FEATURES_SEL => self.driver.driver_features_sel = value,
            DRIVER_FEATURES => self.write_features(value),
            QUEUE_SEL => {
                self.driver.queue_sel = value;
                self.show_selected();
            }
            QUEUE_NOTIFY => self.notify(value),
            INTERRUPT_ACK => self.registers.clear(INTERRUPT_STATUS, value & INT_CONFIG),
            STATUS => self.write_status(value),
            _ => self.write_queue(offset, value),
        }
    }

    fn write_features(&mut self, value: u32) {
        // Section 3.1.1: between DRIVER and FEATURES_OK.
        if self.status() & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            return;
        }
        let features = &mut self.driver.features;
        match self.driver.driver_features_sel {
            0 => set_half(features, Half::Low, value),
            1 => set_half(features, Half::High, value),
            _ => self.driver.unknown_features |= value != 0,
        }
    }

    fn write_queue(&mut self, offset: usize, value: u32) {
        if self.active && offset == QUEUE_READY && value & 1 == 0 {
            return self.end_selected();
        }
        // Section 3.1.1: between FEATURES_OK and DRIVER_OK. Later the worker owns the queues.
        if self.status() & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return;
        }
        let selected = usize::try_from(self.driver.queue_sel).unwrap_or(usize::MAX);
        let Some(queue) = self.driver.queues.get_mut(selected) else { return };
        if offset == QUEUE_READY {
            queue.ready = value & 1 != 0;
            return self.show_selected();
        }
        if queue.ready {
            return;
        }
        match offset {
            QUEUE_SIZE => queue.size = value,
            QUEUE_DESC_LOW => set_half(&mut queue.descriptors, Half::Low, value),
            QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, Half::High, value),
            QUEUE_DRIVER_LOW => set_half(&mut queue.driver, Half::Low, value),
            QUEUE_DRIVER_HIGH => set_half(&mut queue.driver, Half::High, value),
            QUEUE_DEVICE_LOW => set_half(&mut queue.device, Half::Low, value),
            QUEUE_DEVICE_HIGH => set_half(&mut queue.device, Half::High, value),
            _ => {}
        }
    }

    /// The driver takes a queue back while the device works (section 4.2.2.2): it is its own again
    /// when QueueReady reads 0. One queue cannot end alone here.
    fn end_selected(&mut self) {
        let selected = usize::try_from(self.driver.queue_sel).unwrap_or(usize::MAX);
        let Some(queue) = self.driver.queues.get_mut(selected).filter(|q| q.ready) else { return };
        queue.ready = false;
        self.device.reset();
        self.active = false;
        self.show_selected();
        self.interrupt().needs_reset();
    }

    /// A notification that no ioeventfd took.
    fn notify(&self, queue: u32) {
        let index = usize::try_from(queue).unwrap_or(usize::MAX);
        let ready = self.driver.queues.get(index).is_some_and(|q| q.ready);
        if let Some(notifier) = self.notifiers.get(index)
            && self.active
            && ready
        {
            // A saturated counter means that the worker has been told already.
            let _ = notifier.write(1);
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let shown = self.status();
        let mut now = shown & !DEVICE_NEEDS_RESET;
        if now & FAILED != 0 || now & !value != 0 {
            return;
        }
        if value & FAILED != 0 {
            return self.registers.set(STATUS, FAILED);
        }
        for (bit, after) in [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, DRIVER),
            (DRIVER_OK, FEATURES_OK),
        ] {
            if value & bit == 0 || now & bit != 0 {
                continue;
            }
            let refused = match bit {
                FEATURES_OK => !self.features_acceptable(),
                DRIVER_OK => shown & DEVICE_NEEDS_RESET != 0,
                _ => false,
            };
            if now & after != after || refused {
                return;
            }
            now |= bit;
            if bit == DRIVER {
                self.generation_seen = Some(self.registers.load(CONFIG_GENERATION));
            }
            if bit == DRIVER_OK {
                return self.driver_ok();
            }
            self.registers.set(STATUS, bit);
        }
    }

    fn features_acceptable(&self) -> bool {
        !self.driver.unknown_features
            && self.driver.features & !self.offered() == 0
            && self.driver.features & F_VERSION_1 != 0
    }

    fn driver_ok(&mut self) {
        let changed = self.generation_seen != Some(self.registers.load(CONFIG_GENERATION));
        // Both stand before the worker starts: it may interrupt at once.
        self.registers.set(INTERRUPT_STATUS, INT_USED);
        self.registers.set(STATUS, DRIVER_OK);
        if let Err(refused) = self.activate(self.thread.clone()) {
            log_seldom!(warn, "{}: driver's set-up refused: {refused}", self.device.id());
            // It gets back what a worker holds that was not started.
            self.device.reset();
            return self.interrupt().needs_reset();
        }
        // What it begins with may depend on the features.
        self.show_config();
        if changed {
            // Nobody could be told while the driver was reading it.
            self.interrupt().config();
        }
    }

    fn activate(&mut self, thread: Arc<dyn IoThread>) -> Result<(), Refused> {
        let event_idx = self.driver.features & F_EVENT_IDX != 0;
        let sizes = self.device.queue_sizes();
        let mut queues = Vec::with_capacity(sizes.len());
        let each = self.driver.queues.iter().zip(sizes).zip(&self.notifiers).zip(0u16..);
        for (((registers, max), notifier), index) in each {
            if registers.ready {
                let queue = registers
                    .check(*max, event_idx, &self.memory)
                    .map_err(|fault| Refused::Queue(index, fault))?;
                queues.push(ActiveQueue { index, queue, notify: notifier.try_clone()? });
            }
        }
        self.device.activate(Activation {
            queues,
            features: self.driver.features,
            memory: self.memory.clone(),
            interrupt: self.interrupt(),
            thread,
        })?;
        self.active = true;
        Ok(())
    }

    /// Show the words that depend on a selector.
    fn show_selected(&self) {
        let offered = self.offered();
        let word = match self.driver.device_features_sel {
            0 => offered as u32,
            1 => (offered >> 32) as u32,
            _ => 0,
        };
        self.registers.store(DEVICE_FEATURES, word);
        let selected = usize::try_from(self.driver.queue_sel).unwrap_or(usize::MAX);
        let max = self.device.queue_sizes().get(selected).copied().unwrap_or(0);
        let ready = self.driver.queues.get(selected).is_some_and(|q| q.ready);
        self.registers.store(QUEUE_SIZE_MAX, max.into());
        self.registers.store(QUEUE_READY, ready.into());
    }

    /// Show the device's configuration space. A driver that reads it meanwhile finds that the
    /// generation has changed (section 4.2.2.1), unless it begins and ends between the two steps:
    /// it reads memory, so nothing can hold it up. If it is ready it is interrupted afterwards, and
    /// reads again. False when there is nothing new to show.
    fn show_config(&mut self) -> bool {
        let config = self.device.config();
        let len = config.len().min(PAGE - CONFIG);
        let shown = |(n, byte): (usize, &u8)| self.registers.byte(CONFIG + n) == *byte;
        if len == self.config_len && config.iter().take(len).enumerate().all(shown) {
            return false;
        }
        let mut words = config.chunks(4).map(|bytes| {
            let mut word = [0; 4];
            word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            u32::from_le_bytes(word)
        });
        self.registers.bump(CONFIG_GENERATION);
        for offset in (CONFIG..CONFIG + len.max(self.config_len)).step_by(4) {
            self.registers.store(offset, words.next().unwrap_or(0));
        }
        self.registers.bump(CONFIG_GENERATION);
        self.config_len = len;
        true
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let inside = offset.checked_add(data.len()).is_some_and(|end| end <= self.config_len);
        let driven = self.status() & (DRIVER | FAILED) == DRIVER;
        if inside && (driven || self.device.configurable_always()) {
            self.device.write_config(offset as u64, data);
            self.show_config();
        }
    }
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = self.registers.byte(start.saturating_add(n));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(in_config) = offset.checked_sub(CONFIG) {
            self.write_config(in_config, data);
        } else if let Ok(word) = data.try_into()
            && offset % 4 == 0
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

impl Device for Transport {
    fn id(&self) -> &str {
        self.device.id()
    }

    fn pause(&mut self) {
        self.device.pause();
    }

    fn resume(&mut self) {
        self.device.resume();
        if std::mem::take(&mut self.interrupt_owed) {
            self.line.trigger();
        }
    }

    fn reset(&mut self) {
        // The worker first: afterwards nobody else writes to the page or reads the notifiers.
        self.device.reset();
        self.active = false;
        self.interrupt_owed = false;
        for notifier in &self.notifiers {
            // Empty already: nothing to forget.
            let _ = notifier.read();
        }
        self.driver = Driver::new(self.notifiers.len());
        self.registers.store(INTERRUPT_STATUS, 0);
        self.show_config();
        self.show_selected();
        self.registers.store(STATUS, 0);
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

#[derive(Clone, Copy)]
enum Half {
    Low,
    High,
}

fn set_half(whole: &mut u64, half: Half, value: u32) {
    let value = u64::from(value);
    *whole = match half {
        Half::Low => *whole & !0xffff_ffff | value,
        Half::High => *whole & 0xffff_ffff | value << 32,
    };
}
