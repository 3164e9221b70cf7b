//! What a host does for its process: carries out what the machine says, and checks it.
use replication::{
    Backup, Connection, Digest, Epoch, Frame, From, Identity, Incarnation, Input, Mark, Message,
    Output, Primary, Room, Start, Term,
};

use super::{Event, GUEST, Sim, ms};
use crate::{
    guest::{Guest, Pages, Seen},
    node::{Role, Storage},
};

/// How much may be held.
const CAP: usize = 200;

impl Sim {
    pub(super) fn carry_out(
        &mut self,
        i: usize,
        before: Option<Term>,
        outputs: Vec<Output>,
    ) -> Result<(), String> {
        for output in outputs {
            if let Some(left) = &mut self.nodes[i].doom {
                if *left == 0 {
                    self.kill(i, true);
                    return Ok(());
                }
                *left -= 1;
            }
            self.perform(i, before, output)?;
        }
        let (now, node) = (self.now, &mut self.nodes[i]);
        if let Some(at) = node.deadline()
            && node.tick.is_none_or(|tick| at < tick)
        {
            node.tick = Some(at);
            self.after(at.saturating_sub(now), Event::Tick(i));
        }
        Ok(())
    }

    fn done(&mut self, i: usize, least: u64, most: u64, input: Input) {
        let delay = self.jitter(least, most);
        let incarnation = self.nodes[i].incarnation;
        self.nodes[i].pending += 1;
        self.after(delay, Event::Input(i, incarnation, input));
    }

    /// As [`Sim::done`], by the storage: one after the other.
    fn stored(&mut self, i: usize, input: Input) {
        let end = self.nodes[i].busy.max(self.now) + self.jitter(300, 2000);
        self.nodes[i].busy = end;
        let wait = (end - self.now).as_micros() as u64;
        self.done(i, wait, wait, input);
    }

    /// What the guest lets others see: at once, or held.
    pub(super) fn let_out(&mut self, i: usize, seen: Seen) -> Result<(), String> {
        let node = &mut self.nodes[i];
        if node.free {
            return self.show(i, seen);
        }
        let covered = node.held.back().is_none_or(|(epoch, _)| *epoch < node.epoch);
        node.held.push_back((node.epoch, seen));
        if self.pace.is_some() && covered {
            self.input(i, Input::OutputWaits(true))?;
        }
        self.measure(i, false)
    }

    /// The world sees it. The host of a guest that has powered itself off ends the process.
    fn show(&mut self, i: usize, seen: Seen) -> Result<(), String> {
        match seen {
            Seen::Reply(reply) => self.client.told(reply),
            Seen::Off => {
                self.client.off(self.nodes[i].guest.counter);
                let incarnation = self.nodes[i].incarnation;
                let quit = Input::Command(replication::Command::Quit);
                self.after(ms(1), Event::Input(i, incarnation, quit));
                Ok(())
            }
        }
    }

    /// Inform the process of how full it is.
    fn measure(&mut self, i: usize, again: bool) -> Result<(), String> {
        let node = &mut self.nodes[i];
        let room = match node.held.len() {
            0..100 => Room::Ample,
            100..CAP => Room::Scarce,
            _ => Room::None,
        };
        if node.held.len() > CAP {
            return Err(format!("process {i} holds {} (I5)", node.held.len()));
        }
        let changed = std::mem::replace(&mut node.room, room) != room;
        let eases = again && (room == Room::Scarce || node.throttle > 0);
        if changed || eases { self.input(i, Input::Room(room)) } else { Ok(()) }
    }

    /// Send a frame; with an `End`, its pages.
    fn send(&mut self, i: usize, over: Connection, frame: Frame) {
        let Some(ends) = self.ends.get(&over).copied() else { return };
        let to = if ends[0] == i { ends[1] } else { ends[0] };
        let mut pages = None;
        if let (Message::End { .. }, Some(guest)) =
            (frame.message, self.nodes[i].staged.get(&frame.epoch))
        {
            pages = Some(match &self.nodes[i].base {
                Some((first, base)) if *first == frame.epoch => guest.since(base),
                _ => Pages::All(Box::new(guest.clone())),
            });
        }
        let slow = if pages.is_some() { self.slow } else { 0 };
        // Its pages are heard while they arrive; what is sent behind them waits.
        let begin = self.last.get(&(i, to)).map_or(self.now, |last| self.now.max(*last));
        for piece in (0..slow).step_by(50) {
            let at = begin - self.now + ms(piece + self.delay);
            self.after(at, Event::Piece { from: i, to, over });
        }
        let slow = if slow > 0 { slow + (begin - self.now).as_millis() as u64 } else { 0 };
        self.along(i, to, slow, Event::Frame { from: i, to, over, frame, pages });
    }

    fn hold(&mut self, i: usize, epoch: Epoch) {
        let node = &mut self.nodes[i];
        if let Some(pages) = node.arriving.take() {
            node.received.insert(epoch, pages);
        }
        let counter = node.received.get(&epoch).map_or(0, Pages::counter);
        match node.storage {
            Storage::Works => {
                if !node.filling {
                    let whole = node.status().map_or(Epoch(0), |status| status.epoch);
                    node.disk.append(epoch, counter);
                    node.disk.work(whole, &mut self.random);
                }
                node.holding.push_back((epoch, true));
                self.stored(i, Input::Held(epoch));
            }
            Storage::Hangs => node.hung.push(epoch),
            Storage::Full => {
                node.holding.push_back((epoch, true));
                self.stored(i, Input::NotHeld(epoch, replication::Fault::Disk));
            }
        }
    }

    /// Its storage works again, and does what it was asked to.
    pub fn mend(&mut self, i: usize) {
        self.nodes[i].storage = Storage::Works;
        for epoch in std::mem::take(&mut self.nodes[i].hung) {
            if self.nodes[i].received.contains_key(&epoch) {
                self.hold(i, epoch);
            }
        }
    }

    fn capture(&mut self, i: usize, before: Option<Term>, epoch: Epoch, shut: bool) {
        let node = &mut self.nodes[i];
        let digest = Digest(node.guest.digest());
        node.free &= !shut;
        node.epoch = epoch.next();
        node.staged.insert(epoch, node.guest.clone());
        node.staged.retain(|staged, _| staged.0 + 4 > epoch.0);
        if let Some((first, _)) = &mut node.base
            && *first == Epoch(0)
        {
            *first = epoch;
        }
        if let Some(term) = before {
            self.truth.insert((term, epoch), digest.0);
        }
        self.done(i, 300, 2000, Input::Captured { epoch, digest });
    }

    fn perform(&mut self, i: usize, before: Option<Term>, output: Output) -> Result<(), String> {
        let incarnation = self.nodes[i].incarnation;
        match output {
            Output::Send(over, frame) => {
                self.check_armed(frame)?;
                if frame.message == Message::Ack {
                    let node = &mut self.nodes[i];
                    node.disk.promised = node.guest.counter;
                }
                self.send(i, over, frame);
            }
            Output::BeatBeside => self.beat_beside(i),
            Output::Close(over) => self.hang_up(i, over),
            Output::Dial => {
                let delay = self.jitter(200, 3000);
                self.after(delay, Event::Dialled(i, incarnation));
            }
            Output::Ask { nonce, question } => {
                self.asked.push((nonce, question));
                if self.nodes[i].agent {
                    let delay = self.jitter(500, 5000);
                    self.after(delay, Event::Asked { by: i, incarnation, nonce, question });
                }
            }
            Output::Mark(mark) => {
                self.nodes[i].marking.push_back(mark);
                self.stored(i, Input::Marked(mark));
            }
            Output::Sync { base } => {
                let kept = std::mem::take(&mut self.nodes[i].kept);
                self.nodes[i].base = match base {
                    None => None,
                    Some(base) => {
                        self.warm += 1;
                        let guest = kept.get(&base).cloned();
                        Some((Epoch(0), guest.ok_or(format!("{base:?} was not kept"))?))
                    }
                };
            }
            Output::Track { since } => {
                let node = &mut self.nodes[i];
                node.kept = std::mem::take(&mut node.staged);
                node.kept.retain(|epoch, _| *epoch >= since);
            }
            Output::Untrack => self.nodes[i].kept.clear(),
            Output::Fill { base } => {
                let node = &mut self.nodes[i];
                (node.filling, node.disk.promised) = (true, 0);
                if base.is_none() {
                    self.nodes[i].guest = Guest::new();
                    self.full += 1;
                }
            }
            Output::Capture { epoch, shut } => {
                self.capture(i, before, epoch, shut);
                self.measure(i, true)?;
            }
            Output::ReleaseThrough(epoch) => {
                self.check_release(i, before, epoch)?;
                while let Some((_, seen)) = self.nodes[i].held.pop_front_if(|(of, _)| *of <= epoch)
                {
                    self.show(i, seen)?;
                }
                self.measure(i, false)?;
            }
            Output::OpenGates => {
                self.nodes[i].free = true;
                for (_, seen) in std::mem::take(&mut self.nodes[i].held) {
                    self.show(i, seen)?;
                }
                self.nodes[i].room = Room::Ample;
                let now = self.nodes[i].primary().map(Primary::term);
                if let Some(closed) = before.filter(|before| now > Some(*before)) {
                    self.solos += 1;
                    self.close(closed, "solo")?;
                }
            }
            Output::Throttle(percent) => self.nodes[i].throttle = percent,
            Output::Harvest => {}
            Output::CloseTaps => {
                self.nodes[i].free = false;
            }
            Output::Park => self.nodes[i].parked = true,
            Output::Unpark => self.nodes[i].parked = false,
            Output::Hold(epoch) => self.hold(i, epoch),
            Output::Prepare(_) => {
                self.nodes[i].disk.settle();
                self.done(i, 5000, 20_000, Input::Prepared);
            }
            Output::DropAfter(epoch) => {
                let node = &mut self.nodes[i];
                node.received.clear();
                node.hung.clear();
                node.holding.iter_mut().for_each(|(_, counts)| *counts = false);
                node.disk.drop_after(epoch);
            }
            Output::Run { term, from, promoted } => return self.run_here(i, term, from, promoted),
            Output::Exit(_) => self.end(i, true),
            Output::Tell(_) => self.told.push(output),
            Output::Unprepare => {}
        }
        Ok(())
    }

    fn run_here(
        &mut self,
        i: usize,
        term: Term,
        from: From,
        promoted: Option<Incarnation>,
    ) -> Result<(), String> {
        let closed = Term(term.0.saturating_sub(1));
        match from {
            From::Epoch(epoch) => {
                self.promotions += 1;
                self.close(closed, "promote")?;
                if self.truth.get(&(closed, epoch)) != Some(&self.nodes[i].guest.digest()) {
                    return Err(format!("memory is not that of epoch {} (I2, I6)", epoch.0));
                }
                if self.released.get(&closed).is_some_and(|out| *out > epoch) {
                    return Err(format!("output of after epoch {} is out (I2)", epoch.0));
                }
                if self.nodes[i].disk.last() != self.nodes[i].guest.counter {
                    return Err(format!("the disk is not that of epoch {} (I7)", epoch.0));
                }
            }
            From::Disk => {
                self.cold += 1;
                self.check_cold(i)?;
                self.nodes[i].guest = Guest::from_disk(self.nodes[i].disk.last());
            }
        }
        let me = Identity { lineage: GUEST, incarnation: self.nodes[i].incarnation };
        let (mut owner, outputs) = Primary::owner(me, term, promoted, self.settings, self.rules);
        owner.pace(self.pace.clone(), self.strict);
        let node = &mut self.nodes[i];
        node.role = Role::Primary(owner);
        node.tick = None;
        (node.free, node.parked, node.runs) = (true, false, true);
        node.staged.clear();
        self.carry_out(i, None, outputs)?;
        // Its last act is done again: others may not have seen it.
        if self.nodes[i].guest.off { self.show(i, Seen::Off) } else { Ok(()) }
    }

    fn close(&mut self, term: Term, how: &'static str) -> Result<(), String> {
        match self.closed.insert(term, how) {
            None => Ok(()),
            Some(other) => Err(format!("{term} was closed by {other} and by {how} (I3)")),
        }
    }

    fn hang_up(&mut self, i: usize, over: Connection) {
        if let Some(ends) = self.ends.get(&over).copied() {
            let to = if ends[0] == i { ends[1] } else { ends[0] };
            self.along(i, to, 0, Event::Closed { from: i, to, over });
        }
    }

    /// A process dies. If its host survives, its connections end.
    pub fn kill(&mut self, i: usize, host_lives: bool) {
        self.victims[i] = true;
        if host_lives { self.end(i, true) } else { self.lose_power(i) }
    }

    pub fn lose_power(&mut self, i: usize) {
        self.nodes[i].disk.cut(&mut self.random);
        self.end(i, false);
    }

    /// It ends by itself.
    pub fn end(&mut self, i: usize, host_lives: bool) {
        let node = &mut self.nodes[i];
        // Of the words that it was writing, some may have reached the disk.
        for mark in std::mem::take(&mut node.marking) {
            if self.random.bool() {
                break;
            }
            node.sidecar = mark;
        }
        let incarnation = node.incarnation;
        node.die();
        if self.local {
            self.tell_of_end(i, incarnation);
        }
        let mine: Vec<Connection> =
            self.ends.iter().filter(|(_, ends)| ends.contains(&i)).map(|(over, _)| *over).collect();
        for over in mine {
            if host_lives {
                self.hang_up(i, over);
            }
            self.ends.remove(&over);
        }
    }

    /// The kernel tells the others; what the process has sent is read before.
    fn tell_of_end(&mut self, i: usize, incarnation: Incarnation) {
        for to in (0..3).filter(|to| *to != i) {
            let last = self.last.get(&(i, to)).map_or(self.now, |last| self.now.max(*last));
            let delay = last - self.now + self.jitter(100, 2000);
            self.after(delay, Event::Gone { to, incarnation });
        }
    }

    /// Start a dead process again: from its disk if that is allowed, else to listen.
    pub fn restart(&mut self, i: usize, from_disk: bool) -> Result<(), String> {
        if self.nodes[i].is_alive() {
            return Ok(());
        }
        let (word, mut incarnation) = (self.nodes[i].sidecar, self.nodes[i].incarnation);
        self.nodes[i].disk.recover(word)?;
        let runs = matches!(word, Mark::Running { .. } | Mark::Free { .. });
        if let (Mark::Protected(bond) | Mark::Fencing(bond), true) = (word, from_disk) {
            incarnation = self.nodes[i].claimant(bond, self.random.bool());
        }
        let me = Identity { lineage: GUEST, incarnation };
        let outputs = if runs || from_disk {
            let (start, outputs) = Start::new(me, word, self.settings, self.rules);
            self.nodes[i].role = Role::Start(start);
            outputs
        } else {
            let (backup, outputs) = Backup::new(me, word, self.settings, self.rules);
            self.nodes[i].role = Role::Backup(backup);
            outputs
        };
        self.carry_out(i, None, outputs)
    }
}
