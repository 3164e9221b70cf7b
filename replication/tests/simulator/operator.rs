//! Who runs the hosts: starts what is dead, protects what is owned, and decides where only a person
//! may.
use replication::{Arbiter, Command, Input, Mark, OnLoss, Side, Time, backup, primary};

use crate::{node::Role, sim::Sim};

impl Sim {
    /// The operator of the hosts: starts what is dead, and protects what is owned. A start from a
    /// disk waits first, so that a living side asks before it; where only a person may decide, one
    /// does so who knows what is dead.
    pub fn operate(&mut self, healed: Time) -> Result<(), String> {
        let waited = self.now >= healed + self.settings.timeout * 10;
        let nobody = self.owner().is_none() && !self.is_protected();
        for i in 0..3 {
            let word = self.nodes[i].sidecar;
            let asks = matches!(word, Mark::Protected(_) | Mark::Fencing(_));
            let listens = self.nodes[i].backup_state() == Some(backup::State::Listening);
            // Where a policy keeps a side from asking, a start from the other disk would take the guest.
            let stalls = self.settings.on_loss == OnLoss::Stall && self.keeps().is_some();
            let tried = self.denied.contains(&(i, word));
            let from_disk = nobody && waited && asks && !stalls && !tried;
            if from_disk && listens {
                self.end(i, true);
            }
            if from_disk && !self.nodes[i].is_alive() {
                self.denied.insert((i, word));
            }
            self.restart(i, from_disk)?;
        }
        // The port is that of a process that listens.
        self.port[1] = if self.nodes[1].backup_state().is_some() { 1 } else { 2 };
        // Who decides by force waits for what was asked before.
        let asked = self.now < healed + self.settings.timeout * 25;
        let patient = !self.has_witness() && asked;
        if self.owner().is_none() && !self.is_protected() && waited && !patient {
            self.decide()?;
        }
        if let Some(owner) = self.owner() {
            self.input(owner, Input::Command(Command::Start))?;
            self.end_what_is_left(owner, waited);
        }
        Ok(())
    }

    /// Without a witness a process waits for its peer, or a person, without a limit. If another one
    /// has the guest, a person ends it.
    fn end_what_is_left(&mut self, owner: usize, waited: bool) {
        let term = self.nodes[owner].status().map(|status| status.term);
        for i in 0..3 {
            let state = self.nodes[i].backup_state();
            let waits = matches!(state, Some(backup::State::Suspecting | backup::State::Unfit));
            let old = self.nodes[i].status().map(|status| status.term) < term;
            // A start that asks a fence without end is given up, too.
            let starts = matches!(&self.nodes[i].role, Role::Start(start) if !start.is_over());
            if !self.has_witness() && waited && old && (waits || starts || self.is_kept(i)) {
                self.end(i, true);
            }
        }
    }

    /// Whether a primary keeps the guest, and waits.
    fn is_kept(&self, i: usize) -> bool {
        use primary::State::{Fenced, HandingOver, Stalled};
        matches!(self.nodes[i].primary_state(), Some(Stalled | Fenced | HandingOver(_)))
    }

    fn keeps(&self) -> Option<usize> {
        (0..3).find(|i| self.is_kept(*i))
    }

    fn has_witness(&self) -> bool {
        matches!(self.settings.agreement.arbiter, Arbiter::Witness(_))
    }

    /// Nobody may go on by itself: a person decides. A witness is still asked.
    fn decide(&mut self) -> Result<(), String> {
        let witness = self.has_witness();
        if witness && self.settings.on_loss != OnLoss::Stall {
            return Ok(());
        }
        for i in 0..3 {
            let starts = matches!(&self.nodes[i].role, Role::Start(start) if !start.is_over());
            if starts && !witness {
                self.end(i, true);
            }
        }
        let ordered = if witness { Input::Command } else { Input::Forced };
        let stands_by = |i: &usize| {
            let state = self.nodes[*i].backup_state();
            matches!(state, Some(backup::State::Standby | backup::State::Suspecting))
        };
        let released = |i: usize| {
            let state = self.nodes[i].primary_state();
            state == Some(primary::State::HandingOver(primary::Handing::Released))
        };
        match ((0..3).find(stands_by), self.keeps()) {
            // Without a witness, what gave it away may be lost.
            (Some(i), Some(j)) if released(j) => self.input(i, ordered(Command::Failover)),
            (Some(i), None) => self.input(i, ordered(Command::Failover)),
            (None, Some(i)) => self.input(i, ordered(Command::Unprotect)),
            (None, None) if !witness => self.start_by_force(),
            _ => Ok(()),
        }
    }

    /// `stratoctl start --force`, on the side that had the guest last.
    fn start_by_force(&mut self) -> Result<(), String> {
        let latest = |i: &usize| match self.nodes[*i].sidecar {
            Mark::Protected(bond) | Mark::Fencing(bond) => {
                Some((bond.term, bond.side == Side::Primary))
            }
            Mark::Fenced { term } | Mark::Outdated { term } => Some((term, false)),
            _ => None,
        };
        let Some(i) = (0..3).max_by_key(latest) else { return Ok(()) };
        if let Some((term, _)) = latest(&i) {
            self.end(i, true);
            self.nodes[i].sidecar = Mark::Running { term: term.next(), promoted: None };
            self.nodes[i].claims = None;
        }
        self.restart(i, true)
    }
}
