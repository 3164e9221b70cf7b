//! The saved form of a console. What the other side has not read yet stays with this process.
use serde::{Deserialize, Serialize};

use super::Console;
use crate::state::{Snapshot, StateError};

/// What the device knows once a driver uses it; `None` before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    active: Option<Active>,
}

/// Where the device is in its rings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Active {
    rx: u16,
    tx: u16,
    /// Bytes of the next transmit chain that are out already.
    sent: u64,
    broken: bool,
}

impl Snapshot for Console {
    const KIND: &'static str = "virtio-console";
    const VERSION: u32 = 1;
    type State = ConsoleState;

    fn save(&self) -> ConsoleState {
        let active = self.home.parked().map(|worker| {
            let (rx, tx, sent, broken) = worker.position();
            Active { rx: rx.position(), tx: tx.position(), sent, broken }
        });
        ConsoleState { active }
    }

    fn restore(&mut self, state: ConsoleState) -> Result<(), StateError> {
        match (self.home.parked_mut(), state.active) {
            (None, None) => Ok(()),
            (Some(worker), Some(Active { rx, tx, sent, broken })) => {
                worker.set_position(rx, tx, sent, broken);
                Ok(())
            }
            _ => Err(StateError::Invalid("a console with and without driver")),
        }
    }
}
