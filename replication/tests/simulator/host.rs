//! What a host does for its process: carries out what the machine says, and checks it.
use replication::{
    Backup, Connection, Digest, From, Identity, Incarnation, Input, Mark, Message, Output, Primary,
    Start, Term,
};

use super::{Event, GUEST, Sim};
use crate::{guest::Guest, node::Role};

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
        self.after(delay, Event::Input(i, incarnation, input));
    }

    fn perform(&mut self, i: usize, before: Option<Term>, output: Output) -> Result<(), String> {
        let incarnation = self.nodes[i].incarnation;
        match output {
            Output::Send(over, frame) => {
                if let Some(ends) = self.ends.get(&over).copied() {
                    let to = if ends[0] == i { ends[1] } else { ends[0] };
                    let end = matches!(frame.message, Message::End { .. });
                    let guest = self.nodes[i]
                        .staged
                        .get(&frame.epoch)
                        .filter(|_| end)
                        .cloned()
                        .map(Box::new);
                    self.along(i, to, Event::Frame { from: i, to, over, frame, guest });
                }
            }
            Output::Close(over) => self.hang_up(i, over),
            Output::Dial => {
                let delay = self.jitter(200, 3000);
                self.after(delay, Event::Dialled(i, incarnation));
            }
            Output::Ask { nonce, question } => {
                if self.nodes[i].agent {
                    let delay = self.jitter(500, 5000);
                    self.after(delay, Event::Asked { by: i, incarnation, nonce, question });
                }
            }
            // Marks become durable in order: always after the same time.
            Output::Mark(mark) => self.done(i, 1000, 1000, Input::Marked(mark)),
            Output::Capture { epoch, shut } => {
                let node = &mut self.nodes[i];
                let digest = Digest(node.guest.digest());
                node.free &= !shut;
                node.epoch = epoch.next();
                node.staged.insert(epoch, node.guest.clone());
                node.staged.retain(|staged, _| staged.0 + 4 > epoch.0);
                if let Some(term) = before {
                    self.truth.insert((term, epoch), digest.0);
                }
                self.done(i, 300, 2000, Input::Captured { epoch, digest });
            }
            Output::ReleaseThrough(epoch) => {
                while let Some((_, reply)) = self.nodes[i].held.pop_front_if(|(of, _)| *of <= epoch)
                {
                    self.client.told(reply)?;
                }
            }
            Output::OpenGates => {
                self.nodes[i].free = true;
                for (_, reply) in std::mem::take(&mut self.nodes[i].held) {
                    self.client.told(reply)?;
                }
                let now = self.nodes[i].primary().map(Primary::term);
                if let Some(closed) = before.filter(|before| now > Some(*before)) {
                    self.solos += 1;
                    self.close(closed, "solo")?;
                }
            }
            Output::CloseTaps => {
                self.nodes[i].free = false;
            }
            Output::Park => self.nodes[i].parked = true,
            Output::Unpark => self.nodes[i].parked = false,
            Output::Hold(epoch) => self.done(i, 300, 300, Input::Held(epoch)),
            Output::Prepare(_) => self.done(i, 5000, 20_000, Input::Prepared),
            Output::DropAfter(_) => self.nodes[i].staged.clear(),
            Output::Run { term, from, promoted } => return self.run_here(i, term, from, promoted),
            Output::Exit(_) => self.end(i, true),
            Output::Unprepare | Output::Tell(_) => {}
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
            }
            From::Disk => self.nodes[i].guest = Guest::from_disk(self.nodes[i].disk),
        }
        let me = Identity { lineage: GUEST, incarnation: self.nodes[i].incarnation };
        let (owner, outputs) = Primary::owner(me, term, promoted, self.settings, self.rules);
        let node = &mut self.nodes[i];
        node.role = Role::Primary(owner);
        node.tick = None;
        (node.free, node.parked, node.runs) = (true, false, true);
        self.carry_out(i, None, outputs)
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
            self.along(i, to, Event::Closed { from: i, to, over });
        }
    }

    /// A process dies. If its host survives, its connections end.
    pub fn kill(&mut self, i: usize, host_lives: bool) {
        self.victims[i] = true;
        self.end(i, host_lives);
    }

    fn end(&mut self, i: usize, host_lives: bool) {
        self.nodes[i].die();
        let mine: Vec<Connection> =
            self.ends.iter().filter(|(_, ends)| ends.contains(&i)).map(|(over, _)| *over).collect();
        for over in mine {
            if host_lives {
                self.hang_up(i, over);
            }
            self.ends.remove(&over);
        }
    }

    /// Start a dead process again: from its disk if that is allowed, else to listen.
    pub fn restart(&mut self, i: usize, from_disk: bool) -> Result<(), String> {
        if self.nodes[i].is_alive() {
            return Ok(());
        }
        let (word, incarnation) = (self.nodes[i].sidecar, self.nodes[i].incarnation);
        let me = Identity { lineage: GUEST, incarnation };
        let runs = matches!(word, Mark::Running { .. } | Mark::Free { .. });
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
