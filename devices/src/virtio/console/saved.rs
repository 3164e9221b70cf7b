//! The saved form of a console. Output that the peer has not read yet stays with this process.
use ::state::device as saved;

use super::Console;
use crate::state::{Snapshot, StateError};

impl Snapshot for Console {
    type State = saved::Console;

    fn save(&self) -> Result<saved::Console, StateError> {
        let active = self.worker.parked()?.map(|worker| {
            let (rx, tx, sent, needs_reset) = worker.position();
            let (receive, transmit) = (rx.position(), tx.position());
            saved::ActiveConsole { receive, transmit, sent, needs_reset }
        });
        Ok(saved::Console { active })
    }

    fn restore(&mut self, state: saved::Console) -> Result<(), StateError> {
        match (self.worker.parked_mut(), state.active) {
            (None, None) => Ok(()),
            (Some(worker), Some(saved::ActiveConsole { receive, transmit, sent, needs_reset })) => {
                worker.set_position(receive, transmit, sent, needs_reset);
                Ok(())
            }
            _ => Err(StateError::Invalid("a console with and without driver")),
        }
    }
}
