//! The current make-up of a machine, in its saved form.
use config::{Description, places::Place};
use state::config as saved;

use crate::Machine;

impl Machine {
    /// The machine's current devices and configuration, in their saved form. `halted` says why its
    /// guest cannot run any more.
    pub fn description(&self, id: u128, halted: Option<saved::Halted>) -> saved::Config {
        let places = self.slots.places().map(|(place, sizes)| {
            let queue_sizes = Some(sizes.to_vec());
            Place { queue_sizes, ..place.clone() }
        });
        let description = Description {
            config: self.config.clone(),
            occupied: self.backends.occupancy(),
            disk_sizes: self.disk_sizes(),
            places: places.collect(),
        };
        description.saved(id, halted)
    }
}
