//! What the main thread does for a save.
//!
//! ```text
//!              stopped                                live (`resume`)
//!   stop, hand over the state           log dirty pages, let all memory be copied
//!   all memory is copied and synced     stop, hand over state and what has changed
//!   stay paused                         wait until that is copied; go on; it is synced
//! ```
//! When it fails, the VM is what it was before.
use std::{
    path::Path,
    time::{Duration, Instant},
};

use machine::RunError;
use qmp::{
    Error,
    schema::{Empty, Event, MigrationStatus},
    server::Ticket,
};

use crate::{
    checkpoint::{
        SaveError,
        job::{Checkpointer, Job, Step},
    },
    lifecycle::{self, State},
    vmm::{Refused, Vmm},
};

/// Longest wait for the copy of what has changed. It is a matter of milliseconds; when a disk is
/// that slow, the main thread looks at its clients in between.
const COPY: Duration = Duration::from_millis(500);

/// The last save: what is known of it.
pub(crate) struct Saving {
    thread: Checkpointer,
    job: Option<Job>,
    status: MigrationStatus,
    error: Option<String>,
    live: bool,
    /// Where the VM was when it was stopped for it.
    before: State,
    /// When the guest was stopped.
    stopped: Option<Instant>,
    downtime: Option<Duration>,
    /// Who waits for the answer, on which server.
    asked: Option<(usize, Ticket)>,
}

impl Saving {
    pub(crate) fn new(thread: Checkpointer) -> Self {
        Self {
            thread,
            job: None,
            status: MigrationStatus::default(),
            error: None,
            live: false,
            before: State::Prelaunch,
            stopped: None,
            downtime: None,
            asked: None,
        }
    }

    pub(crate) fn job(&self) -> Option<&Job> {
        self.job.as_ref()
    }

    pub(crate) fn status(&self) -> MigrationStatus {
        self.status
    }

    pub(crate) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    pub(crate) fn downtime(&self) -> Option<Duration> {
        self.downtime
    }
}

/// Why a save did not succeed.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(transparent)]
    State(#[from] machine::SaveError),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Kvm(#[from] machine::kvm::KvmError),
    #[error("cannot find out which memory the guest uses (/proc/self/pagemap)")]
    Memory(#[source] std::io::Error),
}

impl Vmm {
    /// Begin to save into `directory`; `ticket` is answered when it is over.
    ///
    /// # Errors
    /// When it cannot begin; nothing has changed then.
    pub(crate) fn save(
        &mut self,
        directory: &Path,
        resume: bool,
        ticket: &Ticket,
    ) -> Result<(), Error> {
        if self.saving.status == MigrationStatus::Active {
            return Err(Error::text("There's a migration process in progress"));
        }
        let (memory, size) = (self.machine.memory().clone(), self.machine.config().memory.size);
        let ran = self.state() == State::Running;
        // A guest that stands still already has nothing to gain.
        let live = resume && ran;
        if live {
            self.machine.log_dirty(true).map_err(|e| Error::generic(&e))?;
        }
        let job = self.saving.thread.save(directory, memory, size, live);
        let job = job.map_err(|e| {
            self.end_log(live);
            Error::generic(&e)
        })?;
        self.saving.job = Some(job);
        self.saving.status = MigrationStatus::Active;
        (self.saving.error, self.saving.downtime, self.saving.stopped) = (None, None, None);
        (self.saving.live, self.saving.before) = (live, self.state());
        self.saving.asked = Some((self.asked_by, ticket.clone()));
        self.tell(&Event::Migration { status: MigrationStatus::Active });
        if !live && let Err(e) = self.hand_over() {
            // The thread gives up without it, and says so.
            self.fail(&e);
        }
        Ok(())
    }

    pub(crate) fn saving(&self) -> &Saving {
        &self.saving
    }

    /// Give the save up, if one is under way.
    pub(crate) fn cancel_save(&mut self) {
        if self.saving.status == MigrationStatus::Active
            && let Some(job) = &mut self.saving.job
        {
            job.cancel();
        }
    }

    /// Give the save up and wait until its files are gone.
    pub(crate) fn abandon_save(&mut self) {
        self.cancel_save();
        if self.saving.status == MigrationStatus::Active
            && let Some(job) = &mut self.saving.job
        {
            while let Some(step) = job.wait(Duration::from_secs(5)) {
                if matches!(step, Step::Done(_)) {
                    break;
                }
            }
        }
    }

    /// See what the checkpoint thread has to say.
    pub(crate) fn follow_save(&mut self) {
        while let Some(step) = self.saving.job.as_mut().and_then(Job::step) {
            self.save_step(step);
        }
    }

    fn save_step(&mut self, step: Step) {
        match step {
            Step::Ready => {
                if let Err(e) = self.hand_over() {
                    return self.fail(&e);
                }
                let step = self.saving.job.as_mut().and_then(|job| job.wait(COPY));
                if let Some(step) = step {
                    self.save_step(step);
                }
            }
            Step::Copied => {
                if self.saving.live
                    && let Err(e) = self.go_on()
                {
                    self.fail(&e.into());
                }
            }
            Step::Done(result) => self.save_over(result),
        }
    }

    /// Stop the guest and give the thread the state and the list of what is to be copied.
    fn hand_over(&mut self) -> Result<(), Failed> {
        self.saving.stopped = Some(Instant::now());
        // A client may have stopped it since the save began.
        self.saving.before = self.state();
        self.apply(lifecycle::Event::Save)?;
        let still = self.machine.quiesced()?;
        let ranges = match self.saving.live {
            true => still.dirty_memory()?,
            false => still.used_memory().map_err(Failed::Memory)?,
        };
        if let Some(job) = &self.saving.job {
            let halted = match self.saving.before {
                State::Halted(why) => Some(why),
                _ => None,
            };
            job.last(&still, ranges, halted)?;
        }
        Ok(())
    }

    /// Back to what the VM was before the save.
    fn go_on(&mut self) -> Result<(), Refused> {
        if self.state() == State::Saving {
            self.stand_still()?;
            if self.saving.before == State::Running {
                self.apply(lifecycle::Event::Resume)?;
                self.saving.downtime = self.saving.stopped.map(|at| at.elapsed());
            }
        }
        Ok(())
    }

    /// The machine stays where the save has put it; nobody needs its memory any more.
    fn stand_still(&mut self) -> Result<(), Refused> {
        if self.state() == State::Saving {
            self.apply(lifecycle::Event::Saved)?;
            if let State::Halted(why) = self.saving.before {
                self.apply(lifecycle::Event::Halt(why))?;
            }
        }
        Ok(())
    }

    /// The main thread cannot do its part.
    fn fail(&mut self, why: &Failed) {
        if let Some(job) = &mut self.saving.job {
            job.give_up();
        }
        self.saving.error = Some(Error::generic(why).to_string());
    }

    fn save_over(&mut self, result: Result<(), SaveError>) {
        let live = self.saving.live;
        self.end_log(live);
        let mut failure = match (self.saving.error.take(), result) {
            (Some(why), _) => Some((MigrationStatus::Failed, why)),
            (None, Ok(())) => None,
            (None, Err(SaveError::Cancelled)) => {
                Some((MigrationStatus::Canceled, "the save was cancelled".to_owned()))
            }
            (None, Err(e)) => Some((MigrationStatus::Failed, Error::generic(&e).to_string())),
        };
        let after = if failure.is_some() || live { self.go_on() } else { self.stand_still() };
        if let Err(e) = after {
            let why = Error::generic(&e).to_string();
            log::error!("cannot go on after a save: {why}");
            failure.get_or_insert((MigrationStatus::Failed, why));
        }
        let took = self.saving.job().map(Job::time).unwrap_or_default();
        match &failure {
            None => log::info!("saved in {took:?}"),
            Some((_, why)) => log::warn!("not saved: {why}"),
        }
        let status = failure.as_ref().map_or(MigrationStatus::Completed, |f| f.0);
        self.saving.status = status;
        self.saving.error = failure.map(|f| f.1);
        self.tell(&Event::Migration { status });
        let reply = match &self.saving.error {
            None => serde_json::to_value(Empty {}).map_err(|e| Error::generic(&e)),
            Some(why) => Err(Error::text(why.clone())),
        };
        if let Some((server, ticket)) = self.saving.asked.take()
            && let Some(server) = self.servers.get_mut(server)
        {
            server.reply(&ticket, reply);
        }
        self.late_events();
    }

    fn end_log(&mut self, live: bool) {
        if live && let Err(e) = self.machine.log_dirty(false) {
            log::warn!("{}", Error::generic(&e));
        }
    }
}
