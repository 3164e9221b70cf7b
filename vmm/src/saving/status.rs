//! Status of saves: of the one under way, or of the last one.
use std::{
    path::Path,
    time::{Duration, Instant},
};

use qmp::{Error, schema::MigrationStatus, server::Ticket};

use super::{
    dirty_log::DirtyLog,
    disks,
    phase::{Phase, Terms},
    start::{How, SaveRequest},
};
use crate::checkpoint::{
    Saved,
    job::{Checkpointer, Job},
};

/// Status of saves.
pub(crate) struct Saving {
    pub(super) thread: Checkpointer,
    pub(super) save: Save,
    pub(super) log: DirtyLog,
    /// Whether receivers answer, if a client has set it.
    pub(crate) return_path: Option<bool>,
}

/// The save under way, or how the last one ended.
pub(super) enum Save {
    /// There has been none.
    None,
    UnderWay(Box<UnderWay>),
    Over(Box<Over>),
}

/// A save under way.
pub(super) struct UnderWay {
    pub(super) phase: Phase,
    pub(super) job: Job,
    pub(super) id: u128,
    pub(super) how: How,
    pub(super) terms: Terms,
    /// Copies of disks in the making, by the disks' ids.
    pub(super) disks: Vec<disks::Named>,
    /// The client that waits for the answer.
    pub(super) by: Ticket,
    pub(super) fate: Fate,
    pub(super) stop: Stop,
}

/// What is to become of a save.
pub(super) enum Fate {
    /// It is wanted.
    Wanted,
    /// The main thread cannot do its part; the reason.
    Failed(String),
    /// It is to end without a result, because a client has cancelled it or for another reason.
    Cancelled {
        /// The reason, if no client has cancelled it.
        why: Option<String>,
        /// The save that starts when this one is over.
        next: Option<Next>,
    },
}

/// A save that waits for a cancelled one to end.
pub(super) struct Next {
    pub(super) asked: SaveRequest,
    /// Until when.
    pub(super) until: Instant,
}

/// How long the guest has been stopped for a save.
#[derive(Clone, Copy)]
pub(super) enum Stop {
    /// It was not stopped.
    Never,
    /// It has been stopped since then.
    Since(Instant),
    /// It was stopped for that long, and runs again.
    For(Duration),
}

/// A save that is over.
pub(super) struct Over {
    pub(super) status: MigrationStatus,
    /// The reason, if it failed.
    pub(super) error: Option<String>,
    /// How long the guest was stopped, if it runs on.
    pub(super) downtime: Option<Duration>,
    /// `None` if it could not start.
    pub(super) job: Option<Job>,
    /// A save requested while this one was being cancelled.
    pub(super) next: Option<SaveRequest>,
}

impl Saving {
    pub(crate) fn new(thread: Checkpointer) -> Self {
        Self { thread, save: Save::None, log: DirtyLog::Off, return_path: None }
    }

    /// Directory of the save that an incremental one would build on.
    pub(crate) fn base(&self) -> Option<&Path> {
        self.log.base().map(Saved::path)
    }

    /// The save under way, or else the last one.
    pub(crate) fn job(&self) -> Option<&Job> {
        match &self.save {
            Save::None => None,
            Save::UnderWay(save) => Some(&save.job),
            Save::Over(over) => over.job.as_ref(),
        }
    }

    pub(crate) fn status(&self) -> MigrationStatus {
        match &self.save {
            Save::None => MigrationStatus::default(),
            Save::UnderWay(save) => save.status(),
            Save::Over(over) => over.status,
        }
    }

    pub(crate) fn error(&self) -> Option<&str> {
        match &self.save {
            Save::Over(over) => over.error.as_deref(),
            Save::None | Save::UnderWay(_) => None,
        }
    }

    /// How long the guest was stopped, if it runs again.
    pub(crate) fn downtime(&self) -> Option<Duration> {
        match &self.save {
            Save::None => None,
            Save::UnderWay(save) => save.stop.over(),
            Save::Over(over) => over.downtime,
        }
    }

    /// Whether a save is under way, or changes are tracked for the next one.
    pub(crate) fn is_busy(&self) -> bool {
        self.under_way().is_some() || self.log.is_on()
    }

    /// The handle of the thread.
    pub(crate) fn thread(&self) -> &Checkpointer {
        &self.thread
    }

    pub(super) fn under_way(&self) -> Option<&UnderWay> {
        match &self.save {
            Save::UnderWay(save) => Some(save),
            Save::None | Save::Over(_) => None,
        }
    }

    pub(super) fn under_way_mut(&mut self) -> Option<&mut UnderWay> {
        match &mut self.save {
            Save::UnderWay(save) => Some(save),
            Save::None | Save::Over(_) => None,
        }
    }

    /// The save that waits for a cancelled one to end.
    pub(super) fn next(&mut self) -> Option<&mut Option<Next>> {
        match &mut self.under_way_mut()?.fate {
            Fate::Cancelled { next, .. } => Some(next),
            Fate::Wanted | Fate::Failed(_) => None,
        }
    }
}

impl UnderWay {
    pub(super) fn status(&self) -> MigrationStatus {
        match self.fate {
            Fate::Wanted | Fate::Failed(_) => MigrationStatus::Active,
            Fate::Cancelled { .. } => MigrationStatus::Cancelling,
        }
    }

    /// Make the save fail, for this reason if there was none before.
    pub(super) fn fail(&mut self, reason: String) {
        match &mut self.fate {
            Fate::Wanted => self.fate = Fate::Failed(reason),
            Fate::Failed(_) => {}
            Fate::Cancelled { why, .. } => drop(why.get_or_insert(reason)),
        }
    }

    /// Cancel the save, unless it counts already; whether this call has cancelled it.
    pub(super) fn cancel(&mut self) -> bool {
        if matches!(self.fate, Fate::Cancelled { .. }) || !self.job.cancel() {
            return false;
        }
        let why = match std::mem::replace(&mut self.fate, Fate::Wanted) {
            Fate::Failed(why) => Some(why),
            Fate::Wanted | Fate::Cancelled { .. } => None,
        };
        self.fate = Fate::Cancelled { why, next: None };
        self.abandon_disks();
        true
    }
}

impl Over {
    /// The result of a save that could not start.
    pub(super) fn at_once(why: &Error) -> Self {
        let (status, error) = (MigrationStatus::Failed, Some(why.to_string()));
        Self { status, error, downtime: None, job: None, next: None }
    }
}

impl Fate {
    /// Why the save failed, apart from the thread's own reason; and the save that waits for it.
    pub(super) fn end(self) -> (Option<String>, Option<Next>) {
        match self {
            Self::Wanted => (None, None),
            Self::Failed(why) => (Some(why), None),
            Self::Cancelled { why, next } => (why, next),
        }
    }
}

impl Stop {
    /// How long the guest was stopped, once it runs again.
    pub(super) fn over(self) -> Option<Duration> {
        match self {
            Self::Never | Self::Since(_) => None,
            Self::For(time) => Some(time),
        }
    }

    /// The guest runs again.
    pub(super) fn end(self) -> Self {
        match self {
            Self::Since(at) => Self::For(at.elapsed()),
            Self::Never | Self::For(_) => self,
        }
    }
}
