//! The part common to all virtio transports (virtio 1.3, sections 2.1 and 3.1): device status,
//! negotiation, activation and reset. How the driver accesses it is up to the transport.
//!
//! What the driver has written and cannot read back (queue addresses, selectors, feature bits) is
//! kept here in raw form and checked once, when the driver sets DRIVER_OK.
//!
//! ```text
//!            ACKNOWLEDGE     DRIVER       FEATURES_OK        DRIVER_OK
//!   0 (reset) ------> 1 -------> 3 ----------> 11 -------------> 15   queues checked, activated
//!   ^                        features       queue registers       |   or NEEDS_RESET is set
//!   +-------- writing 0, from anywhere: worker stopped first -----+
//! ```
//! A write that is not valid in the current state is ignored.
mod driver;
mod queue;
mod saved;

use std::{io, sync::Arc};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::queue::QueueFault;
pub(super) use self::{
    driver::{Driver, Half, QueueField},
    queue::QueueConfig,
    saved::CoreState,
};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_VERSION_1, Interrupt, VirtioDevice,
    interrupt::DEVICE_NEEDS_RESET,
};
use crate::{Memory, log_limit::log_seldom, worker::IoThread};

pub(super) const ACKNOWLEDGE: u32 = 1;
pub(super) const DRIVER: u32 = 2;
pub(super) const DRIVER_OK: u32 = 4;
pub(super) const FEATURES_OK: u32 = 8;
pub(super) const FAILED: u32 = 0x80;

/// A device and its driver.
pub(super) struct TransportCore<D: ?Sized> {
    device: Box<D>,
    memory: Memory,
    interrupt: Interrupt,
    thread: Arc<dyn IoThread>,
    notifiers: Arc<[EventFd]>,
    pub(super) driver: Driver,
    config_len: usize,
    active: bool,
    /// The configuration's generation when the driver began to read it. Unknown after a restore.
    generation_seen: Option<u32>,
    /// The activation came from a saved state: an interrupt may have been lost in the meantime.
    interrupt_owed: bool,
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

impl<D: VirtioDevice + ?Sized> TransportCore<D> {
    /// A transport for `device`, whose worker will run on `thread` and interrupt the driver by
    /// `interrupt`. Shows the device's configuration.
    ///
    /// # Errors
    /// When the process has no descriptors left for the queues' notifications.
    pub fn new(
        device: Box<D>,
        memory: Memory,
        interrupt: Interrupt,
        thread: Arc<dyn IoThread>,
    ) -> io::Result<Self> {
        let queues = device.queue_sizes().len();
        let notifiers = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<Arc<[_]>>>()?;
        let mut core = Self {
            device,
            memory,
            interrupt,
            thread,
            notifiers,
            driver: Driver::new(queues),
            config_len: 0,
            active: false,
            generation_seen: None,
            interrupt_owed: false,
        };
        core.show_config();
        Ok(core)
    }

    /// One eventfd for each queue, signalled by the driver's notifications.
    pub fn notifiers(&self) -> &Arc<[EventFd]> {
        &self.notifiers
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// As [`TransportCore::device`].
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// All feature bits offered.
    pub fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    /// The 32 offered feature bits that the driver has selected.
    pub fn selected_features(&self) -> u32 {
        let offered = self.offered();
        match self.driver.device_features_sel {
            0 => offered as u32,
            1 => (offered >> 32) as u32,
            _ => 0,
        }
    }

    /// Maximum size of the selected queue, 0 if there is none, and whether it is ready.
    pub fn selected_queue(&self) -> (u16, bool) {
        let selected = self.driver.selected();
        let max = self.device.queue_sizes().get(selected).copied().unwrap_or(0);
        (max, self.driver.queues.get(selected).is_some_and(|q| q.ready))
    }

    /// The driver selects 32 of the offered feature bits.
    pub fn select_device_features(&mut self, word: u32) {
        self.driver.device_features_sel = word;
    }

    /// The driver selects 32 of its own feature bits.
    pub fn select_driver_features(&mut self, word: u32) {
        self.driver.driver_features_sel = word;
    }

    /// The driver selects a queue.
    pub fn select_queue(&mut self, queue: u32) {
        self.driver.queue_sel = queue;
    }

    /// The driver accepts features of the selected word.
    pub fn write_features(&mut self, value: u32) {
        // Section 3.1.1: between DRIVER and FEATURES_OK.
        if self.interrupt.status() & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            return;
        }
        let features = &mut self.driver.features;
        match self.driver.driver_features_sel {
            0 => Half::Low.set(features, value),
            1 => Half::High.set(features, value),
            _ => self.driver.unknown_features |= value != 0,
        }
    }

    /// Whether the selected queue may be configured now. Section 3.1.1: between FEATURES_OK and
    /// DRIVER_OK. Later the worker owns the queues.
    fn configurable(&self) -> bool {
        self.interrupt.status() & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK
    }

    /// The driver sets the size or an address of the selected queue.
    pub fn write_queue(&mut self, field: QueueField, value: u32) {
        let configurable = self.configurable();
        let Some(queue) = self.driver.selected_mut().filter(|q| configurable && !q.ready) else {
            return;
        };
        match field {
            QueueField::Size => queue.size = value,
            QueueField::Descriptors(half) => half.set(&mut queue.descriptors, value),
            QueueField::Driver(half) => half.set(&mut queue.driver, value),
            QueueField::Device(half) => half.set(&mut queue.device, value),
        }
    }

    /// The driver enables the selected queue, or disables it.
    pub fn write_queue_ready(&mut self, ready: bool) {
        if self.active && !ready {
            return self.end_selected();
        }
        let configurable = self.configurable();
        if let Some(queue) = self.driver.selected_mut().filter(|_| configurable) {
            queue.ready = ready;
        }
    }

    /// The driver disables a queue while the device runs (section 4.2.2.2): it owns the queue again
    /// when QueueReady reads 0. A single queue cannot be stopped here.
    fn end_selected(&mut self) {
        let Some(queue) = self.driver.selected_mut().filter(|q| q.ready) else { return };
        queue.ready = false;
        self.device.reset();
        self.active = false;
        self.interrupt.needs_reset();
    }

    /// A notification that no ioeventfd handled.
    pub fn notify(&self, queue: u32) {
        let index = usize::try_from(queue).unwrap_or(usize::MAX);
        let ready = self.driver.queues.get(index).is_some_and(|q| q.ready);
        if let Some(notifier) = self.notifiers.get(index)
            && self.active
            && ready
        {
            // A saturated counter means that the worker has been notified already.
            let _ = notifier.write(1);
        }
    }

    /// The driver writes a non-zero device status (writing 0 is a reset).
    pub fn write_status(&mut self, value: u32) {
        let shown = self.interrupt.status();
        let mut now = shown & !DEVICE_NEEDS_RESET;
        if now & FAILED != 0 || now & !value != 0 {
            return;
        }
        if value & FAILED != 0 {
            return self.interrupt.set_status(FAILED);
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
                self.generation_seen = Some(self.interrupt.generation());
            }
            if bit == DRIVER_OK {
                return self.driver_ok();
            }
            self.interrupt.set_status(bit);
        }
    }

    fn features_acceptable(&self) -> bool {
        !self.driver.unknown_features
            && self.driver.features & !self.offered() == 0
            && self.driver.features & F_VERSION_1 != 0
    }

    fn driver_ok(&mut self) {
        let changed = self.generation_seen != Some(self.interrupt.generation());
        self.interrupt.driver_ok(DRIVER_OK);
        if let Err(refused) = self.activate(self.thread.clone()) {
            log_seldom!(
                warn,
                "{}: the driver's configuration was rejected: \
                               {refused}",
                self.device.id()
            );
            // This returns what a worker that was not started holds.
            self.device.reset();
            return self.interrupt.needs_reset();
        }
        // The initial configuration may depend on the features.
        self.show_config();
        if changed {
            // The driver could not be notified while it was reading it.
            self.interrupt.config_changed();
        }
    }

    fn activate(&mut self, thread: Arc<dyn IoThread>) -> Result<(), Refused> {
        let event_idx = self.driver.features & F_EVENT_IDX != 0;
        let sizes = self.device.queue_sizes();
        let mut queues = Vec::with_capacity(sizes.len());
        let each = self.driver.queues.iter().zip(sizes).zip(&*self.notifiers).zip(0u16..);
        for (((config, max), notifier), index) in each {
            if config.ready {
                let queue = config
                    .check(*max, event_idx, &self.memory)
                    .map_err(|fault| Refused::Queue(index, fault))?;
                queues.push(ActiveQueue { index, queue, notify: notifier.try_clone()? });
            }
        }
        self.device.activate(Activation {
            queues,
            features: self.driver.features,
            memory: self.memory.clone(),
            interrupt: self.interrupt.clone(),
            thread,
        })?;
        self.active = true;
        Ok(())
    }

    /// Show the device's configuration space. False when it has not changed.
    fn show_config(&mut self) -> bool {
        let config = self.device.config();
        let changed = self.interrupt.show_config(&config, self.config_len);
        self.config_len = config.len();
        changed
    }

    /// The host has changed the device's configuration: show it, and notify the driver if it has
    /// changed visibly.
    pub fn config_updated(&mut self) {
        // Section 2.1.2: no notification before DRIVER_OK; the driver reads everything again then.
        if self.show_config() && self.interrupt.status() & DRIVER_OK != 0 {
            self.interrupt.config_changed();
        }
    }

    /// The driver writes the configuration space.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        let inside = offset.checked_add(data.len()).is_some_and(|end| end <= self.config_len);
        let driven = self.interrupt.status() & (DRIVER | FAILED) == DRIVER;
        if inside && (driven || self.device.configurable_always()) {
            self.device.write_config(offset as u64, data);
            self.show_config();
        }
    }

    /// Let the workers run again.
    pub fn resume(&mut self) {
        self.device.resume();
        if std::mem::take(&mut self.interrupt_owed) {
            self.interrupt.raise_all();
        }
    }

    /// The first step of a reset: clear everything but the device status. The transport then
    /// updates what depends on selectors, and [`TransportCore::end_reset`] makes the reset visible
    /// to the driver.
    pub fn begin_reset(&mut self) {
        // The worker first: afterwards no other thread updates registers or reads the notifiers.
        self.device.reset();
        self.active = false;
        self.interrupt_owed = false;
        for notifier in &*self.notifiers {
            // An error means that it was not signalled.
            let _ = notifier.read();
        }
        self.driver = Driver::new(self.notifiers.len());
        self.interrupt.store_causes(0);
        self.show_config();
    }

    /// The last step of a reset: a driver that reads status 0 knows that the reset is complete.
    pub fn end_reset(&self) {
        self.interrupt.store_status(0);
    }
}
