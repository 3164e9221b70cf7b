//! The images of a backup's disks, which another thread keeps: what this one asks it, and what
//! becomes of the answers.
use std::collections::VecDeque;

use config::Description;
use lineage::{Entry, Lineage, Place};
use replication::{
    Connection as Number, Epoch, Fault, Frame, Input, Mark, Message, backup::State,
    primary::UNACKNOWLEDGED, wire,
};

use super::super::{
    disks::named,
    keeper::{Done, Keeper, Work},
    outside::Outside,
    received::Received as Arriving,
};
use super::{Builder, Building, Moment, Standby, Tell};

/// Most bytes that wait to be written to images that are being filled, before nothing more is read.
/// A primary sends a quarter of it before it waits for an answer.
const MOST_QUEUED: usize = 64 << 20;

/// Most epochs that wait for storage, with those that were dropped: while it hangs, each connection
/// brings the same ones again.
const MOST_WAITING: usize = 2 * UNACKNOWLEDGED;

/// An epoch, what else it brings, and when it had come.
type Contents = (Arriving, Outside, Moment);

/// An epoch that is not durable yet.
struct Waiting {
    epoch: Epoch,
    /// None if it was dropped: its answer is still to come, and is not that for an epoch of the same
    /// number which has come again since.
    contents: Option<Contents>,
}

/// What is known of the images.
pub struct Kept {
    keeper: Keeper,
    /// Sizes in bytes; empty if no disk is replicated.
    sizes: Vec<u64>,
    /// What the sidecars said when they were opened.
    entry: Option<Entry>,
    /// Epochs that are not durable yet.
    waiting: VecDeque<Waiting>,
    /// The number of the last question whether they are settled, and whether that is known.
    question: u64,
    settled: bool,
    /// Everything else was prepared meanwhile.
    built: bool,
}

impl Kept {
    /// Images that will be opened by this thread.
    pub fn new(keeper: Keeper) -> Self {
        Self {
            keeper,
            sizes: Vec::new(),
            entry: None,
            waiting: VecDeque::new(),
            question: 0,
            settled: true,
            built: false,
        }
    }

    /// Whether disks are replicated.
    pub fn is_some(&self) -> bool {
        !self.sizes.is_empty()
    }

    /// Their sizes.
    pub fn sizes(&self) -> Vec<u64> {
        self.sizes.clone()
    }

    /// The guest that they are of, and what their sidecars said.
    pub fn bound(&self) -> Option<(Lineage, Mark)> {
        self.entry.as_ref().map(|entry| (entry.lineage, entry.mark))
    }

    /// Ask the thread.
    pub fn ask(&self, work: Work) {
        self.keeper.ask(work);
    }

    /// Whether more may be written to images that are being filled.
    pub fn has_room(&self) -> bool {
        self.keeper.queued() < MOST_QUEUED
    }

    /// They are filled again from the start.
    pub fn forget(&mut self) {
        self.waiting.iter_mut().for_each(|waits| waits.contents = None);
        self.forget_settling();
    }

    /// Epochs after this one do not count.
    pub fn drop_after(&mut self, epoch: Epoch) {
        let dropped = self.waiting.iter_mut().filter(|waits| waits.epoch > epoch);
        dropped.for_each(|waits| waits.contents = None);
        if self.is_some() {
            self.ask(Work::DropAfter(epoch));
        }
    }

    /// Ask the thread to keep an epoch, unless too many wait already. Whether it was asked.
    fn keep(&mut self, epoch: Epoch, work: Work, contents: Contents) -> bool {
        let has_room = self.waiting.len() < MOST_WAITING;
        if has_room {
            self.ask(work);
            self.waiting.push_back(Waiting { epoch, contents: Some(contents) });
        }
        has_room
    }

    /// The thread has answered for this epoch, in the order in which it was asked. Nothing if the
    /// epoch was dropped meanwhile.
    fn answered(&mut self, epoch: Epoch) -> Option<Contents> {
        self.waiting.pop_front_if(|waits| waits.epoch == epoch)?.contents
    }

    /// Have everything brought into the images.
    pub fn settle(&mut self) {
        self.built = false;
        if self.is_some() {
            self.question += 1;
            self.settled = false;
            self.ask(Work::Settle(self.question));
        }
    }

    /// The machine is built: whether that is waited for.
    pub fn settles(&mut self) -> bool {
        self.built = !self.settled;
        self.built
    }

    /// The guest is not about to run any more.
    pub fn forget_settling(&mut self) {
        self.question += 1;
        (self.settled, self.built) = (true, false);
    }
}

impl<B: Builder, T: Fn(Tell)> Standby<B, T> {
    /// Open the images of the machine that is offered, if it has disks and they are replicated.
    pub(super) fn open_images(&mut self, description: &Description) -> Result<(), String> {
        let wanted = if self.disks { self.builder.disks(description)? } else { Vec::new() };
        (self.kept.sizes, self.kept.entry) = (Vec::new(), None);
        if wanted.is_empty() {
            return Ok(());
        }
        let sizes = wanted.iter().map(|disk| disk.size).collect();
        self.kept.entry = self.kept.keeper.open(wanted)?;
        // What was asked before has been answered.
        self.kept.waiting.clear();
        self.kept.sizes = sizes;
        Ok(())
    }

    /// Which guest they are of is known.
    pub(super) fn bind_images(&self) {
        if self.kept.is_some() {
            self.kept.ask(Work::Bind(self.lineage, named(&self.task.arbiter)));
        }
    }

    /// The primary asks what is in a piece.
    pub(super) fn compare(&self, number: Number, disk: u16, piece: u64) -> Result<(), String> {
        let size = self.kept.sizes.get(usize::from(disk)).copied().unwrap_or(0);
        let filling = self.backup.as_ref().is_some_and(|b| b.state() == State::Syncing);
        if !filling || self.current != Some(number) || piece >= lineage::pieces::count(size) {
            return Err(format!("piece {piece} of disk {disk} cannot be compared"));
        }
        self.kept.ask(Work::Compare { connection: number.0, disk, piece });
        Ok(())
    }

    /// An epoch has come: it counts once it is durable.
    pub(super) fn keep(&mut self, epoch: Epoch, outside: Outside) {
        let Some(backup) = &self.backup else { return };
        let mut coming = std::mem::take(&mut self.coming);
        let written = coming.take_written();
        let work = match backup.state() {
            State::Syncing => Work::First(Place { term: backup.term(), epoch }),
            _ => Work::Append(epoch, written),
        };
        if !self.kept.keep(epoch, work, (coming, outside, self.ended)) {
            log::error!("replication: the storage of the disks hangs");
            self.inputs.push_back(Input::NotHeld(epoch, Fault::Disk));
        }
    }

    /// Follow the thread's answers.
    pub(super) fn take_done(&mut self) {
        while let Some(done) = self.kept.keeper.done() {
            self.follow(done);
            self.take_inputs();
        }
    }

    fn follow(&mut self, done: Done) {
        match done {
            Done::Opened(_) => {}
            Done::Piece { connection, disk, piece, hash } => {
                let Some(backup) = &self.backup else { return };
                let message = Message::Piece { disk, piece, hash };
                let frame = Frame { term: backup.term(), epoch: backup.whole(), message };
                if let Some(peer) = self.peer(Number(connection)) {
                    peer.connection.send(wire::encode(&frame));
                }
            }
            Done::NotFilled(why) => self.hang_up(&why),
            Done::Durable(epoch, result) => self.durable(epoch, result),
            Done::NotApplied(why) => {
                log::error!("replication: the images of the disks: {why}");
                self.inputs.push_back(Input::NotApplied);
            }
            Done::Settled(number, result) => self.settled(number, result),
            Done::Marked(mark @ Mark::Running { .. }) => self.take_backends(mark),
            Done::Marked(mark) => self.inputs.push_back(Input::Marked(mark)),
            Done::NotMarked(why) => {
                log::error!("replication: the sidecars of the disks: {why}");
                // Before the first step of the guest here, its primary continues instead.
                match self.backup.as_ref().is_some_and(|b| b.state() == State::Promoting) {
                    true => self.inputs.push_back(Input::CannotRun),
                    false => self.hang_up("the sidecars of the disks cannot be written"),
                }
            }
        }
    }

    fn hang_up(&mut self, why: &str) {
        if let Some(number) = self.current {
            self.lost(number, why);
        }
    }

    fn durable(&mut self, epoch: Epoch, result: Result<(), String>) {
        let (Some(contents), Some(memory)) = (self.kept.answered(epoch), &self.memory) else {
            return;
        };
        let (mut coming, outside, ended) = contents;
        if let Err(why) = result {
            log::error!("replication: the journal of the disks: {why}");
            return self.inputs.push_back(Input::NotHeld(epoch, Fault::Disk));
        }
        let applied = coming.apply(memory);
        if self.holds(epoch, applied, outside, ended) {
            self.kept.ask(Work::Apply(epoch));
        }
    }

    fn settled(&mut self, number: u64, result: Result<(), String>) {
        if number != self.kept.question || self.kept.settled {
            return;
        }
        self.kept.settled = true;
        match result {
            Ok(()) if std::mem::take(&mut self.kept.built) => {
                self.inputs.push_back(Input::Prepared)
            }
            Ok(()) => {}
            Err(why) => {
                log::error!("replication: the images of the disks: {why}");
                self.inputs.push_back(Input::CannotRun);
            }
        }
    }

    /// Have the machine take its disks and taps, as `mark` says.
    pub(super) fn take_backends(&mut self, mark: Mark) {
        self.building = Building::Taking(mark);
        self.builder.take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wake::Wake;

    #[test]
    fn an_epoch_that_comes_again_waits_for_its_own_answer_and_few_wait() {
        let mut kept = Kept::new(Keeper::new(Wake::new().unwrap()).0);
        kept.sizes = vec![512];
        let keep = |kept: &mut Kept, epoch| {
            let contents = (Arriving::default(), Outside::default(), Moment::now());
            kept.keep(Epoch(epoch), Work::Append(Epoch(epoch), Vec::new()), contents)
        };
        assert!(keep(&mut kept, 3) && keep(&mut kept, 4));
        kept.drop_after(Epoch(3));
        assert!(keep(&mut kept, 4));
        assert!(kept.answered(Epoch(3)).is_some());
        assert!(kept.answered(Epoch(4)).is_none(), "that was of the one which was dropped");
        assert!(kept.answered(Epoch(4)).is_some());
        // The link breaks again and again, and storage hangs.
        let taken = (0..20).filter(|_| {
            kept.drop_after(Epoch(4));
            keep(&mut kept, 5)
        });
        assert_eq!(taken.count(), MOST_WAITING);
    }
}
