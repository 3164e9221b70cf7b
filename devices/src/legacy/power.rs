//! The ACPI power block of a hardware-reduced machine: four ports of one byte.
//!
//! | port | read | write |
//! |---|---|---|
//! | +0 sleep control (ACPI 6.5, 4.8.3.7) | 0 | SLP_EN with type S5: power off |
//! | +1 sleep status | 0 | ignored |
//! | +2 reset register | 0 | 1: reset |
//! | +3 GED events, cleared by reading | bit 0: power button, bit 1: new generation id | ignored |
//!
//! GED is the ACPI generic event device.

use crate::{
    PowerEvent, PowerSink,
    bus::BusDevice,
    irq::Line,
    model::Model,
    state::{Snapshot, StateError},
    worker::WorkerControl,
};
use ::state::device as saved;

/// Number of ports in the block.
pub const PORTS: u64 = 4;

const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = 1;
const RESET: u64 = 2;
const EVENTS: u64 = 3;

/// SLP_EN, and SLP_TYP of 5 in bits 2 to 4.
const SLEEP_S5: u8 = 1 << 5 | 5 << 2;
const SLEEP_MASK: u8 = 1 << 5 | 7 << 2;
const RESET_VALUE: u8 = 1;
const POWER_BUTTON: u8 = 1;
const GENERATION: u8 = 1 << 1;

/// The power block.
pub struct Power {
    id: String,
    line: Line,
    sink: PowerSink,
    events: u8,
}

impl Power {
    /// A block that raises `line` for its events and reports the guest's requests to `sink`.
    pub fn new(id: impl Into<String>, line: Line, sink: PowerSink) -> Self {
        Self { id: id.into(), line, sink, events: 0 }
    }

    /// Press the power button. The effect is up to the guest.
    pub fn press_power_button(&mut self) {
        self.happened(POWER_BUTTON);
    }

    /// Signal that the machine's generation id has changed.
    pub fn generation_changed(&mut self) {
        self.happened(GENERATION);
    }

    fn happened(&mut self, event: u8) {
        self.events |= event;
        self.line.trigger();
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            *byte = match port {
                EVENTS => std::mem::take(&mut self.events),
                SLEEP_CONTROL | SLEEP_STATUS | RESET => 0,
                _ => 0xff,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            match (port, *byte) {
                (SLEEP_CONTROL, value) if value & SLEEP_MASK == SLEEP_S5 => {
                    (self.sink)(PowerEvent::Shutdown);
                }
                (RESET, RESET_VALUE) => (self.sink)(PowerEvent::Reset),
                _ => {}
            }
        }
    }
}

impl Model for Power {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        None
    }

    fn reset(&mut self) {
        self.events = 0;
    }
}

impl Snapshot for Power {
    type State = saved::Power;

    fn save(&self) -> Result<saved::Power, StateError> {
        Ok(saved::Power { events: self.events })
    }

    fn restore(&mut self, state: saved::Power) -> Result<(), StateError> {
        if state.events & !(POWER_BUTTON | GENERATION) != 0 {
            return Err(StateError::Invalid("power event that does not exist"));
        }
        self.events = state.events;
        if self.events != 0 {
            self.line.trigger();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;
    use crate::Device;

    fn block() -> (Power, Arc<Mutex<Vec<PowerEvent>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let sink: PowerSink = Arc::new(move |event| log.lock().push(event));
        (Power::new("power", Line::new().unwrap(), sink), seen)
    }

    #[test]
    fn only_the_right_values_reset_and_power_off() {
        let (mut power, seen) = block();
        for port in 0..6 {
            for value in 0..=255u8 {
                power.write(port, &[value]);
                let expected = match (port, value) {
                    (0, _) if value & 0x3c == 0x34 => Some(PowerEvent::Shutdown),
                    (2, 1) => Some(PowerEvent::Reset),
                    _ => None,
                };
                assert_eq!(seen.lock().pop(), expected, "port {port}, {value:#x}");
            }
        }
    }

    #[test]
    fn events_are_seen_once_and_move() {
        let (mut power, _) = block();
        let mut all = [0xff; 4];
        power.press_power_button();
        assert!(power.line.eventfd().read().is_ok());
        power.generation_changed();
        assert!(power.line.eventfd().read().is_ok());
        let section = Device::save(&power).unwrap();
        power.read(0, &mut all);
        assert_eq!(all, [0, 0, 0, 3]);
        power.read(0, &mut all);
        assert_eq!(all, [0; 4]);

        let (mut to, _) = block();
        Device::restore(&mut to, &section).unwrap();
        assert!(to.line.eventfd().read().is_ok());
        assert_eq!(Device::save(&to).unwrap(), section);
        assert!(Snapshot::restore(&mut to, saved::Power { events: 4 }).is_err());
        Device::reset(&mut to);
        to.read(3, &mut all);
        assert_eq!(all, [0, 0xff, 0xff, 0xff]);
    }
}
