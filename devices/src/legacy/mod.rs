//! The few devices of a PC that are still spoken to by port.
pub mod cmos;
pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod serial;

use crate::{
    Device,
    state::{self, Section, Snapshot, StateError},
};

/// A device in which nothing happens without the guest or the monitor: a pause changes nothing.
pub trait Passive: Snapshot + Send {
    /// See [`Device::id`].
    fn id(&self) -> &str;
    /// See [`Device::reset`].
    fn reset(&mut self);
}

impl<D: Passive> Device for D {
    fn id(&self) -> &str {
        Passive::id(self)
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn reset(&mut self) {
        Passive::reset(self);
    }

    fn save(&self) -> Result<Section, StateError> {
        state::save(Passive::id(self), self)
    }

    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        state::restore(section, self)
    }
}
