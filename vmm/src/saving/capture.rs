//! Capturing the machine, stopped for a save, for the checkpoint thread; and resuming it
//! afterwards.
use std::time::Instant;

use machine::{Epoch, Pages, memory::image::union};
use qmp::{Error, schema::MigrationStatus};

use super::{
    Failed,
    phase::{Input, Receiver, Terms},
    status::Stop,
};
use crate::{
    bounds,
    checkpoint::job::Left,
    deferred::Operation,
    lifecycle::{self, State},
    vmm::{Refused, Vmm},
};

/// A capture, which may have to wait until the machine is at rest.
pub(crate) struct Capturing {
    /// What a live save has left to be copied.
    pub(super) left: Option<Left>,
    /// When stopping the guest began.
    pub(super) asked: Instant,
}

impl Vmm {
    /// Capture the machine once it is at rest.
    pub(crate) fn try_capture(&mut self, capturing: Capturing) {
        if self.saving.status() == MigrationStatus::Cancelling {
            self.give_up();
            return self.saving.under_way_mut().into_iter().for_each(|save| save.job.give_up());
        }
        let before = self.rest_timeouts();
        if let Err(e) = self.machine.pause() {
            if self.rest_timeouts() > before && capturing.asked.elapsed() < bounds::REST {
                let why = Error::generic(&e).to_string();
                return self.defer(Operation::Capture(capturing), why);
            }
            self.give_up();
            return self.fail_save(&e.into());
        }
        match self.capture(capturing) {
            Ok(captured) => self.save_input(captured),
            Err(e) => {
                // Resumed before a client could see that it was stopped.
                if self.state() == State::Running
                    && let Err(e) = self.machine.resume_after_own_pause()
                {
                    log::error!("{}", Error::generic(&e));
                }
                self.fail_save(&e);
            }
        }
    }

    /// Give the thread the state of the machine, which is at rest. The guest runs again when this
    /// returns, if it is to and its memory could be copied aside.
    fn capture(&mut self, capturing: Capturing) -> Result<Input, Failed> {
        let Capturing { left, asked: stopped } = capturing;
        let before = self.state();
        // A client may have stopped it since the save began.
        let own_pause =
            before == State::Running && left.as_ref().is_some_and(|left| left.staging.is_some());
        if !own_pause {
            self.apply(lifecycle::Event::Save)?;
        }
        let captured = self.epoch(before, left);
        let runs_again = match &captured {
            Ok((_, epoch)) => matches!(epoch.pages, Pages::Staged(_)),
            Err(_) => true,
        };
        match (own_pause, runs_again) {
            (true, true) => self.machine.resume_after_own_pause()?,
            // Too much memory for that: the pause becomes one that clients see.
            (true, false) => self.apply(lifecycle::Event::Save)?,
            (false, _) if captured.is_err() => self.go_back(before)?,
            (false, _) => {}
        }
        let took = stopped.elapsed();
        let (config, epoch) = captured?;
        let terms = Terms { resume: false, receiver: Receiver::Mute };
        if self.saving.under_way().is_some_and(|save| save.terms == terms) {
            // Before the peer can have all that it needs to resume the machine.
            self.machine.release_backends();
        }
        let save = self.saving.under_way_mut().ok_or(Failed::NoSave)?;
        save.job.epoch(config, epoch);
        let (stop, input) = match own_pause && runs_again {
            true => (Stop::For(took), Input::Captured),
            false => (Stop::Since(stopped), Input::Held(before)),
        };
        save.stop = stop;
        Ok(input)
    }

    /// The state of the machine, which stays stopped.
    fn epoch(
        &mut self,
        before: State,
        left: Option<Left>,
    ) -> Result<(state::Config, Epoch), Failed> {
        let save = self.saving.under_way().ok_or(Failed::NoSave)?;
        let (id, how) = (save.id, save.how);
        // Everything written up to this moment counts, so this comes after stopping it.
        self.machine.pause()?;
        let changed = match (self.saving.log.is_on(), how.track) {
            (true, _) => self.collect()?,
            (false, true) => {
                self.log_changes()?;
                Vec::new()
            }
            (false, false) => Vec::new(),
        };
        let halted = match before {
            State::Halted(why) => Some(why.into()),
            _ => None,
        };
        let config = self.machine.description(id, halted);
        self.begin_disks()?;
        let still = self.machine.quiesced()?;
        let (dirty, staging) = match (left, self.saving.log.since_base()) {
            (Some(left), _) => (union(&left.ranges, &changed), left.staging),
            (None, Some(since)) if how.incremental => (since.to_vec(), None),
            (None, _) => (still.used_memory().map_err(Failed::Memory)?, None),
        };
        Ok((config, still.capture(id, dirty, staging)?))
    }

    /// Go back to what the VM was before it was stopped for the save.
    pub(super) fn go_back(&mut self, before: State) -> Result<(), Refused> {
        let held = self.machine.hold_backends();
        self.rest(before)?;
        held?;
        if before == State::Running {
            self.apply(lifecycle::Event::Resume)?;
            if let Some(save) = self.saving.under_way_mut() {
                save.stop = save.stop.end();
            }
        }
        Ok(())
    }

    /// Leave the machine stopped: its memory is no longer needed by the save.
    pub(super) fn rest(&mut self, before: State) -> Result<(), Refused> {
        self.apply(lifecycle::Event::Saved)?;
        match before {
            State::Halted(why) => self.apply(lifecycle::Event::Halt(why)),
            _ => Ok(()),
        }
    }
}
