//! What the main thread does for a save: [`phase`] says what comes after what, and here it is done.
//!
//! A save into a directory is live with `resume`, one into a stream whenever the guest runs: memory
//! is copied while the guest runs, and it is stopped for the rest. With `resume` the rest is copied
//! aside in memory and the guest runs again before any of it is written; this pause is one step of the
//! main thread, so nobody sees it: no STOP and RESUME, and no time taken from the guest's clocks. When
//! a save fails, the VM is what it was before.
//!
//! With `track`, the log of dirty pages stays on afterwards, so that the next save can be
//! incremental: on that save builds.
mod disks;
mod phase;

use std::{
    ops::Range,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use machine::{Epoch, Pages, RunError, kvm::KvmError, memory::image::union};
use qmp::{
    Error,
    schema::{Empty, Event, MigrationStatus},
    server::Ticket,
};

use self::phase::{Effect, Input, Outcome, Phase, Terms};
use crate::{
    bounds,
    checkpoint::{
        self, Cancel, Directory, Hello, Peer, SaveError, Saved, Stream,
        job::{Checkpointer, First, Job, Left, Open, Order, Step, new_id},
    },
    deferred::Operation,
    lifecycle::{self, State},
    vmm::{Refused, Vmm},
};

/// How long a save waits for one that was cancelled and hangs.
const HANG_LIMIT: Duration = bounds::FILE;

/// Where a save goes.
pub(crate) enum To {
    /// Into a directory.
    Directory(PathBuf),
    /// To a process that goes on with the machine, or keeps it; what it is called, and whether it
    /// answers.
    Stream(checkpoint::To, String, bool),
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
    /// Copies of the disks belong to it.
    pub disks: bool,
}

/// What was asked for, and by whom.
struct Asked {
    to: To,
    how: How,
    by: Ticket,
}

/// A save that the next one can build on.
struct Base {
    saved: Saved,
    /// What has changed since and is not in the log any more.
    since: Vec<Range<u64>>,
}

/// The save under way, or the last one.
struct Current {
    job: Job,
    id: u128,
    how: How,
    stream: bool,
    dialogue: bool,
    /// Copies of disks in the making, by the disks' ids.
    disks: Vec<disks::Named>,
    /// The client that waits for the answer.
    by: Option<Ticket>,
    /// What the main thread could not do.
    failed: Option<String>,
    /// When the guest was stopped.
    stopped: Option<Instant>,
    downtime: Option<Duration>,
}

/// A capture that may have to wait until the machine is at rest.
pub(crate) struct Capturing {
    /// What a live save has left.
    left: Option<Left>,
    /// When the guest began to be stopped.
    asked: Instant,
}

/// What is known of saves.
pub(crate) struct Saving {
    thread: Checkpointer,
    phase: Phase,
    current: Option<Current>,
    status: MigrationStatus,
    error: Option<String>,
    /// Dirty pages are logged.
    logging: bool,
    base: Option<Base>,
    /// A save that begins when the one that was cancelled is over, and until when it waits.
    next: Option<(Asked, Instant)>,
    /// Whether receivers answer, if a client has said so.
    pub(crate) return_path: Option<bool>,
}

impl Saving {
    pub(crate) fn new(thread: Checkpointer) -> Self {
        Self {
            thread,
            phase: Phase::Idle,
            current: None,
            status: MigrationStatus::default(),
            error: None,
            logging: false,
            base: None,
            next: None,
            return_path: None,
        }
    }

    /// Directory of the save that an incremental one would build on.
    pub(crate) fn base(&self) -> Option<&Path> {
        self.base.as_ref().map(|base| base.saved.path())
    }

    pub(crate) fn job(&self) -> Option<&Job> {
        self.current.as_ref().map(|current| &current.job)
    }

    pub(crate) fn status(&self) -> MigrationStatus {
        self.status
    }

    pub(crate) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// How long the guest was stopped, if it runs on.
    pub(crate) fn downtime(&self) -> Option<Duration> {
        self.current.as_ref()?.downtime
    }

    /// The thread, and what it is limited to.
    pub(crate) fn thread(&self) -> &Checkpointer {
        &self.thread
    }

    fn terms(&self) -> Terms {
        let current = self.current.as_ref();
        let terms = |c: &Current| (c.how.resume, c.stream, c.dialogue);
        let (resume, stream, dialogue) = current.map_or((false, false, false), terms);
        Terms { resume, stream, dialogue }
    }
}

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
    Kvm(#[from] KvmError),
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
        let asked = Asked { to, how, by: ticket.clone() };
        match self.saving.phase {
            Phase::Idle => self.begin_save(asked),
            _ if self.saving.status == MigrationStatus::Cancelling
                && self.saving.next.is_none() =>
            {
                self.saving.next = Some((asked, Instant::now() + HANG_LIMIT));
                Ok(())
            }
            _ => Err(Error::text("There's a migration process in progress")),
        }
    }

    fn begin_save(&mut self, asked: Asked) -> Result<(), Error> {
        self.start_save(asked).inspect_err(|e| {
            (self.saving.status, self.saving.current) = (MigrationStatus::Failed, None);
            self.saving.error = Some(e.to_string());
        })
    }

    fn start_save(&mut self, Asked { to, how, by }: Asked) -> Result<(), Error> {
        let base = match (&self.saving.base, how.incremental) {
            (Some(base), true) => Some(base.saved.clone()),
            (None, true) => {
                return Err(Error::text(
                    "Parameter 'incremental': no save to build on; give track to the one before",
                ));
            }
            (_, false) => None,
        };
        self.machine.prepare_to_save().map_err(|e| Error::generic(&e))?;
        let (memory, size) = (self.machine.memory().clone(), self.machine.config().memory.size);
        let id = new_id().map_err(|e| Error::generic(&e))?;
        let disks = match how.disks {
            true => self.copies_of_disks()?,
            false => Vec::new(),
        };
        let stream = matches!(to, To::Stream(..));
        let dialogue = matches!(to, To::Stream(_, _, true));
        let (cancel, place, open): (_, _, Open) = match to {
            To::Directory(path) => {
                let (place, memory) = (path.display().to_string(), memory.clone());
                let disks = how.disks.then(|| disks.clone());
                let open = move |_: &_| {
                    let directory = Directory::create(&path, memory, size, base)?;
                    Ok(Box::new(match disks {
                        Some(disks) => directory.with_disks(id, disks)?,
                        None => directory,
                    }) as Box<_>)
                };
                (None, place, Box::new(open))
            }
            To::Stream(to, place, dialogue) => {
                let cancel = Cancel::new().map_err(|e| Error::generic(&e))?;
                let given = cancel.clone();
                let (memory, config) = (memory.clone(), self.machine.description(id, None));
                let (name, cpu) = (&config.machine.name, self.machine.cpu());
                let hello = dialogue.then(|| Hello::new(&config.id, name, cpu.as_ref()));
                let hello = hello.transpose().map_err(|e| Error::generic(&e))?;
                let open = move |progress: &_| {
                    let peer = Peer::reach(to, given)?;
                    let begun = Stream::begin(peer, memory, &config, hello.as_ref(), progress)?;
                    Ok(Box::new(begun) as Box<_>)
                };
                (Some(cancel), place, Box::new(open))
            }
        };
        let How { resume, .. } = how;
        let order = Order { open, memory, cancel, place, resume, patient: stream };
        let job = self.saving.thread.save(order).map_err(|e| Error::generic(&e))?;
        (self.saving.status, self.saving.error) = (MigrationStatus::Active, None);
        self.saving.current = Some(Current {
            job,
            id,
            how,
            stream,
            dialogue,
            disks,
            by: Some(by),
            failed: None,
            stopped: None,
            downtime: None,
        });
        self.tell(&Event::Migration { status: MigrationStatus::Active });
        self.save_input(Input::Begin);
        Ok(())
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
        if self.saving.status == MigrationStatus::Active
            && self.saving.job().is_some_and(Job::cancel)
        {
            self.saving.status = MigrationStatus::Cancelling;
            self.saving.abandon_disks();
            self.save_input(Input::Cancelled);
        }
    }

    /// Give the save up at the monitor's end; whether its files are gone.
    pub(crate) fn abandons_save(&mut self) -> bool {
        let (Some(current), false) = (&mut self.saving.current, self.saving.phase == Phase::Idle)
        else {
            return true;
        };
        current.job.give_up();
        current.disks.iter().for_each(|(_, copy)| copy.abandon());
        while let Some(step) = current.job.step() {
            if matches!(step, Step::Done(_)) {
                self.saving.phase = Phase::Idle;
                return true;
            }
        }
        false
    }

    /// Say so if a save that was given up hangs.
    pub(crate) fn leave_save_behind(&self) {
        if let (Some(job), false) = (self.saving.job(), self.saving.phase == Phase::Idle) {
            log::warn!("the save to {} hangs and is left behind", job.place());
        }
    }

    /// See what the checkpoint thread has to say, and what waits for it.
    pub(crate) fn follow_save(&mut self) {
        while !self.is_deferring()
            && let Some(step) = self.saving.current.as_mut().and_then(|c| c.job.step())
        {
            self.save_step(step);
        }
        if self.state() != State::Saving && !self.is_deferring() {
            self.late_events();
        }
        self.end_stalled_save();
        if self.saving.phase == Phase::Idle {
            if let Some((next, _)) = self.saving.next.take() {
                let by = next.by.clone();
                if let Err(e) = self.begin_save(next) {
                    self.reply_to(&by, Err(e));
                }
            }
        } else if let Some((next, _)) =
            self.saving.next.take_if(|(_, until)| *until <= Instant::now())
        {
            let place = self.saving.job().map(Job::place).unwrap_or_default();
            let desc = format!(
                "the save to {place} was cancelled and hangs: its storage does not answer. Another one \
                 can begin when it does; query-migrate says 'cancelling' until then"
            );
            self.reply_to(&next.by, Err(Error::text(desc)));
        }
    }

    /// How long until a save that waits for another one has waited for long enough.
    pub(crate) fn until_save(&self) -> Option<Duration> {
        let next = self.saving.next.as_ref();
        let next = next.map(|(_, until)| until.saturating_duration_since(Instant::now()));
        // Nothing tells when changes of a disk begin to wait.
        let look = self.saving.keeps_disks().then_some(bounds::DISK_COPY / 4);
        next.into_iter().chain(look).min()
    }

    fn save_step(&mut self, step: Step) {
        match step {
            Step::Opened => {
                let wanted = self.saving.terms();
                // A guest that is stopped already has nothing to gain.
                let live = (wanted.resume || wanted.stream) && self.state() == State::Running;
                self.save_input(Input::Opened { live });
            }
            Step::Round => self.save_input(Input::Round),
            Step::Ready(left) => self.save_effects(Input::Ready, Some(left)),
            Step::Copied => self.save_input(Input::Copied),
            Step::HandOver => self.save_input(Input::HandOver),
            Step::Done(result) => self.save_done(result),
        }
    }

    fn save_done(&mut self, result: Result<Option<Saved>, SaveError>) {
        let failed = self.saving.current.as_ref().is_none_or(|current| current.failed.is_some());
        let mut result = result;
        let outcome = match &mut result {
            Ok(saved) if !failed => {
                if let Some(Current { how, stream: false, .. }) = self.saving.current {
                    let saved = saved.take().filter(|_| how.track);
                    self.saving.base = saved.map(|saved| Base { saved, since: Vec::new() });
                }
                Outcome::Saved
            }
            Err(SaveError::Unknown { .. }) => Outcome::Unknown,
            _ => Outcome::Failed,
        };
        self.save_input(Input::Done(outcome));
        self.finish_save(result);
    }

    fn save_input(&mut self, input: Input) {
        self.save_effects(input, None);
    }

    /// Go where `input` leads and do what has to be done. `left` is for the capture.
    fn save_effects(&mut self, input: Input, mut left: Option<Left>) {
        let (phase, effects) = self.saving.phase.on(self.saving.terms(), input);
        self.saving.phase = phase;
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
                // By `finish_save`, which knows what.
                Effect::Answer => Ok(()),
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
        if let Some(current) = &mut self.saving.current {
            current.job.give_up();
            current.failed.get_or_insert(why);
            self.saving.abandon_disks();
        }
    }

    fn log_and_copy(&mut self) -> Result<(), Failed> {
        self.log_changes()?;
        let Some(current) = &self.saving.current else { return Ok(()) };
        current.job.copy(match &self.saving.base {
            Some(base) if current.how.incremental => First::These(base.since.clone()),
            _ => First::All(self.machine.filled()),
        });
        Ok(())
    }

    fn harvest(&mut self) -> Result<(), Failed> {
        let changed = self.collect()?;
        if let Some(job) = self.saving.job() {
            job.changed(changed);
        }
        Ok(())
    }

    /// Capture the machine once it is at rest.
    pub(crate) fn try_capture(&mut self, capturing: Capturing) {
        if self.saving.status == MigrationStatus::Cancelling {
            self.give_up();
            return self.saving.current.iter_mut().for_each(|current| current.job.give_up());
        }
        let before = self.vain_tries();
        if let Err(e) = self.machine.pause() {
            if self.vain_tries() > before && capturing.asked.elapsed() < bounds::REST {
                let why = Error::generic(&e).to_string();
                return self.defer(Operation::Capture(capturing), why);
            }
            self.give_up();
            return self.fail_save(&e.into());
        }
        match self.capture(capturing) {
            Ok(captured) => self.save_input(captured),
            Err(e) => {
                // Before a client could see that it was stopped.
                if self.state() == State::Running
                    && let Err(e) = self.machine.resume_after_own_pause()
                {
                    log::error!("{}", Error::generic(&e));
                }
                self.fail_save(&e);
            }
        }
    }

    /// Give the thread the machine as it is, at rest. The guest runs again when this returns, if it is
    /// to and its memory could be copied aside.
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
            // Too much for that: a pause that clients see after all.
            (true, false) => self.apply(lifecycle::Event::Save)?,
            (false, _) if captured.is_err() => self.go_back(before)?,
            (false, _) => {}
        }
        let took = stopped.elapsed();
        let (config, epoch) = captured?;
        if self.saving.terms() == (Terms { resume: false, stream: true, dialogue: false }) {
            // Before the other side can know all that it needs to go on.
            self.machine.release_backends();
        }
        let current = self.saving.current.as_mut().ok_or(Failed::NoSave)?;
        current.stopped = Some(stopped);
        current.job.epoch(config, epoch);
        if own_pause && runs_again {
            current.downtime = Some(took);
            return Ok(Input::Captured);
        }
        Ok(Input::Held(before))
    }

    /// The machine, which stays stopped.
    fn epoch(
        &mut self,
        before: State,
        left: Option<Left>,
    ) -> Result<(state::Config, Epoch), Failed> {
        let current = self.saving.current.as_ref().ok_or(Failed::NoSave)?;
        let (id, how) = (current.id, current.how);
        // What was written up to this moment, so not before it is stopped.
        self.machine.pause()?;
        let changed = match (self.saving.logging, how.track) {
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
        let (dirty, staging) = match (left, &self.saving.base) {
            (Some(left), _) => (union(&left.ranges, &changed), left.staging),
            (None, Some(base)) if how.incremental => (base.since.clone(), None),
            (None, _) => (still.used_memory().map_err(Failed::Memory)?, None),
        };
        Ok((config, still.capture(id, dirty, staging)?))
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

    /// Back to what the VM was before it was stopped for the save.
    fn go_back(&mut self, before: State) -> Result<(), Refused> {
        let held = self.machine.hold_backends();
        self.rest(before)?;
        held?;
        if before == State::Running {
            self.apply(lifecycle::Event::Resume)?;
            if let Some(current) = &mut self.saving.current {
                current.downtime = current.stopped.map(|at| at.elapsed());
            }
        }
        Ok(())
    }

    /// The machine stays where the save has put it; its memory is not needed any more.
    fn rest(&mut self, before: State) -> Result<(), Refused> {
        self.apply(lifecycle::Event::Saved)?;
        match before {
            State::Halted(why) => self.apply(lifecycle::Event::Halt(why)),
            _ => Ok(()),
        }
    }

    /// The save is over, and the machine where it leads: tell all who want to know.
    fn finish_save(&mut self, result: Result<Option<Saved>, SaveError>) {
        self.end_log();
        let Some(current) = &mut self.saving.current else { return };
        let (by, took) = (current.by.take(), current.job.time());
        let failure = match (current.failed.take(), result) {
            (Some(why), _) => Some((MigrationStatus::Failed, why)),
            (None, Ok(_)) => None,
            (None, Err(SaveError::Cancelled)) => {
                Some((MigrationStatus::Canceled, "the save was cancelled".to_owned()))
            }
            (None, Err(e)) => Some((MigrationStatus::Failed, Error::generic(&e).to_string())),
        };
        match (&failure, current.downtime) {
            (None, Some(pause)) => {
                log::info!("saved in {took:?}; the guest was stopped for {pause:?}")
            }
            (None, None) => log::info!("saved in {took:?}"),
            (Some((_, why)), _) => log::warn!("not saved: {why}"),
        }
        let status = failure.as_ref().map_or(MigrationStatus::Completed, |f| f.0);
        self.saving.status = status;
        self.saving.error = failure.map(|f| f.1);
        self.tell(&Event::Migration { status });
        let reply = match &self.saving.error {
            None => Ok(Empty {}),
            Some(why) => Err(Error::text(why.clone())),
        };
        if let Some(by) = by {
            self.reply_to(&by, reply);
        }
    }

    fn reply_to(&mut self, ticket: &Ticket, reply: Result<Empty, Error>) {
        let reply =
            reply.and_then(|empty| serde_json::to_value(empty).map_err(|e| Error::generic(&e)));
        self.servers.reply(ticket, reply);
    }
}
