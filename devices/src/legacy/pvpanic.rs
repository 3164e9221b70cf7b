//! pvpanic: one port on which a guest kernel reports that it has crashed.

use crate::{
    PowerEvent, PowerSink,
    bus::BusDevice,
    model::Model,
    state::{Snapshot, StateError},
    worker::WorkerControl,
};
use ::state::device as saved;

const PANICKED: u8 = 1;
/// The guest handles its crash itself (kdump): nothing to do here.
const CRASH_LOADED: u8 = 2;

/// The port.
pub struct Pvpanic {
    id: String,
    sink: PowerSink,
}

impl Pvpanic {
    /// A port that reports a panic to `sink`.
    pub fn new(id: impl Into<String>, sink: PowerSink) -> Self {
        Self { id: id.into(), sink }
    }
}

impl BusDevice for Pvpanic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            *byte = if port == 0 { PANICKED | CRASH_LOADED } else { 0xff };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data.first().is_some_and(|events| events & PANICKED != 0) {
            (self.sink)(PowerEvent::Panicked);
        }
    }
}

impl Model for Pvpanic {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        None
    }

    fn reset(&mut self) {}
}

impl Snapshot for Pvpanic {
    type State = saved::Pvpanic;

    fn save(&self) -> Result<saved::Pvpanic, StateError> {
        Ok(saved::Pvpanic {})
    }

    fn restore(&mut self, _: saved::Pvpanic) -> Result<(), StateError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;
    use crate::Device;

    #[test]
    fn tells_of_a_panic_and_nothing_else() {
        let panics = Arc::new(AtomicU32::new(0));
        let counter = panics.clone();
        let mut port = Pvpanic::new(
            "pvpanic",
            Arc::new(move |event| {
                assert_eq!(event, PowerEvent::Panicked);
                counter.fetch_add(1, Ordering::Relaxed);
            }),
        );
        let mut bytes = [0; 2];
        port.read(0, &mut bytes);
        assert_eq!(bytes, [3, 0xff]);
        for (offset, data) in [(0, &[][..]), (0, &[2]), (0, &[0, 1]), (1, &[1])] {
            port.write(offset, data);
        }
        assert_eq!(panics.load(Ordering::Relaxed), 0);
        port.write(0, &[1]);
        port.write(0, &[0xff, 0, 0, 0]);
        assert_eq!(panics.load(Ordering::Relaxed), 2);
        let section = Device::save(&port).unwrap();
        Device::restore(&mut port, &section).unwrap();
    }
}
