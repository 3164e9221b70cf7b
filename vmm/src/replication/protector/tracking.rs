//! What was written since the last epoch of a term that has ended: a backup that still holds that
//! epoch needs no more than this.
use std::{ops::Range, time::Duration};

use machine::memory::{self, image, staging};
use replication::{Epoch, Input, Time};

use super::{Protector, Report};

/// How often it is looked at how much that is.
const INTERVAL: Duration = Duration::from_secs(10);
/// It is kept while it is less than this part of memory: a copy of everything is as good then.
const PART: u64 = 4;

/// Pages that were written, as ranges of the memory file.
pub struct Tracked {
    /// Those that are in the log no longer.
    pub ranges: Vec<Range<u64>>,
    /// The log was asked for, and will be given.
    pub asked: bool,
    /// When it is asked for next.
    at: Time,
}

impl<R: Fn(Report)> Protector<R> {
    /// The term has ended, and the backup has `since` for certain.
    pub(super) fn track(&mut self, since: Epoch) {
        if self.broken.take().is_some() {
            return self.lose_track();
        }
        let later = self.staged.iter().filter(|staged| staged.epoch > since);
        let ranges = later.fold(Vec::new(), |all, one| image::union(&all, &one.pages.ranges()));
        self.tracked = Some(Tracked { ranges, asked: false, at: self.now() + INTERVAL });
    }

    /// It is not wanted any more.
    pub(super) fn untrack(&mut self) {
        if self.tracked.take().is_some() {
            (self.report)(Report::Unlog);
        }
    }

    /// It is not known what was written, or not worth knowing.
    pub(super) fn lose_track(&mut self) {
        self.untrack();
        self.inputs.push_back(Input::Untracked);
        if self.first_copy.as_ref().is_some_and(|copy| copy.warm) {
            self.lost(&"it is not known what the backup lacks");
        }
    }

    /// A copy to the backup begins, of what it lacks if it is `warm`.
    pub(super) fn begin_copy(&mut self, warm: bool) {
        self.warm = self.tracked.take().filter(|_| warm);
        if warm && self.warm.is_none() {
            // Track was lost at the moment when the backup was greeted.
            self.lost(&"it is not known what the backup lacks");
        }
    }

    /// These were written, too.
    pub(super) fn add_tracked(&mut self, ranges: &[Range<u64>]) {
        if let Some(copy) = &mut self.first_copy {
            copy.left = image::union(&copy.left, ranges);
        }
        let Some(tracked) = &mut self.tracked else { return };
        tracked.ranges = image::union(&tracked.ranges, ranges);
        tracked.asked = false;
        if staging::bytes(&tracked.ranges) >= memory::size(&self.task.memory) / PART {
            self.lose_track();
        }
    }

    pub(super) fn looks_at(&self) -> Option<Time> {
        self.tracked.as_ref().filter(|tracked| !tracked.asked).map(|tracked| tracked.at)
    }

    /// Ask for the log, if it is time.
    pub(super) fn look_at_tracked(&mut self) {
        let now = self.now();
        if self.looks_at().is_some_and(|at| at <= now)
            && let Some(tracked) = &mut self.tracked
        {
            (tracked.asked, tracked.at) = (true, now + INTERVAL);
            self.ask(Report::Harvest);
        }
    }
}
