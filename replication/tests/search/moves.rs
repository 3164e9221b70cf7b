//! Everything that may happen next.
use replication::{
    Backup, Command, Connection, Frame, Identity, Input, Mark, Message, Question, Start, Timer,
    backup, primary,
};

use crate::world::{Bounds, GUEST, Role, Wire, World};

/// Something that may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// A timer of a process fires.
    Timer(usize, Timer),
    /// The first frame from one process to another arrives.
    Deliver(usize, usize),
    /// The last one is lost, with its connection.
    Drop(usize, usize),
    /// A process learns that its connection has ended.
    Closed(usize, Connection),
    /// A connection is made.
    Connect(usize, usize),
    /// What a process has begun is done.
    Complete(usize),
    /// The witness answers a question.
    Decide(usize),
    /// The answer arrives; or is lost.
    Answer(usize),
    Lose(usize),
    /// A command of a client.
    Command(usize, Command),
    /// A backup cannot run what it was granted.
    CannotRun(usize),
    Kill(usize),
    /// A process is started again: from its disk, or to listen.
    Start(usize),
    Listen(usize),
    Cut,
    Heal,
}

pub fn moves(world: &World, bounds: &Bounds) -> Vec<Move> {
    let mut moves = Vec::new();
    for i in 0..world.nodes.len() {
        of_process(world, bounds, i, &mut moves);
    }
    for (from, to) in world.frames.keys() {
        moves.push(Move::Deliver(*from, *to));
        let last = world.frames[&(*from, *to)].back().map(|(over, _)| *over);
        let broken = |wire: &Wire| wire.broken && Some(wire.connection) == last;
        if world.wires.iter().any(broken) {
            moves.push(Move::Drop(*from, *to));
        }
    }
    for wire in world.wires.iter().filter(|wire| wire.broken) {
        for end in [wire.primary, wire.backup] {
            if world.connection(end) == Some(wire.connection) {
                moves.push(Move::Closed(end, wire.connection));
            }
        }
    }
    moves.extend((0..world.questions.len()).map(Move::Decide));
    for n in 0..world.answers.len() {
        moves.push(Move::Answer(n));
        if world.lost > 0 {
            moves.push(Move::Lose(n));
        }
    }
    match world.up {
        true if world.cuts > 0 => moves.push(Move::Cut),
        true => {}
        false => moves.push(Move::Heal),
    }
    moves
}

fn of_process(world: &World, bounds: &Bounds, i: usize, moves: &mut Vec<Move>) {
    let node = &world.nodes[i];
    for timer in world.armed(i) {
        let idle = match timer {
            Timer::Period => {
                world.primary(i).is_none_or(|primary| primary.begun().0 >= bounds.epochs)
            }
            Timer::Ask => world.is_asked(i),
            Timer::Dial => node.dialling,
            _ => false,
        };
        if !idle {
            moves.push(Move::Timer(i, timer));
        }
    }
    if node.pending.iter().any(|done| world.is_possible(bounds, i, done)) {
        moves.push(Move::Complete(i));
    }
    if node.dialling && world.up {
        for (j, peer) in world.nodes.iter().enumerate() {
            if bounds.hosts[j] != bounds.hosts[i] && matches!(peer.role, Role::Backup(_)) {
                moves.push(Move::Connect(i, j));
            }
        }
    }
    match &node.role {
        Role::Dead => {
            let listens = !matches!(node.sidecar, Mark::Free { .. } | Mark::Running { .. });
            if listens {
                moves.push(Move::Listen(i));
            }
            if !matches!(node.sidecar, Mark::Outdated { .. } | Mark::Inconsistent { .. }) {
                moves.push(Move::Start(i));
            }
        }
        Role::Primary(primary) => {
            let alone = matches!(primary.state(), primary::State::Off | primary::State::Degraded);
            // Epochs of attempts that have failed count: their numbers are not used again.
            let room = primary.term().0 <= bounds.terms && primary.begun().0 < bounds.epochs;
            if alone && room && !node.parked {
                moves.push(Move::Command(i, Command::Start));
            }
            if primary.state() == primary::State::Protected && world.commands > 0 {
                moves.push(Move::Command(i, Command::Unprotect));
                moves.push(Move::Command(i, Command::Quit));
                if primary.is_protected() {
                    moves.push(Move::Command(i, Command::Failover));
                }
            }
        }
        Role::Backup(backup) => {
            if backup.state() == backup::State::Promoting && world.kills > 0 {
                moves.push(Move::CannotRun(i));
            }
        }
        Role::Start(_) => {}
    }
    let idle = match &node.role {
        Role::Dead => true,
        Role::Backup(backup) => backup.state() == backup::State::Listening,
        _ => false,
    };
    if world.kills > 0 && !idle {
        moves.push(Move::Kill(i));
    }
}

/// The world after `step`, in which every process carries out at most `most` outputs; then the
/// process that acted dies. `None` if it has carried out all.
pub fn after(world: &World, bounds: &Bounds, step: Move, most: Option<usize>) -> Option<World> {
    let mut next = world.clone();
    let mut left = most.unwrap_or(usize::MAX);
    let acts = next.act(bounds, step, &mut left);
    if let Some(_most) = most {
        let (i, all) = acts?;
        if all {
            return None;
        }
        next.kill(i);
    }
    next.normalise();
    Some(next)
}

impl World {
    fn kill(&mut self, i: usize) {
        self.kills -= 1;
        self.die(i);
    }

    /// Do `step`. Which process has acted, and whether to the end.
    fn act(&mut self, bounds: &Bounds, step: Move, most: &mut usize) -> Option<(usize, bool)> {
        let (i, input) = match step {
            Move::Timer(i, timer) => {
                self.make_due(i, timer);
                (i, Input::Tick)
            }
            Move::Deliver(from, to) => {
                let (over, frame) = self.frames.get_mut(&(from, to))?.pop_front()?;
                // A connection that is new to its reader has to begin with a greeting.
                let known = self.connection(to) == Some(over);
                if !known && !matches!(frame.message, Message::Hello(_)) {
                    return None;
                }
                (to, Input::Received(over, frame))
            }
            Move::Drop(from, to) => {
                self.frames.get_mut(&(from, to))?.pop_back();
                return None;
            }
            Move::Closed(i, connection) => {
                self.sever(connection, Some(i));
                (i, Input::Closed(connection))
            }
            Move::Connect(i, j) => {
                self.nodes[i].dialling = false;
                // At most one greeting is on its way: an earlier one that was not read is gone with
                // its connection. That it was read before is another path.
                if let Some(queue) = self.frames.get_mut(&(i, j)) {
                    let greets =
                        |(_, frame): &(_, Frame)| matches!(frame.message, Message::Hello(_));
                    let unread = queue.iter().position(greets).unwrap_or(queue.len());
                    queue.truncate(unread);
                }
                let last = self.wires.iter().map(|wire| wire.connection).max();
                let connection = Connection(last.map_or(1, |last| last.0 + 1));
                self.wires.push(Wire { connection, primary: i, backup: j, broken: false });
                (i, Input::Connected(connection))
            }
            Move::Complete(i) => {
                let pending = &self.nodes[i].pending;
                let at = pending.iter().position(|done| self.is_possible(bounds, i, done))?;
                let done = self.nodes[i].pending.remove(at)?;
                (i, self.complete(bounds, i, done)?)
            }
            Move::Decide(n) => {
                let (i, incarnation, nonce, question) = self.questions.remove(n);
                let answer = match question {
                    Question::Fence { term } => self.fence(bounds, i, term),
                    _ => Some(self.witness.step(GUEST, question).answer),
                };
                self.answers.extend(answer.map(|it| (i, incarnation, nonce, question, it)));
                return None;
            }
            Move::Answer(n) => {
                let (i, _, nonce, question, answer) = self.answers.remove(n);
                (i, Input::Answered { nonce, question, answer })
            }
            Move::Lose(n) => {
                self.answers.remove(n);
                self.lost -= 1;
                return None;
            }
            Move::Command(i, command) => {
                self.commands -= u8::from(command != Command::Start);
                (i, Input::Command(command))
            }
            Move::CannotRun(i) => {
                self.kills -= 1;
                (i, Input::CannotRun)
            }
            Move::Kill(i) => {
                let node = &mut self.nodes[i];
                node.incarnation.0 += 1;
                self.kill(i);
                return None;
            }
            Move::Start(i) => {
                let node = &self.nodes[i];
                let me = Identity { lineage: GUEST, incarnation: node.incarnation };
                let (start, outputs) =
                    Start::new(me, node.sidecar, bounds.settings(), bounds.rules);
                self.nodes[i].role = Role::Start(Box::new(start));
                self.carry_out(bounds, i, outputs, None, most);
                return None;
            }
            Move::Listen(i) => {
                let node = &mut self.nodes[i];
                let me = Identity { lineage: GUEST, incarnation: node.incarnation };
                let (backup, outputs) =
                    Backup::new(me, node.sidecar, bounds.settings(), bounds.rules);
                node.role = Role::Backup(Box::new(backup));
                self.carry_out(bounds, i, outputs, None, most);
                return None;
            }
            Move::Cut => {
                self.cuts -= 1;
                self.up = false;
                self.wires.iter_mut().for_each(|wire| wire.broken = true);
                return None;
            }
            Move::Heal => {
                self.up = true;
                return None;
            }
        };
        let all = self.input(bounds, i, input, most);
        if !all {
            self.nodes[i].incarnation.0 += 1;
        }
        Some((i, all))
    }
}
