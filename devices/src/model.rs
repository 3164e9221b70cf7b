//! [`Device`], implemented once for devices whose state is one struct and that have at most one
//! worker.
use crate::{
    Device,
    state::{self, Section, Snapshot, StateError},
    worker::WorkerControl,
};

/// What differs between devices, besides their [`Snapshot`].
///
/// As for [`Device`], no method has a default body.
pub trait Model: Snapshot + Send {
    /// See [`Device::id`].
    fn id(&self) -> &str;
    /// Its worker. `None` for a device that acts only when the guest or the monitor accesses it: a
    /// pause changes nothing.
    fn worker(&mut self) -> Option<&mut dyn WorkerControl>;
    /// See [`Device::reset`].
    fn reset(&mut self);
}

/// When an I/O thread fails, the failure is logged and the monitor keeps running. What the guest
/// sees is up to the [`WorkerControl`]: `virtio/worker.rs` has the policy for virtio devices.
impl<D: Model> Device for D {
    fn id(&self) -> &str {
        Model::id(self)
    }

    fn pause(&mut self) {
        if let Some(Err(lost)) = self.worker().map(WorkerControl::park) {
            log::error!("{}: {lost}", Model::id(self));
        }
    }

    fn resume(&mut self) {
        if let Some(Err(e)) = self.worker().map(WorkerControl::unpark) {
            log::error!("{}: the I/O thread does not accept its worker: {e}", Model::id(self));
        }
    }

    fn reset(&mut self) {
        Model::reset(self);
    }

    fn save(&self) -> Result<Section, StateError> {
        state::save(Model::id(self), self)
    }

    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        state::restore(section, self)
    }
}
