//! What the guest causes outside besides packets and console output: events. And what a backup sends
//! again of all this when the guest runs there.
use qmp::schema::Event;
use replication::Epoch;
use state::config::Halted;

use super::Promotion;
use crate::{
    lifecycle::State,
    replication::outside::{MOST_EVENTS, Outside},
    vmm::Vmm,
};

impl Vmm {
    /// The machine, which has not run here, has come by a failover: its clocks go on, and what may not
    /// have been seen outside is sent again. Whether its guest was stopped by a client.
    pub fn comes_by(&mut self, promotion: &Promotion) -> bool {
        let Promotion { outside, ended, .. } = promotion;
        if !outside.paused {
            self.machine.runs_since(*ended);
        }
        self.machine.send_again(&outside.output);
        outside.events.iter().for_each(|event| self.broadcast(event));
        outside.paused
    }

    /// Tell all clients of something that the guest has caused. As its other output, that waits until
    /// the backup has the state that has caused it.
    pub(crate) fn tell_of_guest(&mut self, event: Event) {
        let Some(protection) = self.replication.protection.as_mut().filter(|p| p.holds) else {
            return self.broadcast(&event);
        };
        if protection.events.len() < MOST_EVENTS {
            protection.events.push_back((None, event));
        } else {
            log::warn!("an event of the guest is lost: {MOST_EVENTS} are held already");
        }
    }

    /// The backup has this epoch, or none is needed any more.
    pub(super) fn released(&mut self, through: Option<Epoch>) {
        loop {
            let Some(protection) = &mut self.replication.protection else { return };
            protection.holds &= through.is_some();
            let next = protection.events.pop_front_if(|(epoch, _)| match through {
                Some(through) => epoch.is_some_and(|epoch| epoch <= through),
                None => true,
            });
            let Some((_, event)) = next else { return };
            self.broadcast(&event);
        }
    }

    /// What the next checkpoint says of the outside, and why the guest cannot run on, if it cannot.
    pub(super) fn seen_outside(&self) -> (Outside, Option<Halted>) {
        let Some(protection) = &self.replication.protection else { return Default::default() };
        let events = protection.events.iter().map(|(_, event)| event.clone()).collect();
        let paused = match self.state() {
            State::Paused => !protection.stopped,
            State::Prelaunch => true,
            _ => false,
        };
        let halted = match self.state() {
            State::Halted(why) => Some(why.into()),
            _ => None,
        };
        (Outside { paused, events, output: Vec::new() }, halted)
    }
}
