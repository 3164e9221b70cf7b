//! The first copy of the disks. Another thread reads them; this one sends what it says, in turn with
//! the rounds of memory.
use replication::{Epoch, Frame, Input, Message, wire};

use super::super::copier::{Told, Work};
use super::{Protector, Report};

/// Most pieces left for the epoch that ends the copy, unless passes do not get smaller: the guest's
/// writes to them wait until they were read.
const FEW: u64 = 8;
/// Most passes.
const MOST: u32 = 20;

/// How far the copy is.
#[derive(Default)]
pub struct DiskCopy {
    /// Its number; what belongs to an earlier one is late.
    number: u64,
    epoch: Epoch,
    passes: u32,
    /// Pieces that were left by the last pass.
    left: u64,
    /// What begins the copy of memory.
    asks: Option<Report>,
    stage: Stage,
}

#[derive(Default, PartialEq, Eq)]
enum Stage {
    /// Nothing is copied.
    #[default]
    Over,
    /// Everything is compared; memory is copied afterwards.
    All,
    /// Memory is copied.
    Memory,
    /// What has changed meanwhile is copied.
    Again,
    /// The first epoch is captured, and what has changed until then copied before it is sent.
    Rest(Option<Input>),
}

impl<R: Fn(Report)> Protector<R> {
    fn ask_disks(&self, work: Work) {
        if let Some(disks) = &self.task.disks {
            disks.ask(work);
        }
    }

    /// Copy the disks, and then memory, which `asks` begins; without it, that is asked for already.
    pub(super) fn copy_disks(&mut self, epoch: Epoch, asks: Option<Report>) {
        let number = self.disk_copy.number + 1;
        self.disk_copy =
            DiskCopy { number, epoch, passes: 0, left: u64::MAX, asks, stage: Stage::All };
        self.ask_disks(Work::Copy(number));
    }

    /// Whether memory is to be copied later; if what has changed there was given, it has to be asked
    /// for again then.
    pub(super) fn memory_waits(&mut self) -> bool {
        let waits = self.disk_copy.stage == Stage::All;
        if waits {
            self.disk_copy.asks = Some(Report::Harvest);
        }
        waits
    }

    /// Memory was copied meanwhile.
    pub(super) fn copy_disks_again(&mut self) {
        self.disk_copy.stage = Stage::Again;
        self.ask_disks(Work::Again);
    }

    /// An epoch was captured. If it is the first one, what has changed on the disks until then comes
    /// before it.
    pub(super) fn copy_rest_before(&mut self, input: Input) {
        match &mut self.disk_copy.stage {
            Stage::Rest(waits) => {
                *waits = Some(input);
                self.ask_disks(Work::Rest);
            }
            _ => self.inputs.push_back(input),
        }
    }

    /// The disks are not replicated any more.
    pub(super) fn leave_disks(&mut self) {
        self.disk_copy.stage = Stage::Over;
        self.disk_copy.number += 1;
        self.ask_disks(Work::Stop);
    }

    pub(super) fn disks_told(&mut self, number: u64, told: Told) {
        if number != self.disk_copy.number || self.disk_copy.stage == Stage::Over {
            return;
        }
        let (epoch, term) = (self.disk_copy.epoch, self.task.primary.term());
        match told {
            Told::Compare { disk, piece } => {
                let message = Message::Compare { disk, piece };
                self.outgoing.frame(wire::encode(&Frame { term, epoch, message }));
            }
            Told::Piece { disk, offset, data } => self.outgoing.piece(epoch, disk, offset, data),
            Told::Passed(left) => self.passed(left),
            Told::Rested => {
                let stage = std::mem::replace(&mut self.disk_copy.stage, Stage::Over);
                if let Stage::Rest(input) = stage {
                    self.inputs.extend(input);
                }
            }
            Told::Failed(why) => {
                self.lost(&why);
                self.leave_disks();
            }
        }
    }

    fn passed(&mut self, left: u64) {
        let copy = &mut self.disk_copy;
        copy.passes += 1;
        let shrinks = left < std::mem::replace(&mut copy.left, left) && copy.passes < MOST;
        match copy.stage {
            Stage::All => {
                copy.stage = Stage::Memory;
                copy.left = u64::MAX;
                if let Some(report) = copy.asks.take() {
                    self.ask(report);
                }
            }
            Stage::Again if left > FEW && shrinks => self.ask_disks(Work::Again),
            Stage::Again => {
                copy.stage = Stage::Rest(None);
                self.end_first_copy();
            }
            Stage::Over | Stage::Memory | Stage::Rest(_) => {}
        }
    }
}
