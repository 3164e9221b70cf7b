//! The memory of a backup, and the machine that is built from it when the primary is suspected.
use std::time::Instant;

use config::Description;
use qmp::schema::FailoverTimes;
use replication::{Epoch, Fault, From, Identity, Incarnation, Input, Term, Why};
use state::{Config, Frames, Sections};

use super::{Builder, Building, Promotion, Standby, Tell};
use crate::{checkpoint::Received, durations::microseconds};

impl<B: Builder, T: Fn(Tell)> Standby<B, T> {
    /// Memory is filled from here on: what it held is forgotten.
    pub(super) fn fill(&mut self) {
        self.coming.clear();
        self.machine = None;
        if !std::mem::replace(&mut self.filled, true) {
            return;
        }
        // This thread may not find out which pages are not zero.
        self.memory = None;
        let description = self.offered.as_ref().map(Description::try_from);
        match description.and_then(Result::ok).map(|machine| self.builder.room(machine)) {
            Some(Ok(memory)) => self.memory = Some(memory),
            other => {
                let why = other.and_then(Result::err).unwrap_or_default();
                log::error!("replication: there is no room for the machine any more: {why}");
                let current = self.current;
                self.close(current);
                self.inputs.extend(current.map(Input::Closed));
            }
        }
    }

    /// The epoch is whole: it counts from here on.
    pub(super) fn hold(&mut self, epoch: Epoch) {
        let Some(memory) = &self.memory else { return };
        if let Err(why) = self.read_state(self.coming.state()) {
            log::error!("replication: the state of the machine: {why}");
            self.coming.clear();
            return self.inputs.push_back(Input::NotHeld(epoch, Fault::Frame));
        }
        match self.coming.apply(memory) {
            Ok(machine) => {
                self.machine = Some((machine, Instant::now()));
                self.inputs.push_back(Input::Held(epoch));
            }
            Err(e) => {
                log::error!("replication: cannot write guest memory: {e}");
                self.inputs.push_back(Input::NotApplied);
            }
        }
    }

    /// Building the machine writes to its memory, and then its primary cannot come back. One whose
    /// connection has ended usually connects again at once.
    pub(super) fn prepare(&mut self) {
        match (self.why, self.settings) {
            (Why::Closed | Why::BadFrame | Why::Nack, Some(settings)) => {
                self.builds_at = Some(Instant::now() + settings.timeout / 4);
            }
            _ => self.build(),
        }
    }

    pub(super) fn build(&mut self) {
        match self.building {
            Building::Nothing => match self.received() {
                Ok(received) => {
                    self.applied = self.now();
                    self.building = Building::Machine(false);
                    self.builder.build(received);
                }
                Err(why) => {
                    log::error!("replication: {why}");
                    self.inputs.push_back(Input::CannotRun);
                }
            },
            // Another machine is being built, from an older epoch.
            Building::Machine(_) | Building::Taking(_) => self.inputs.push_back(Input::CannotRun),
        }
    }

    /// The machine of the last whole epoch.
    pub(super) fn received(&self) -> Result<Received, String> {
        let (Some((bytes, whole)), Some(memory)) = (&self.machine, &self.memory) else {
            return Err("there is no whole epoch".into());
        };
        let (config, mut sections) = self.read_state(bytes)?;
        // The guest's clock has advanced by this host's clock since.
        let passed = u64::try_from(whole.elapsed().as_nanos()).unwrap_or(0);
        let now = sections.clock.nanoseconds.saturating_add(passed);
        sections.clock.nanoseconds = now;
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

    /// The primary is back: this machine must not run. Building it has written to its memory, which
    /// is not that of the primary any more.
    pub(super) fn unprepare(&mut self) {
        if self.builds_at.take().is_some() {
            return;
        }
        match &mut self.building {
            Building::Machine(unwanted) => *unwanted = true,
            Building::Nothing | Building::Taking(_) => self.builder.forget(),
        }
        self.inputs.push_back(Input::NotApplied);
    }

    pub(super) fn take_built(&mut self) {
        let Some(answer) = self.builder.answer() else { return };
        let input = match (std::mem::replace(&mut self.building, Building::Nothing), &answer) {
            (Building::Machine(true), _) => {
                self.builder.forget();
                return;
            }
            (Building::Machine(false), Ok(())) => {
                self.applied = self.now().saturating_sub(self.applied);
                Input::Prepared
            }
            (Building::Taking(mark), Ok(())) => Input::Marked(mark),
            (Building::Nothing, _) => return,
            (_, Err(why)) => {
                log::error!("replication: the machine cannot run here: {why}");
                Input::CannotRun
            }
        };
        self.inputs.push_back(input);
    }

    pub(super) fn runs(&mut self, term: Term, from: From, promoted: Option<Incarnation>) {
        let (Some(settings), From::Epoch(epoch)) = (self.settings, from) else { return };
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
        let promotion = Promotion { me, term, promoted, settings, epoch, times, decided };
        // Unless the monitor ends.
        self.over.get_or_insert(Ok(promotion));
    }
}
