//! When the guest of a primary is stopped: for each epoch, while it is slowed down, and while it
//! may run elsewhere.
use std::{
    ops::Range,
    time::{Duration, Instant},
};

use machine::{
    Captured, EpochError, Gates, Pages, Taken,
    memory::{
        image::PAGE_SIZE,
        staging::{self, Staging},
    },
};
use qmp::Error;
use replication::Epoch;

use super::{
    super::{history::Pause, protector::Order},
    Protection,
};
use crate::{
    bounds,
    durations::microseconds,
    lifecycle::{self, State},
    vmm::Vmm,
};

/// An epoch that is to be captured once the machine is at rest.
pub(super) struct Capture {
    pub(super) epoch: Epoch,
    pub(super) shut: bool,
    pub(super) left: Vec<Range<u64>>,
    pub(super) staging: Staging,
    /// Most bytes that are copied.
    pub(super) most: u64,
    pub(super) asked: Instant,
}

/// Why an epoch was not captured.
enum NotTaken {
    /// The machine has to be paused for it.
    TooLarge(Box<Capture>),
    Failed(String),
}

impl Vmm {
    /// Each report of this kind gets one answer, also one that has come too late.
    pub(super) fn wait_to_capture(&mut self, capture: Capture) {
        if let Some(protection) = &mut self.replication.protection
            && !protection.parting
            && protection.capture.replace(capture).is_some()
        {
            protection.orders.give(Order::Failed("an older checkpoint is not captured".into()));
        }
    }

    /// How long until an epoch is tried again.
    pub(crate) fn until_epoch(&self) -> Option<Duration> {
        let protection = self.replication.protection.as_ref()?;
        let retry = protection.capture.is_some() || protection.restless;
        retry.then_some(bounds::RETRY).into_iter().chain(protection.throttle.left()).min()
    }

    /// Capture an epoch, if one waits and the machine can be stopped.
    pub(super) fn try_epoch(&mut self) {
        if self.is_deferring() {
            return;
        }
        let (before, began) = (self.rest_timeouts(), Instant::now());
        let runs = self.state() == State::Running;
        let Some(protection) = &mut self.replication.protection else { return };
        // Stopping the guest for longer comes first.
        if protection.restless || (protection.copying && runs) {
            return;
        }
        let Some(capture) = protection.capture.take() else { return };
        let asked = capture.asked;
        let (number, shut) = (capture.epoch, capture.shut);
        let tried = match self.machine.captured() {
            Ok(still) => {
                let park = began.elapsed();
                let taken = epoch(still, capture, protection);
                let all = began.elapsed();
                match taken {
                    Ok((taken, gates)) => {
                        protection.copying |= matches!(taken.pages, Pages::InPlace(_));
                        let Taken { harvest, copy, state_time: state, .. } = taken;
                        let pause = Pause { began, park, harvest, copy, state, all };
                        Ok(Ok((Box::new(taken), pause, gates)))
                    }
                    Err(NotTaken::TooLarge(capture)) => {
                        protection.copying = true;
                        protection.capture = Some(*capture);
                        return;
                    }
                    Err(NotTaken::Failed(why)) => Ok(Err(why)),
                }
            }
            Err(e) => Err((e, capture)),
        };
        if let Ok(Ok(_)) = &tried {
            protection.holds |= shut;
            for (covered, _) in &mut protection.events {
                covered.get_or_insert(number);
            }
        }
        let order = match tried {
            Ok(order) => order,
            Err((e, capture)) => {
                let waits = self.rest_timeouts() > before && asked.elapsed() < bounds::REST;
                self.give_up();
                if let (true, Some(protection)) = (waits, &mut self.replication.protection) {
                    protection.capture = Some(capture);
                    return;
                }
                Err(Error::generic(&e).to_string())
            }
        };
        let order = order.map(|(taken, pause, gates)| {
            let outside = Box::new(self.seen_outside());
            Order::Captured { epoch: number, taken, pause, outside, gates }
        });
        if let Ok(Order::Captured { epoch, taken, pause, .. }) = &order {
            self.replication.last.pause_us = microseconds(pause.all);
            self.replication.last.dirty_pages = staging::bytes(&taken.pages.ranges()) / PAGE_SIZE;
            self.replication.last.epoch = epoch.0;
        }
        if let Some(protection) = &self.replication.protection {
            protection.orders.give(order.unwrap_or_else(Order::Failed));
        }
    }

    pub(super) fn throttle(&mut self, percent: u8) {
        let Some(protection) = &mut self.replication.protection else { return };
        let before = protection.throttle.set(percent);
        if (before == 0) != (percent == 0) {
            log::warn!(
                "replication: {}",
                match percent {
                    0 => "the guest runs at full speed again",
                    _ => "the guest is slowed down, as it changes more than the backup takes",
                }
            );
        }
    }

    /// Keep the vCPUs out of the guest for a while, if it is time for that.
    pub(super) fn follow_throttle(&mut self) {
        if let Some(protection) = &mut self.replication.protection
            && let Some(rest) = protection.throttle.due()
        {
            self.machine.rest_vcpus(rest);
        }
    }

    pub(super) fn park(&mut self, park: bool) {
        if let Some(protection) = &mut self.replication.protection {
            protection.parked = park;
            if !park && std::mem::take(&mut protection.restless) {
                self.give_up();
            }
        }
        self.follow_parking();
    }

    /// Stop the guest, or let it run again, as the thread wants it.
    pub(super) fn follow_parking(&mut self) {
        let Some(protection) = &self.replication.protection else { return };
        let parked = protection.parked || protection.copying;
        let event = match (parked, self.state()) {
            _ if self.ending().is_some() || self.is_deferring() => return,
            (true, State::Running) => lifecycle::Event::Pause,
            (false, State::Paused) if protection.stopped => lifecycle::Event::Resume,
            _ => return,
        };
        let done = self.apply(event);
        let Some(protection) = &mut self.replication.protection else { return };
        let was_restless = std::mem::replace(&mut protection.restless, done.is_err());
        match done {
            Ok(()) => protection.stopped = parked,
            Err(e) if !was_restless => log::error!("{}; trying again", Error::generic(&e)),
            Err(_) => {}
        }
    }

    /// A client has stopped the guest: only a client lets it run again.
    pub(crate) fn stays_stopped(&mut self) {
        if let Some(protection) = &mut self.replication.protection {
            protection.stopped = false;
        }
    }
}

/// Steps 2 to 4 of an epoch: copy, mark, and let the machine run.
fn epoch(
    mut still: Captured<'_>,
    capture: Capture,
    protection: &mut Protection,
) -> Result<(Taken, Option<Gates>), NotTaken> {
    let Capture { epoch, shut, left, staging, most, asked } = capture;
    let markers = &mut protection.markers;
    let taken = still.epoch(&left, staging, most).map_err(|e| match e {
        EpochError::TooLarge(left) => {
            let staging = Staging::default();
            NotTaken::TooLarge(Box::new(Capture { epoch, shut, left, staging, most, asked }))
        }
        e => NotTaken::Failed(Error::generic(&e).to_string()),
    })?;
    let mut made = None;
    if shut && markers.is_none() {
        let failed = |e| NotTaken::Failed(Error::generic(&e).to_string());
        let (gates, new) = still.gates().map_err(failed)?;
        (made, *markers) = (Some(gates), Some(new));
    }
    if let Some(disks) = &protection.disks {
        disks.disks.capture(epoch.0);
    }
    if let Some(markers) = markers {
        markers.mark(epoch.0);
        if shut {
            markers.shut();
        }
    }
    Ok((taken, made))
}
