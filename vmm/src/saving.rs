//! What the main thread does for a save.
//!
//! ```text
//!              stopped                                live
//!   stop, hand over the state           log dirty pages, let all memory be copied
//!   all memory is copied                tell what has changed, again and again
//!   stay stopped                        stop, hand over state and what has changed
//!                                       (`resume`: wait until that is copied; go on)
//! ```
//! A save into a directory is live with `resume`, one into a stream whenever the guest runs. When it
//! fails, the VM is what it was before.
//!
//! With `track`, the log of dirty pages stays on afterwards, so that the next save can be
//! incremental: on that save builds.
use std::{
    ops::Range,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use machine::{RunError, kvm::KvmError, memory::image::union};
use qmp::{
    Error,
    schema::{Empty, Event, MigrationStatus},
    server::Ticket,
};

use crate::{
    checkpoint::{
        Config, Directory, Peer, SaveError, Saved, Stream,
        job::{Checkpointer, Job, Live, Open, Step, new_id},
    },
    lifecycle::{self, State},
    vmm::{Refused, Vmm},
};

/// Where a save goes.
pub(crate) enum To {
    /// Into a directory.
    Directory(PathBuf),
    /// To somebody who goes on with the machine, or keeps it.
    Stream(Peer),
}

/// How it is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct How {
    /// The machine goes on here afterwards, if it ran.
    pub resume: bool,
    /// Only what has changed since the last save.
    pub incremental: bool,
    /// The next save can be incremental.
    pub track: bool,
}

/// A save that the next one can build on.
struct Base {
    saved: Saved,
    /// What has changed since and is not in the log any more.
    since: Vec<Range<u64>>,
}

/// The last save: what is known of it.
pub(crate) struct Saving {
    thread: Checkpointer,
    job: Option<Job>,
    id: u128,
    status: MigrationStatus,
    error: Option<String>,
    how: How,
    stream: bool,
    /// Memory is copied while the guest runs.
    live: bool,
    /// Where the VM was when it was stopped for it.
    before: State,
    /// Dirty pages are logged.
    logging: bool,
    base: Option<Base>,
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
            id: 0,
            status: MigrationStatus::default(),
            error: None,
            how: How::default(),
            stream: false,
            live: false,
            before: State::Prelaunch,
            logging: false,
            base: None,
            stopped: None,
            downtime: None,
            asked: None,
        }
    }

    /// Directory of the save that an incremental one would build on.
    pub(crate) fn base(&self) -> Option<&Path> {
        self.base.as_ref().map(|base| base.saved.path())
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
    Kvm(#[from] KvmError),
    #[error("cannot find out which memory the guest uses (/proc/self/pagemap)")]
    Memory(#[source] std::io::Error),
}

impl Vmm {
    /// Begin to save; `ticket` is answered when it is over.
    ///
    /// # Errors
    /// When it cannot begin; nothing has changed then but what is known of the last save.
    pub(crate) fn save(&mut self, to: To, how: How, ticket: &Ticket) -> Result<(), Error> {
        if self.saving.status == MigrationStatus::Active {
            return Err(Error::text("There's a migration process in progress"));
        }
        self.begin_save(to, how, ticket).inspect_err(|e| {
            (self.saving.status, self.saving.job) = (MigrationStatus::Failed, None);
            self.saving.error = Some(e.to_string());
        })
    }

    fn begin_save(&mut self, to: To, how: How, ticket: &Ticket) -> Result<(), Error> {
        let base = match (&self.saving.base, how.incremental) {
            (Some(base), true) => Some(base.saved.clone()),
            (None, true) => {
                return Err(Error::text(
                    "Parameter 'incremental': no save to build on; give track to the one before",
                ));
            }
            (_, false) => None,
        };
        let stream = matches!(to, To::Stream(_));
        let (memory, size) = (self.machine.memory().clone(), self.machine.config().memory.size);
        // A guest that stands still already has nothing to gain.
        let live = (how.resume || stream) && self.state() == State::Running;
        let id = new_id();
        let mut cancel = None;
        let open: Open = match to {
            To::Directory(path) => {
                let directory = Directory::create(&path, memory.clone(), size, base);
                let directory = directory.map_err(|e| Error::generic(&e))?;
                Box::new(|_| Ok(Box::new(directory)))
            }
            To::Stream(peer) => {
                cancel = Some(peer.cancel());
                let (memory, config) = (memory.clone(), Config::of(&self.machine, id, None));
                Box::new(move |progress| {
                    Ok(Box::new(Stream::begin(peer, memory, &config, progress)?))
                })
            }
        };
        let mut first = Live::No;
        if live {
            self.log_changes().map_err(|e| Error::generic(&e))?;
            first = match &self.saving.base {
                Some(base) if how.incremental => Live::These(base.since.clone()),
                _ => Live::All(memory, self.machine.filled()),
            };
        }
        let job = self.saving.thread.save(open, first, cancel).map_err(|e| {
            self.end_log();
            Error::generic(&e)
        })?;
        self.saving.job = Some(job);
        self.saving.status = MigrationStatus::Active;
        (self.saving.error, self.saving.downtime, self.saving.stopped) = (None, None, None);
        (self.saving.id, self.saving.how, self.saving.stream) = (id, how, stream);
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
            && let Some(job) = &self.saving.job
        {
            job.cancel();
        }
    }

    /// Give the save up and wait until its files are gone, for at most `patience`.
    pub(crate) fn abandon_save(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        if self.saving.status == MigrationStatus::Active
            && let Some(job) = &mut self.saving.job
        {
            job.give_up();
            while let Some(step) = job.wait(deadline.saturating_duration_since(Instant::now())) {
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
            Step::Round => match (self.collect(), &self.saving.job) {
                (Ok(ranges), Some(job)) => job.changed(ranges),
                (Ok(_), None) => {}
                (Err(e), _) => self.fail(&e.into()),
            },
            Step::Ready => {
                if let Err(e) = self.hand_over() {
                    self.fail(&e);
                }
            }
            Step::Copied => {
                if self.saving.live
                    && self.saving.how.resume
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
        let mut ranges = match (self.saving.logging, self.saving.how.track) {
            (true, _) => self.collect()?,
            (false, true) => {
                self.log_changes()?;
                Vec::new()
            }
            (false, false) => Vec::new(),
        };
        let halted = match self.saving.before {
            State::Halted(why) => Some(why),
            _ => None,
        };
        let config = Config::of(&self.machine, self.saving.id, halted);
        let still = self.machine.quiesced()?;
        if !self.saving.live {
            ranges = match &self.saving.base {
                Some(base) if self.saving.how.incremental => base.since.clone(),
                _ => still.used_memory().map_err(Failed::Memory)?,
            };
        }
        let state = still.save()?;
        if self.saving.stream && !self.saving.how.resume {
            // Before the other side can know all that it needs to go on.
            self.machine.release_disks();
        }
        if let Some(job) = &self.saving.job {
            job.last(ranges, config, state);
        }
        Ok(())
    }

    /// Begin to note what changes.
    fn log_changes(&mut self) -> Result<(), KvmError> {
        if self.saving.logging {
            return self.collect().map(drop);
        }
        self.machine.log_dirty(true)?;
        self.saving.logging = true;
        Ok(())
    }

    /// What has changed since this was last called, or [`Self::log_changes`].
    fn collect(&mut self) -> Result<Vec<Range<u64>>, KvmError> {
        let dirty = self.machine.dirty_memory()?;
        // A save that fails must not lose it.
        if let Some(base) = &mut self.saving.base {
            base.since = union(&base.since, &dirty);
        }
        Ok(dirty)
    }

    /// Note no changes any more, unless the next save may want them.
    fn end_log(&mut self) {
        if self.saving.base.is_some() || !std::mem::take(&mut self.saving.logging) {
            return;
        }
        if let Err(e) = self.machine.log_dirty(false) {
            log::warn!("{}", Error::generic(&e));
        }
    }

    /// Back to what the VM was before the save.
    fn go_on(&mut self) -> Result<(), Refused> {
        if self.state() == State::Saving {
            let held = self.machine.hold_disks();
            self.stand_still()?;
            held.map_err(RunError::from)?;
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

    fn save_over(&mut self, result: Result<Option<Saved>, SaveError>) {
        let How { resume, track, .. } = self.saving.how;
        let mut failure = match (self.saving.error.take(), result) {
            (Some(why), _) => Some((MigrationStatus::Failed, why)),
            (None, Ok(saved)) => {
                if !self.saving.stream {
                    let saved = saved.filter(|_| track);
                    self.saving.base = saved.map(|saved| Base { saved, since: Vec::new() });
                }
                None
            }
            (None, Err(SaveError::Cancelled)) => {
                Some((MigrationStatus::Canceled, "the save was cancelled".to_owned()))
            }
            (None, Err(e)) => Some((MigrationStatus::Failed, Error::generic(&e).to_string())),
        };
        self.end_log();
        let after = match self.state() {
            _ if failure.is_some() => self.go_on(),
            State::Saving if self.saving.stream && !resume => {
                self.apply(lifecycle::Event::Migrated)
            }
            State::Saving => self.stand_still(),
            _ => Ok(()),
        };
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
}
