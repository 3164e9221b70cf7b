//! The worker of a virtio device, and what happens to the device when its I/O thread fails.
//!
//! | the I/O thread | the device |
//! |---|---|
//! | refuses the worker at DRIVER_OK | is not activated, and takes the worker's resources back |
//! | refuses it after a pause or a change | keeps it parked, can be saved; `resume` tries again |
//! | does not return it for a pause or a change | has lost it; it cannot be saved until reset |
//! | does not return it for a reset | has lost it and its resources: activation may then fail |
//!
//! The driver sees DEVICE_NEEDS_RESET and a configuration interrupt in each case but the last,
//! which is a reset already. The guest is not stopped because of it.
use std::{io, sync::Arc};

use super::{ActivateError, Interrupt};
use crate::worker::{IoThread, Lost, Worker, WorkerControl, WorkerSlot};

/// Where the worker of a virtio device is, and how the driver is notified when it fails.
pub(crate) struct VirtioWorker<W> {
    slot: WorkerSlot<W>,
    /// From DRIVER_OK to reset.
    interrupt: Option<Interrupt>,
}

impl<W> Default for VirtioWorker<W> {
    fn default() -> Self {
        Self { slot: WorkerSlot::Empty, interrupt: None }
    }
}

impl<W: Worker> VirtioWorker<W> {
    /// DRIVER_OK: let `worker` run on `thread`. The driver is notified of later failures by
    /// `interrupt`.
    ///
    /// # Errors
    /// When the thread refuses it. The transport then resets the device, so that
    /// [`VirtioWorker::stop`] returns the worker.
    pub fn start(
        &mut self,
        worker: W,
        interrupt: Interrupt,
        thread: Arc<dyn IoThread>,
    ) -> Result<(), ActivateError> {
        self.interrupt = Some(interrupt);
        let started = self.slot.start(worker, thread);
        started.map_err(|source| ActivateError::Host { what: "start the device's worker", source })
    }

    /// The driver resets the device: return the worker, with nothing in flight. It may hold what
    /// the next one needs. `None` when there is none, or it is lost.
    pub fn stop(&mut self) -> Option<Box<W>> {
        self.interrupt = None;
        self.slot.stop().unwrap_or_else(|lost| {
            log::error!("{lost}");
            None
        })
    }

    /// The worker of a paused device whose driver is ready.
    ///
    /// # Errors
    /// When it is lost.
    pub fn parked(&self) -> Result<Option<&W>, Lost> {
        self.slot.parked()
    }

    /// As [`VirtioWorker::parked`], to be changed. Its descriptors must stay the same.
    pub fn parked_mut(&mut self) -> Option<&mut W> {
        self.slot.parked_mut()
    }

    /// Change the worker and its descriptors, wherever it is. `None` when there is no worker.
    ///
    /// # Errors
    /// As [`WorkerSlot::change`].
    pub fn change<T>(&mut self, change: impl FnOnce(&mut W) -> T) -> io::Result<Option<T>> {
        let changed = self.slot.change(change);
        self.or_notify(changed)
    }

    /// `result`; on an error the driver has been notified.
    fn or_notify<T, E>(&self, result: Result<T, E>) -> Result<T, E> {
        if let (Err(_), Some(interrupt)) = (&result, &self.interrupt) {
            interrupt.needs_reset();
        }
        result
    }
}

impl<W: Worker> WorkerControl for VirtioWorker<W> {
    fn park(&mut self) -> Result<(), Lost> {
        let parked = self.slot.park();
        self.or_notify(parked)
    }

    fn unpark(&mut self) -> io::Result<()> {
        let unparked = self.slot.unpark();
        self.or_notify(unparked)
    }
}
