//! The transport's saved form: what the driver has written, and the device's own section.
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use ::state::{device as saved, hex::Hex};
use parking_lot::Mutex;

use super::{
    ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, Driver, F_VERSION_1, FAILED, FEATURES_OK,
    INT_CONFIG, INT_USED, INTERRUPT_STATUS, STATUS, Transport, queue::QueueRegisters,
};
use crate::{
    Device,
    state::{Section, StateError},
    virtio::registers::CONFIG_GENERATION,
    worker::{IoThread, Refused, Worker},
};

pub(super) fn save(t: &Transport) -> Result<Section, StateError> {
    let queues = t.driver.queues.iter().map(|q| saved::VirtioQueue {
        size: q.size,
        ready: q.ready,
        descriptors: Hex(q.descriptors),
        driver: Hex(q.driver),
        device: Hex(q.device),
    });
    let state = saved::VirtioMmio {
        device_type: t.device.device_type(),
        status: t.status(),
        interrupt_status: t.registers.load(INTERRUPT_STATUS),
        config_generation: t.registers.load(CONFIG_GENERATION),
        device_features_sel: t.driver.device_features_sel,
        driver_features_sel: t.driver.driver_features_sel,
        device_features: Hex(t.offered()),
        driver_features: Hex(t.driver.features),
        unknown_features: t.driver.unknown_features,
        queue_sel: t.driver.queue_sel,
        queues: queues.collect(),
        active: t.active,
        device: t.device.save()?,
    };
    Ok(Section::of(t.device.id(), &state)?)
}

/// The caller resets the transport when this fails half-way.
pub(super) fn restore(t: &mut Transport, section: &Section) -> Result<(), StateError> {
    let state: saved::VirtioMmio = section.read()?;
    check(t, &state)?;
    t.device.offer(state.device_features.0 & !F_VERSION_1)?;
    t.reset();
    t.driver = Driver {
        device_features_sel: state.device_features_sel,
        driver_features_sel: state.driver_features_sel,
        features: state.driver_features.0,
        unknown_features: state.unknown_features,
        queue_sel: state.queue_sel,
        queues: state.queues.into_iter().map(runtime).collect(),
    };
    if state.active {
        t.registers.store(STATUS, state.status);
        t.registers.store(INTERRUPT_STATUS, state.interrupt_status);
        let held = Arc::new(Held::new(t.thread.clone()));
        let activated = t.activate(held.clone());
        t.device.pause();
        held.open();
        activated.map_err(|refused| {
            log::error!("{}: {refused}", t.device.id());
            StateError::Invalid("virtio queues that the device cannot be activated with")
        })?;
        t.interrupt_owed = true;
    }
    t.device.restore(&state.device)?;
    t.show_config();
    t.show_selected();
    // After the device, which may have touched any of them while it was activated.
    t.registers.store(CONFIG_GENERATION, state.config_generation);
    t.registers.store(INTERRUPT_STATUS, state.interrupt_status);
    t.registers.store(STATUS, state.status);
    Ok(())
}

fn check(t: &Transport, state: &saved::VirtioMmio) -> Result<(), StateError> {
    let driver_part = state.status & !DEVICE_NEEDS_RESET & !FAILED;
    let steps = [0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
    let mut upto = 0;
    let in_order = steps.iter().any(|step| {
        upto |= step;
        driver_part == upto
    });
    let driver_ok = state.status & DRIVER_OK != 0;
    let negotiated = state.status & FEATURES_OK != 0;
    if state.device_type != t.device.device_type() {
        return Err(StateError::Invalid("another type of virtio device"));
    }
    if state.queues.len() != t.driver.queues.len() {
        return Err(StateError::Invalid("another number of virtio queues"));
    }
    if !in_order || (state.active && !driver_ok) {
        return Err(StateError::Invalid("virtio device status that no driver can reach"));
    }
    if driver_ok && !state.active && state.status & DEVICE_NEEDS_RESET == 0 {
        return Err(StateError::Invalid("virtio device ready but not active"));
    }
    if state.interrupt_status & !(INT_USED | INT_CONFIG) != 0
        || (driver_ok && state.interrupt_status & INT_USED == 0)
    {
        return Err(StateError::Invalid("virtio interrupt status"));
    }
    let (Hex(offered), Hex(features)) = (state.device_features, state.driver_features);
    if offered & F_VERSION_1 == 0 {
        return Err(StateError::Invalid("virtio features without VERSION_1"));
    }
    let acceptable =
        !state.unknown_features && features & !offered == 0 && features & F_VERSION_1 != 0;
    if negotiated && !acceptable {
        return Err(StateError::Invalid("virtio features that were not offered"));
    }
    Ok(())
}

fn runtime(q: saved::VirtioQueue) -> QueueRegisters {
    let saved::VirtioQueue { size, ready, descriptors, driver, device } = q;
    QueueRegisters { size, ready, descriptors: descriptors.0, driver: driver.0, device: device.0 }
}

/// Holds the workers of a device that is being restored, so that none looks at its queues before
/// it knows where it stood in them. Once open, it is the thread itself.
struct Held {
    thread: Arc<dyn IoThread>,
    open: AtomicBool,
    workers: Mutex<Vec<Place>>,
}

/// Where a worker is that was adopted while this was not open.
enum Place {
    Here(Box<dyn Worker>),
    LentOut,
    /// On the thread, under this key.
    There(usize),
}

impl Held {
    fn new(thread: Arc<dyn IoThread>) -> Self {
        Self { thread, open: AtomicBool::new(false), workers: Mutex::default() }
    }

    fn open(&self) {
        self.open.store(true, Ordering::Release);
    }
}

impl IoThread for Held {
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
