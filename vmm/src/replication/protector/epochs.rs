//! The epochs of a primary: captured by the main thread, sent, and released.
use std::{io, ops::Range, sync::Arc};

use machine::{
    Gates, Pages, Taken,
    memory::{
        image::{self, PAGE_SIZE},
        staging::{self, Staging},
    },
};
use qmp::schema::ReplicationBlackhole;
use replication::{Answer, Command, Epoch, Input, Room, contents, pace::Cost, primary::State};
use state::config::Halted;

use super::super::{
    outgoing::{Outgoing, Staged},
    outside::Outside,
    process,
    rounds::Rounds,
};
use super::{FirstCopy, Order, Protector, Report, Tracked};
use crate::checkpoint::last_frames;

impl<R: Fn(Report)> Protector<R> {
    pub(super) fn capture(&mut self, epoch: Epoch, shut: bool) {
        if self.growing {
            // What has changed so far is part of it.
            self.postponed = Some((epoch, shut));
            return;
        }
        if self.task.primary.state() == State::Syncing {
            self.forget_all();
            let warm = self.warm.is_some();
            let (asks, left) = match self.warm.take() {
                None => (Some(Report::Log), Vec::new()),
                Some(Tracked { ranges, asked: false, .. }) => (Some(Report::Harvest), ranges),
                Some(Tracked { ranges, .. }) => (None, ranges),
            };
            self.first_copy =
                Some(FirstCopy { epoch, shut, rounds: Rounds::default(), left, warm });
            return match self.task.disks {
                // Memory comes after them.
                Some(_) => self.copy_disks(epoch, asks),
                None => asks.into_iter().for_each(|report| self.ask(report)),
            };
        }
        if self.task.manner.blackhole == Some(ReplicationBlackhole::Harvest) {
            self.harvesting = Some(epoch);
            return self.ask(Report::Harvest);
        }
        let mut staging = self.spare.pop().unwrap_or_default();
        let left = std::mem::take(&mut self.grown);
        let room = staging::room_for(self.copied.max(staging::bytes(&left)));
        if let Err(e) = staging.touch(room.min(self.task.manner.max_staging)) {
            log::warn!("replication: no memory for copies yet: {e}");
        }
        self.ask_capture(epoch, shut, left, staging);
    }

    fn ask_capture(&mut self, epoch: Epoch, shut: bool, left: Vec<Range<u64>>, staging: Staging) {
        // What is copied already counts, too.
        let most = self.task.manner.max_staging.saturating_sub(self.staged_bytes());
        self.ask(Report::Capture { epoch, shut, left, staging, most });
    }

    /// Report what the main thread answers, in the order of these reports.
    pub(super) fn ask(&mut self, report: Report) {
        self.asked += 1;
        (self.report)(report);
    }

    /// An answer has come; whether it is still of use.
    pub(super) fn is_answer(&mut self) -> bool {
        self.asked = self.asked.saturating_sub(1);
        let late = self.late > 0;
        self.late = self.late.saturating_sub(1);
        !late
    }

    /// Nothing is held any more. What is being captured belongs to what has ended here.
    pub(super) fn open_gates(&mut self) {
        self.gates.iter_mut().for_each(Gates::open);
        (self.report)(Report::Released(None));
        self.late = self.asked;
        (self.first_copy, self.harvesting) = (None, None);
        let grown = std::mem::take(&mut self.grown);
        if !grown.is_empty() {
            self.add_tracked(&grown);
        }
        (self.growing, self.postponed) = (false, None);
        self.leave_disks();
        self.forget_all();
    }

    /// The backup cannot follow in this term: it is left there.
    pub(super) fn breaks(&mut self, why: &dyn std::fmt::Display) {
        log::error!("replication: {why}: the backup cannot follow any more");
        self.broken = Some(self.task.primary.term());
        self.lose_track();
        self.lost(why);
    }

    pub(super) fn release(&mut self, epoch: Epoch) {
        self.release_through(epoch);
        (self.report)(Report::Released(Some(epoch)));
        self.look_for_room();
    }

    pub(super) fn release_through(&mut self, epoch: Epoch) {
        if let Some(gates) = &mut self.gates {
            gates.release(epoch.0);
        }
        let (term, acked) =
            (self.task.primary.term(), |staged: &&Arc<Staged>| staged.epoch <= epoch);
        let mut history = self.task.history.lock();
        for staged in self.staged.iter().take_while(acked) {
            history.released(term, staged.epoch);
        }
        drop(history);
        while let Some(staged) = self.staged.pop_front_if(|staged| staged.epoch <= epoch) {
            self.forget(staged);
        }
    }

    fn forget_all(&mut self) {
        while let Some(staged) = self.staged.pop_front() {
            self.forget(staged);
        }
    }

    fn forget(&mut self, staged: Arc<Staged>) {
        if let Pages::InPlace(_) = staged.pages {
            (self.report)(Report::Copied);
        }
        // Unless it is still being sent, which an acknowledgement makes impossible.
        if let Ok(Staged { pages: Pages::Staged(staging), .. }) = Arc::try_unwrap(staged) {
            self.spare.push(staging);
        }
    }

    /// Bytes of memory that are copied aside.
    pub(super) fn staged_bytes(&self) -> u64 {
        self.staged.iter().map(|staged| staged.pages.copied()).sum()
    }

    fn output_waits(&self) -> bool {
        self.gates.as_ref().is_some_and(Gates::wait)
    }

    /// Begin an epoch soon if output waits for one.
    pub(super) fn look_for_output(&mut self) {
        if self.task.manner.longest.is_some() && self.output_waits() {
            self.inputs.push_back(Input::OutputWaits(true));
        }
    }

    /// How full staging is, or the gates.
    pub(super) fn look_for_room(&mut self) {
        let staged = self.staged_bytes();
        let grown = staging::bytes(&self.grown);
        let held = self.gates.as_ref().map_or(0, |gates| gates.backlog().bytes as u64);
        let part = |of: u64, most: u64| of.saturating_mul(100).checked_div(most).unwrap_or(100);
        let manner = &self.task.manner;
        let room = match part(staged + grown, manner.max_staging).max(part(held, manner.max_held)) {
            0..75 => Room::Ample,
            75..100 => Room::Scarce,
            _ => Room::None,
        };
        self.inputs.push_back(Input::Room(room));
    }

    pub(super) fn take_orders(&mut self) {
        while let Ok(order) = self.task.orders.try_recv() {
            self.take(order);
        }
    }

    pub(super) fn take(&mut self, order: Order) {
        match order {
            Order::Logging(filled) => {
                let true = self.is_answer() else { return };
                let Some(copy) = &self.first_copy else { return };
                match image::used(&self.task.memory, &filled) {
                    Ok(ranges) => self.outgoing.round(copy.epoch, ranges),
                    Err(e) => self.lost(&format_args!("cannot find out what memory is used: {e}")),
                }
            }
            Order::Changed(changed) => {
                let awaited = self.is_answer();
                if awaited && let Some(epoch) = self.harvesting.take() {
                    return self.stage_nothing(epoch);
                }
                if awaited && std::mem::take(&mut self.growing) {
                    return self.grows(&changed);
                }
                let waits = awaited && self.memory_waits();
                let Some(copy) = self.first_copy.as_mut().filter(|_| awaited) else {
                    return self.add_tracked(&changed);
                };
                let changed = image::union(&std::mem::take(&mut copy.left), &changed);
                if waits {
                    copy.left = changed;
                    return;
                }
                if copy.rounds.again(&changed) {
                    return self.outgoing.round(copy.epoch, changed);
                }
                copy.left = changed;
                match self.task.disks {
                    Some(_) => self.copy_disks_again(),
                    None => self.end_first_copy(),
                }
            }
            Order::Copied(number, told) => self.disks_told(number, told),
            Order::Marked(mark) => self.inputs.push_back(Input::Marked(mark)),
            Order::Captured { epoch, taken, pause, outside, gates } => {
                if let Some(gates) = gates {
                    if self.task.manner.longest.is_some() {
                        gates.signal(self.task.wake.eventfd());
                    }
                    self.gates = Some(gates);
                }
                if !self.is_answer() {
                    self.add_tracked(&taken.pages.ranges());
                    if let Pages::InPlace(_) = taken.pages {
                        (self.report)(Report::Copied);
                    }
                    // It has shut them after they had been opened.
                    self.gates.iter_mut().for_each(Gates::open);
                    return (self.report)(Report::Released(None));
                }
                let held = self.gates.as_ref().map_or(0, |gates| gates.backlog().bytes);
                let name = (self.task.primary.term(), epoch);
                let pages = staging::bytes(&taken.pages.ranges()) / PAGE_SIZE;
                self.task.history.lock().captured(name, &pause, pages, held);
                self.faults.captured(self.now(), taken.system, pages);
                let cost = Cost { pause: pause.all, pages, fault: self.faults.each() };
                self.copied = taken.pages.copied();
                match self.stage(epoch, *taken, *outside) {
                    Ok(input) => {
                        match self.task.disks {
                            Some(_) => self.copy_rest_before(input),
                            None => self.inputs.push_back(input),
                        }
                        self.inputs.push_back(Input::Cost(cost));
                        self.inputs.push_back(Input::OutputWaits(self.output_waits()));
                        self.look_for_room();
                    }
                    Err(e) => self.breaks(&format_args!("cannot encode {epoch:?}: {e}")),
                }
            }
            Order::Failed(why) => match self.is_answer() {
                true => self.breaks(&why),
                false => self.lose_track(),
            },
            Order::Answered { nonce, question, answer } => {
                let arbiter = &self.task.offer.host.arbiter;
                if answer != Answer::Down || process::may_be_down(arbiter, &mut self.backup) {
                    self.inputs.push_back(Input::Answered { nonce, question, answer });
                }
            }
            Order::Connected(connection) => self.connected(connection),
            Order::Beside(socket) => self.beside.set_socket(socket),
            Order::Command(input) => self.inputs.push_back(input),
            // It is protected again already.
            Order::Again { .. } if self.task.primary.state() != State::Degraded => {}
            Order::Again { settings, arbiter, way, manner } => {
                self.broken = None;
                self.task.offer.host.arbiter = arbiter;
                (self.task.offer.timeout, self.task.way) = (settings.timeout, way);
                self.task.primary.set(settings);
                self.task.offer.heartbeat = manner.heartbeat;
                manner.set_rhythm(&mut self.task.primary);
                self.outgoing = Outgoing::new(self.task.memory.clone(), manner.compress);
                self.task.manner = manner;
                self.inputs.push_back(Input::Command(Command::Start));
            }
        }
    }

    /// An epoch for which nothing is captured.
    fn stage_nothing(&mut self, epoch: Epoch) {
        let (pages, state, outside) = (Pages::Staged(Staging::default()), Vec::new(), Vec::new());
        let staged = Staged { epoch, pages, state, outside, writes: None };
        self.staged.push_back(Arc::new(staged));
        self.inputs.push_back(Input::Captured { epoch, digest: self.last_digest });
    }

    /// So much has changed while no epoch could begin.
    fn grows(&mut self, changed: &[Range<u64>]) {
        self.grown = image::union(&self.grown, changed);
        match self.postponed.take() {
            Some((epoch, shut)) => self.capture(epoch, shut),
            None => self.look_for_room(),
        }
    }

    /// Capture the first epoch: little is left to be sent.
    pub(super) fn end_first_copy(&mut self) {
        let Some(FirstCopy { epoch, shut, left, .. }) = self.first_copy.take() else { return };
        match Staging::touched(staging::room_for(staging::bytes(&left))) {
            Ok(staging) => self.ask_capture(epoch, shut, left, staging),
            Err(e) => self.lost(&format_args!("no memory for copies: {e}")),
        }
    }

    pub(super) fn stage(
        &mut self,
        epoch: Epoch,
        Taken { state, pages, .. }: Taken,
        outside: (Outside, Option<Halted>),
    ) -> io::Result<Input> {
        let (mut outside, halted) = outside;
        self.task.offer.config.halted = halted;
        let state = last_frames(&self.task.offer.config, state)?;
        outside.output = self.gates.as_ref().map_or_else(Vec::new, |gates| gates.output(epoch.0));
        let digest = contents::chain(self.last_digest, [crc32fast::hash(&state)]);
        self.last_digest = digest;
        let writes = self.task.disks.as_ref().and_then(|disks| disks.disks.take(epoch.0));
        let outside = outside.encode();
        self.staged.push_back(Arc::new(Staged { epoch, pages, state, outside, writes }));
        Ok(Input::Captured { epoch, digest })
    }
}
