//! What the main thread does for a save: [`phase`] says what comes after what, and here it is done.
//!
//! A save into a directory is live with `resume`, one into a stream whenever the guest runs: memory
//! is copied while the guest runs, and it is stopped for the rest. With `resume` the rest is copied
//! aside in memory and the guest runs again before any of it is written; this pause is one step of
//! the main thread, so no client sees it: no STOP and RESUME, and no time taken from the guest's
//! clocks. When a save fails, the VM is what it was before.
//!
//! With `track`, the log of dirty pages stays on afterwards, so that the next save can be
//! incremental: on that save builds.
//!
//! ```text
//! status     the save under way, or the last one
//! start      from what a client asks for to what the checkpoint thread is ordered to do
//! phase      what comes after what       capture    the machine, given to that thread
//! dirty_log  what has changed, and since which save      disks    copies of disks
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

/// How long a save waits for one that was cancelled and hangs.
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
    #[error("there is no save to stop the machine for")]
    NoSave,
    #[error("a disk was plugged or unplugged while the machine was being saved with its disks")]
    Disks,
    #[error("cannot find out which memory the guest uses (/proc/self/pagemap)")]
    Memory(#[source] std::io::Error),
}

impl Vmm {
    /// Begin to save; `ticket` is answered when it is over. Nothing is opened here: a file system
    /// that hangs holds the checkpoint thread alone.
    ///
    /// # Errors
    /// When it cannot begin; nothing has changed then but what is known of the last save.
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
                self.tell(&Event::Migration { status: MigrationStatus::Active });
                Ok(())
            }
            Err(e) => {
                self.saving.save = Save::Over(Box::new(Over::at_once(&e)));
                Err(e)
            }
        }
    }

    /// Let receivers answer, whatever is sent to.
    pub(crate) fn set_return_path(&mut self, on: bool) {
        self.saving.return_path = Some(on);
    }

    pub(crate) fn saving(&self) -> &Saving {
        &self.saving
    }

    /// Give the save up, if one is under way and does not count yet.
    pub(crate) fn cancel_save(&mut self) {
        if self.saving.under_way_mut().is_some_and(UnderWay::cancel) {
            self.save_input(Input::Cancelled);
        }
    }

    /// Give the save up at the monitor's end; whether its files are gone.
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

    /// Say so if a save that was given up hangs.
    pub(crate) fn leave_save_behind(&self) {
        if let Some(save) = self.saving.under_way() {
            log::warn!("the save to {} hangs and is left behind", save.job.place());
        }
    }

    /// See what the checkpoint thread has to say, and what waits for it.
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

    /// How long until a save that waits for another one has waited for long enough.
    pub(crate) fn until_save(&self) -> Option<Duration> {
        let next = self.saving.under_way().and_then(|save| match &save.fate {
            Fate::Cancelled { next, .. } => next.as_ref(),
            Fate::Wanted | Fate::Failed(_) => None,
        });
        let next = next.map(|next| next.until.saturating_duration_since(Instant::now()));
        // Nothing tells when changes of a disk begin to wait.
        let look = self.saving.keeps_disks().then_some(bounds::DISK_COPY / 4);
        next.into_iter().chain(look).min()
    }

    fn save_step(&mut self, step: Step) {
        match step {
            Step::Opened => {
                // A guest that is stopped already has nothing to gain.
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

    /// Go where `input` leads and do what has to be done. `left` is for the capture.
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

    /// The main thread cannot do its part: the thread gives up without it, and says so.
    fn fail_save(&mut self, why: &Failed) {
        let why = Error::generic(why).to_string();
        log::error!("cannot go on with a save: {why}");
        if let Some(save) = self.saving.under_way_mut() {
            save.job.give_up();
            save.fail(why);
            save.abandon_disks();
        }
    }

    /// The machine goes where the save leads, and all who want to know are told.
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
            (Some(why), _) => log::warn!("not saved: {why}"),
        }
        let reply = error.clone().map_or(Ok(Empty {}), |why| Err(Error::text(why)));
        let next = next.map(|next| next.asked);
        self.saving.save =
            Save::Over(Box::new(Over { status, error, downtime, job: Some(job), next }));
        self.tell(&Event::Migration { status });
        self.reply_to(&by, reply);
    }

    fn reply_to(&mut self, ticket: &Ticket, reply: Result<Empty, Error>) {
        let reply =
            reply.and_then(|empty| serde_json::to_value(empty).map_err(|e| Error::generic(&e)));
        self.servers.reply(ticket, reply);
    }
}
