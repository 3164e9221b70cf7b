//! The saved state of a transport, whatever its registers: what the driver has written, and the
//! device's own section.
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;

use super::{ACKNOWLEDGE, DRIVER, DRIVER_OK, Driver, FAILED, FEATURES_OK, TransportCore};
use crate::{
    state::{Section, StateError},
    virtio::{
        F_VERSION_1, VirtioDevice,
        interrupt::{DEVICE_NEEDS_RESET, INT_CONFIG, INT_USED},
    },
    worker::{IoThread, Refused, Worker},
};

/// The whole state. Untrusted when it comes from a save.
pub(in crate::virtio) struct CoreState {
    /// Type number of the device.
    pub device_type: u32,
    /// The device status.
    pub status: u32,
    /// [`INT_USED`] and [`INT_CONFIG`].
    pub causes: u32,
    /// Generation of the configuration space.
    pub generation: u32,
    /// All feature bits offered.
    pub offered: u64,
    /// What the driver has written.
    pub driver: Driver,
    /// The device has been activated.
    pub active: bool,
    /// The device's own part.
    pub device: Section,
}

impl<D: VirtioDevice + ?Sized> TransportCore<D> {
    /// Return the state of a paused device.
    ///
    /// # Errors
    /// When the device cannot be saved.
    pub fn save(&self) -> Result<CoreState, StateError> {
        Ok(CoreState {
            device_type: self.device.device_type(),
            status: self.interrupt.status(),
            causes: self.interrupt.causes(),
            generation: self.interrupt.generation(),
            offered: self.offered(),
            driver: self.driver.clone(),
            active: self.active,
            device: self.device.save()?,
        })
    }

    /// Apply a state. The transport then updates what depends on selectors.
    ///
    /// # Errors
    /// When the state is invalid for the device. The caller then resets the transport, which may be
    /// partly restored.
    pub fn restore(&mut self, state: CoreState) -> Result<(), StateError> {
        self.check(&state)?;
        self.device.offer(state.offered & !F_VERSION_1)?;
        self.begin_reset();
        self.end_reset();
        self.driver = state.driver;
        if state.active {
            self.interrupt.store_status(state.status);
            self.interrupt.store_causes(state.causes);
            let held = Arc::new(HoldingThread::new(self.thread.clone()));
            let activated = self.activate(held.clone());
            self.device.pause();
            held.open();
            activated.map_err(|refused| {
                log::error!("{}: {refused}", self.device.id());
                StateError::Invalid("virtio queues that the device cannot be activated with")
            })?;
            self.interrupt_owed = true;
        }
        self.device.restore(&state.device)?;
        self.show_config();
        // After the device, which may have changed any of these while it was activated.
        self.interrupt.store_generation(state.generation);
        self.interrupt.store_causes(state.causes);
        self.interrupt.store_status(state.status);
        Ok(())
    }

    fn check(&self, state: &CoreState) -> Result<(), StateError> {
        let driver_part = state.status & !DEVICE_NEEDS_RESET & !FAILED;
        let steps = [0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
        let mut upto = 0;
        let in_order = steps.iter().any(|step| {
            upto |= step;
            driver_part == upto
        });
        let driver_ok = state.status & DRIVER_OK != 0;
        let negotiated = state.status & FEATURES_OK != 0;
        if state.device_type != self.device.device_type() {
            return Err(StateError::Invalid("another type of virtio device"));
        }
        if state.driver.queues.len() != self.driver.queues.len() {
            return Err(StateError::Invalid("another number of virtio queues"));
        }
        if !in_order || (state.active && !driver_ok) {
            return Err(StateError::Invalid("virtio device status that no driver can reach"));
        }
        if driver_ok && !state.active && state.status & DEVICE_NEEDS_RESET == 0 {
            return Err(StateError::Invalid("virtio device ready but not active"));
        }
        if state.causes & !(INT_USED | INT_CONFIG) != 0
            || (driver_ok && state.causes & INT_USED == 0)
        {
            return Err(StateError::Invalid("virtio interrupt status"));
        }
        let (offered, features) = (state.offered, state.driver.features);
        if offered & F_VERSION_1 == 0 {
            return Err(StateError::Invalid("virtio features without VERSION_1"));
        }
        let acceptable = !state.driver.unknown_features
            && features & !offered == 0
            && features & F_VERSION_1 != 0;
        if negotiated && !acceptable {
            return Err(StateError::Invalid("virtio features that were not offered"));
        }
        Ok(())
    }
}

/// Holds the workers of a device that is being restored, so that none processes its queues before
/// its position in them is restored. Once opened, it forwards to the thread itself.
struct HoldingThread {
    thread: Arc<dyn IoThread>,
    open: AtomicBool,
    workers: Mutex<Vec<Place>>,
}

/// The place of a worker that was adopted while this was closed.
enum Place {
    Here(Box<dyn Worker>),
    LentOut,
    /// On the thread, under this key.
    There(usize),
}

impl HoldingThread {
    fn new(thread: Arc<dyn IoThread>) -> Self {
        Self { thread, open: AtomicBool::new(false), workers: Mutex::default() }
    }

    fn open(&self) {
        self.open.store(true, Ordering::Release);
    }
}

impl IoThread for HoldingThread {
    fn adopt(&self, worker: Box<dyn Worker>) -> Result<usize, Refused> {
        let place = match self.open.load(Ordering::Acquire) {
            true => Place::There(self.thread.adopt(worker)?),
            false => Place::Here(worker),
        };
        let mut workers = self.workers.lock();
        workers.push(place);
        Ok(workers.len() - 1)
    }

    fn lend(&self, key: usize) -> Option<Box<dyn Worker>> {
        let mut workers = self.workers.lock();
        let place = workers.get_mut(key)?;
        if let Place::There(key) = place {
            return self.thread.lend(*key);
        }
        match std::mem::replace(place, Place::LentOut) {
            Place::Here(worker) => Some(worker),
            Place::LentOut | Place::There(_) => None,
        }
    }

    fn take_back(&self, key: usize, worker: Box<dyn Worker>) -> Result<(), Refused> {
        let mut workers = self.workers.lock();
        let Some(place) = workers.get_mut(key) else {
            return Err(Refused::new(worker, std::io::ErrorKind::NotFound));
        };
        *place = match place {
            Place::There(key) => return self.thread.take_back(*key, worker),
            _ if self.open.load(Ordering::Acquire) => Place::There(self.thread.adopt(worker)?),
            _ => Place::Here(worker),
        };
        Ok(())
    }

    fn release(&self, key: usize) -> Option<Box<dyn Worker>> {
        let mut workers = self.workers.lock();
        match std::mem::replace(workers.get_mut(key)?, Place::LentOut) {
            Place::There(key) => self.thread.release(key),
            Place::Here(worker) => Some(worker),
            Place::LentOut => None,
        }
    }
}
