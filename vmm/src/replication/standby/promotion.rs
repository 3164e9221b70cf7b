//! The memory of a backup, and the machine that is built from it when the primary is suspected.
use std::{io, time::Instant};

use config::Description;
use qmp::schema::FailoverTimes;
use replication::{Epoch, Fault, From, Identity, Incarnation, Input, Term, Why};
use state::{Config, Frames, Sections};

use super::super::outside::Outside;
use super::{Builder, Building, Moment, Postponed, Promotion, Standby, Tell, Whole};
use crate::{checkpoint::Received, durations::microseconds};

impl<B: Builder, T: Fn(Tell)> Standby<B, T> {
    /// What changes memory waits until it is that of the last epoch again.
    pub(super) fn once_put_back(&mut self, next: Postponed) {
        match (self.building, next) {
            (Building::Forgetting(_), _) => self.postponed = Some(next),
            (_, Postponed::Fill(base)) => self.fill(base),
            (_, Postponed::Hold(epoch)) => self.hold(epoch),
        }
    }

    /// Memory is filled from here on. Without a `base`, what it held is forgotten.
    fn fill(&mut self, base: Option<Epoch>) {
        self.coming.clear();
        self.kept.forget();
        self.whole = None;
        if !std::mem::replace(&mut self.filled, true) || base.is_some() {
            return;
        }
        // This thread may not find out which pages are not zero.
        self.memory = None;
        let description = self.offered.as_ref().map(Description::try_from);
        match description.and_then(Result::ok).map(|machine| self.builder.room(machine, None)) {
            Some(Ok(memory)) => self.memory = Some(memory),
            other => {
                let why = other.and_then(Result::err).unwrap_or_default();
                log::error!("replication: there is no room for the machine any more: {why}");
                self.leave_current();
            }
        }
    }

    /// The epoch is whole: it counts from here on.
    fn hold(&mut self, epoch: Epoch) {
        let Some(memory) = &self.memory else { return };
        let read = self.read_state(self.coming.state());
        let outside = self.coming.outside().ok_or("what was seen outside is not valid".into());
        let outside = match read.and(outside) {
            Ok(outside) => outside,
            Err(why) => {
                log::error!("replication: the state of the machine: {why}");
                self.coming.clear();
                return self.inputs.push_back(Input::NotHeld(epoch, Fault::Frame));
            }
        };
        if self.kept.is_some() {
            return self.keep(epoch, outside);
        }
        let applied = self.coming.apply(memory);
        self.holds(epoch, applied, outside, self.ended);
    }

    /// Memory is that of `epoch`, with this state of the machine, unless it could not be written.
    /// Returns whether it is.
    pub(super) fn holds(
        &mut self,
        epoch: Epoch,
        applied: io::Result<Vec<u8>>,
        outside: Outside,
        ended: Moment,
    ) -> bool {
        let holds = applied.is_ok();
        self.inputs.push_back(match applied {
            Ok(machine) => {
                self.whole = Some(Whole { machine, outside, ended });
                Input::Held(epoch)
            }
            Err(e) => {
                log::error!("replication: cannot write guest memory: {e}");
                Input::NotApplied
            }
        });
        holds
    }

    /// A primary whose connection has ended usually connects again at once, and would have to wait
    /// until memory is put back.
    pub(super) fn prepare(&mut self) {
        self.kept.settle();
        match (self.why, self.settings) {
            (Why::Closed | Why::BadFrame | Why::Nack, Some(settings)) => {
                self.builds_at = Some(Instant::now() + settings.timeout / 4);
            }
            _ => self.build(),
        }
    }

    pub(super) fn build(&mut self) {
        match (self.building, self.received()) {
            (Building::Forgetting(_), _) => self.building = Building::Forgetting(true),
            (Building::Nothing, Ok(received)) if !self.built => {
                self.applied = self.now();
                self.building = Building::Machine;
                self.builder.build(received);
            }
            (_, other) => {
                let why = other.err().unwrap_or_else(|| "there is a machine already".into());
                log::error!("replication: {why}");
                self.inputs.push_back(Input::CannotRun);
            }
        }
    }

    /// The machine of the last whole epoch.
    pub(super) fn received(&self) -> Result<Received, String> {
        let (Some(whole), Some(memory)) = (&self.whole, &self.memory) else {
            return Err("there is no whole epoch".into());
        };
        let (config, sections) = self.read_state(&whole.machine)?;
        Ok(Received { config, sections, memory: memory.clone() })
    }

    /// The configuration and the state of the machine that memory is for.
    pub(super) fn read_state(&self, bytes: &[u8]) -> Result<(Config, Sections), String> {
        let read = || {
            let mut frames = Frames::begin(bytes).map_err(state::FileError::from)?;
            let (config, sections) = (frames.config()?, frames.sections()?);
            frames.end()?;
            Ok((config, sections))
        };
        let read = read().map_err(|e: state::FileError| qmp::Error::generic(&e).to_string());
        read.and_then(|(config, sections)| match self.is_offered(&config) {
            true => Ok((config, sections)),
            false => Err("it is of another machine than the one that was offered".into()),
        })
    }

    pub(super) fn is_offered(&self, config: &Config) -> bool {
        self.offered.as_ref().is_some_and(|offered| offered.machine == config.machine)
    }

    /// The primary is back: this machine must not run, and memory is put back as the primary knows
    /// it.
    pub(super) fn unprepare(&mut self) {
        self.kept.forget_settling();
        self.builds_at = None;
        match self.building {
            Building::Forgetting(_) => self.building = Building::Forgetting(false),
            Building::Nothing if !self.built => {}
            // What is being done is answered first.
            Building::Nothing | Building::Machine | Building::Taking(_) => {
                self.unwanted = self.building != Building::Nothing;
                self.building = Building::Forgetting(false);
                self.builder.forget();
            }
        }
    }

    pub(super) fn take_built(&mut self) {
        while self.building != Building::Nothing
            && let Some(answer) = self.builder.answer()
        {
            if !std::mem::take(&mut self.unwanted) {
                self.is_built(answer);
            }
        }
    }

    fn is_built(&mut self, answer: Result<(), String>) {
        let building = std::mem::replace(&mut self.building, Building::Nothing);
        self.built = matches!(building, Building::Machine | Building::Taking(_)) && answer.is_ok();
        let input = match (building, &answer) {
            (Building::Forgetting(again), _) => {
                return self.put_back(again, answer);
            }
            (Building::Machine, Ok(())) => {
                self.applied = self.now().saturating_sub(self.applied);
                if self.kept.settles() {
                    return;
                }
                Input::Prepared
            }
            (Building::Taking(mark), Ok(())) => Input::Marked(mark),
            (Building::Nothing, Ok(())) => return,
            (_, Err(why)) => {
                log::error!("replication: the machine cannot run here: {why}");
                Input::CannotRun
            }
        };
        self.inputs.push_back(input);
    }

    /// Memory is that of the last epoch again, or lost.
    fn put_back(&mut self, again: bool, answer: Result<(), String>) {
        let next = self.postponed.take();
        if let Err(why) = answer {
            log::error!("replication: memory is lost: {why}");
            self.inputs.push_back(Input::NotApplied);
            match next {
                Some(Postponed::Fill(None)) => self.fill(None),
                Some(Postponed::Fill(Some(_))) => self.leave_current(),
                Some(Postponed::Hold(_)) | None => {}
            }
            return;
        }
        if let Some(next) = next {
            self.once_put_back(next);
        }
        if again {
            self.build();
        }
    }

    /// Close the connection in use.
    fn leave_current(&mut self) {
        let current = self.current;
        self.close(current);
        self.inputs.extend(current.map(Input::Closed));
    }

    pub(super) fn runs(&mut self, term: Term, from: From, promoted: Option<Incarnation>) {
        let (Some(settings), From::Epoch(epoch)) = (self.settings, from) else { return };
        let Some(Whole { outside, ended, .. }) = self.whole.take() else { return };
        let me = Identity { lineage: self.lineage, incarnation: self.task.incarnation };
        let since =
            |later: Instant, earlier| microseconds(later.saturating_duration_since(earlier));
        let times = FailoverTimes {
            detect_us: since(self.suspected, self.heard),
            decide_us: since(self.decided, self.suspected),
            apply_us: microseconds(self.applied),
            run_us: 0,
        };
        let decided = self.decided;
        let disks = self.disks;
        let promotion = Promotion {
            me,
            term,
            promoted,
            settings,
            disks,
            epoch,
            ended,
            outside,
            times,
            decided,
        };
        // Unless the monitor ends.
        self.over.get_or_insert(Ok(promotion));
    }
}
