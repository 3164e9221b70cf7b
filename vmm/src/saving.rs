//! The main thread's part of a save: [`phase`] decides what comes next, and here it is done.
//!
//! A save into a directory is live with `resume`, one into a stream whenever the guest runs: memory
//! is copied while the guest runs, and the guest is stopped for the rest. With `resume` the rest is
//! copied aside in memory, and the guest runs again before any of it is written. This pause is one
//! step of the main thread, so clients do not see it: there are no STOP and RESUME events, and the
//! guest's clocks lose no time. When a save fails, the VM is what it was before.
//!
//! With `track`, the dirty log stays on afterwards, so that the next save can be incremental: it
//! builds on that save.
//!
//! ```text
//! status     the save under way, or the last one
//! start      from a client's request to an order for the checkpoint thread
//! phase      the phases and their order
//! capture    giving the state of the machine to that thread
//! dirty_log  what has changed, and since which save
//! disks      copies of disks
//! ```
mod capture;
mod dirty_log;
mod disks;
mod phase;
mod start;
mod status;

use std::time::{Duration, Instant};

use machine::{DirtyError, RunError};
use qmp::{
    Error,
    schema::{Empty, Event, MigrationStatus},
    server::Ticket,
};

pub(crate) use self::{
    capture::Capturing,
    start::{How, To},
    status::Saving,
};
use self::{
    phase::{Effect, Input, Outcome},
    start::SaveRequest,
    status::{Fate, Next, Over, Save, UnderWay},
};
use crate::{
    bounds,
    checkpoint::{
        SaveError, Saved,
        job::{Job, Left, Step},
    },
    lifecycle::{self, State},
    vmm::{Refused, Vmm},
};

/// How long a new save waits for one that was cancelled and hangs.
const HANG_LIMIT: Duration = bounds::FILE;

/// Why a save did not succeed.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    State(#[from] machine::SaveError),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    #[error("there is no save in progress")]
    NoSave,
    #[error("a disk was plugged or unplugged while the machine was being saved with its disks")]
    Disks,
    #[error("cannot find out which memory the guest uses (/proc/self/pagemap)")]
    Memory(#[source] std::io::Error),
}

impl Vmm {
    /// Start a save; `ticket` is answered when it is over. Nothing is opened here: a file system
    /// that hangs blocks the checkpoint thread only.
    ///
    /// # Errors
    /// When it cannot start; only the status of the last save has changed then.
    pub(crate) fn save(&mut self, to: To, how: How, ticket: &Ticket) -> Result<(), Error> {
        let asked = SaveRequest { to, how, by: ticket.clone() };
        if self.saving.under_way().is_none() {
            return self.begin_save(asked);
        }
        match self.saving.next() {
            Some(next @ None) => {
                *next = Some(Next { asked, until: Instant::now() + HANG_LIMIT });
                Ok(())
            }
            _ => Err(Error::text("There's a migration process in progress")),
        }
    }

    fn begin_save(&mut self, asked: SaveRequest) -> Result<(), Error> {
        match self.start_save(asked) {
            Ok(save) => {
                self.saving.save = Save::UnderWay(Box::new(save));
                self.broadcast(&Event::Migration { status: MigrationStatus::Active });
                Ok(())
            }
            Err(e) => {
                self.saving.save = Save::Over(Box::new(Over::at_once(&e)));
                Err(e)
            }
        }
    }

    /// Set whether receivers answer, for all streams.
    pub(crate) fn set_return_path(&mut self, on: bool) {
        self.saving.return_path = Some(on);
    }

    pub(crate) fn saving(&self) -> &Saving {
        &self.saving
    }

    /// Cancel the save, if one is under way and does not count yet.
    pub(crate) fn cancel_save(&mut self) {
        if self.saving.under_way_mut().is_some_and(UnderWay::cancel) {
            self.save_input(Input::Cancelled);
        }
    }

    /// Abandon the save at the monitor's end; whether the thread is done with it.
    pub(crate) fn abandons_save(&mut self) -> bool {
        let Some(save) = self.saving.under_way_mut() else { return true };
        save.job.give_up();
        save.abandon_disks();
        while let Some(step) = save.job.step() {
            if matches!(step, Step::Done(_)) {
                self.saving.save = Save::None;
                return true;
            }
        }
        false
    }

    /// Log that an abandoned save hangs, if one does.
    pub(crate) fn leave_save_behind(&self) {
        if let Some(save) = self.saving.under_way() {
            log::warn!("the save to {} hangs and is abandoned", save.job.place());
        }
    }

    /// Handle the steps that the checkpoint thread has reported.
    pub(crate) fn follow_save(&mut self) {
        while !self.is_deferring()
            && let Some(step) = self.saving.under_way_mut().and_then(|save| save.job.step())
        {
            self.save_step(step);
        }
        if self.state() != State::Saving && !self.is_deferring() {
            self.late_events();
        }
        self.end_stalled_save();
        self.end_long_wait();
        if let Save::Over(over) = &mut self.saving.save
            && let Some(asked) = over.next.take()
        {
            let by = asked.by.clone();
            if let Err(e) = self.begin_save(asked) {
                self.reply_to(&by, Err(e));
            }
        }
    }

    /// Refuse a save that has waited too long for one that was cancelled.
    fn end_long_wait(&mut self) {
        let now = Instant::now();
        let next = self.saving.next().and_then(|next| next.take_if(|next| next.until <= now));
        if let Some(Next { asked, .. }) = next {
            let place = self.saving.job().map_or("", Job::place);
            let desc = format!(
                "the save to {place} was cancelled and hangs: its storage does not answer. Another one \
                 can begin when it does; query-migrate says 'cancelling' until then"
            );
            self.reply_to(&asked.by, Err(Error::text(desc)));
        }
    }

    /// How long until a waiting save has waited too long, or the disks have to be checked.
    pub(crate) fn until_save(&self) -> Option<Duration> {
        let next = self.saving.under_way().and_then(|save| match &save.fate {
            Fate::Cancelled { next, .. } => next.as_ref(),
            Fate::Wanted | Fate::Failed(_) => None,
        });
        let next = next.map(|next| next.until.saturating_duration_since(Instant::now()));
        // No event reports when the guest's writes to a disk begin to wait.
        let look = self.saving.keeps_disks().then_some(bounds::DISK_COPY / 4);
        next.into_iter().chain(look).min()
    }

    fn save_step(&mut self, step: Step) {
        match step {
            Step::Opened => {
                // There is no use in it for a guest that is stopped already.
                let live = self.saving.under_way().is_some_and(|save| save.terms.live())
                    && self.state() == State::Running;
                self.save_input(Input::Opened { live });
            }
            Step::Round => self.save_input(Input::Round),
            Step::Ready(left) => self.save_effects(Input::Ready, Some(left)),
            Step::Copied => self.save_input(Input::Copied),
            Step::HandOver => self.save_input(Input::HandOver),
            Step::Done(result) => self.save_done(result),
        }
    }

    fn save_input(&mut self, input: Input) {
        self.save_effects(input, None);
    }

    /// Enter the phase that `input` leads to, and carry out its effects. `left` is for the capture.
    fn save_effects(&mut self, input: Input, mut left: Option<Left>) {
        let Some(save) = self.saving.under_way_mut() else { return };
        let (phase, effects) = save.phase.on(save.terms, input);
        save.phase = phase;
        for effect in effects {
            let done = match effect {
                Effect::LogAndCopy => self.log_and_copy(),
                Effect::Harvest => self.harvest(),
                Effect::Capture => {
                    let (left, asked) = (left.take(), Instant::now());
                    self.try_capture(Capturing { left, asked });
                    Ok(())
                }
                Effect::Release => {
                    self.machine.release_backends();
                    Ok(())
                }
                Effect::Go => {
                    self.saving.job().into_iter().for_each(Job::go);
                    Ok(())
                }
                Effect::GoBack(before) => self.go_back(before).map_err(Failed::from),
                Effect::Rest(before) => self.rest(before).map_err(Failed::from),
                Effect::Leave => self.apply(lifecycle::Event::Migrated).map_err(Failed::from),
            };
            if let Err(e) = done {
                self.fail_save(&e);
            }
        }
    }

    /// Fail the save, as the main thread cannot do its part: the thread gives up.
    fn fail_save(&mut self, why: &Failed) {
        let why = Error::generic(why).to_string();
        log::error!("cannot continue a save: {why}");
        if let Some(save) = self.saving.under_way_mut() {
            save.job.give_up();
            save.fail(why);
            save.abandon_disks();
        }
    }

    /// Put the machine into the state that the save leads to, and report the result.
    fn save_done(&mut self, mut result: Result<Option<Saved>, SaveError>) {
        let Some(save) = self.saving.under_way() else { return };
        let failed = match &save.fate {
            Fate::Failed(_) | Fate::Cancelled { why: Some(_), .. } => true,
            Fate::Wanted | Fate::Cancelled { why: None, .. } => false,
        };
        let (track, stream) = (save.how.track, save.terms.is_stream());
        let outcome = match &mut result {
            Ok(saved) if !failed => {
                if !stream {
                    self.saving.log.saved(saved.take().filter(|_| track));
                }
                Outcome::Saved
            }
            Err(SaveError::Unknown { .. }) => Outcome::Unknown,
            _ => Outcome::Failed,
        };
        self.save_input(Input::Done(outcome));
        self.finish_save(result);
    }

    fn finish_save(&mut self, result: Result<Option<Saved>, SaveError>) {
        self.end_log();
        let Save::UnderWay(save) = std::mem::replace(&mut self.saving.save, Save::None) else {
            return;
        };
        let UnderWay { job, by, fate, stop, .. } = *save;
        let (failed, next) = fate.end();
        let (status, error) = match (failed, result) {
            (Some(why), _) => (MigrationStatus::Failed, Some(why)),
            (None, Ok(_)) => (MigrationStatus::Completed, None),
            (None, Err(SaveError::Cancelled)) => {
                (MigrationStatus::Canceled, Some("the save was cancelled".to_owned()))
            }
            (None, Err(e)) => (MigrationStatus::Failed, Some(Error::generic(&e).to_string())),
        };
        let (took, downtime) = (job.time(), stop.over());
        match (&error, downtime) {
            (None, Some(pause)) => {
                log::info!("saved in {took:?}; the guest was stopped for {pause:?}")
            }
            (None, None) => log::info!("saved in {took:?}"),
            (Some(why), _) => log::warn!("the save failed: {why}"),
        }
        let reply = error.clone().map_or(Ok(Empty {}), |why| Err(Error::text(why)));
        let next = next.map(|next| next.asked);
        self.saving.save =
            Save::Over(Box::new(Over { status, error, downtime, job: Some(job), next }));
        self.broadcast(&Event::Migration { status });
        self.reply_to(&by, reply);
    }

    fn reply_to(&mut self, ticket: &Ticket, reply: Result<Empty, Error>) {
        let reply =
            reply.and_then(|empty| serde_json::to_value(empty).map_err(|e| Error::generic(&e)));
        self.servers.reply(ticket, reply);
    }
}
