//! What has come of an epoch so far, and what may come next.
use super::{
    Bounds, Counts, LONGEST_SECTION, Operation, PAGE, Refused,
    digest::Chain,
    frame::{BEGIN, CLOSE, SECTION},
};
use crate::identity::{Digest, Epoch, Term};

/// A section of which not all pieces have come.
#[derive(Debug, Clone, Copy)]
struct Partial {
    name: usize,
    total: u32,
    next: u32,
}

/// Where in an epoch the connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// No contents are expected.
    Nothing,
    /// Before `Begin` of the next epoch.
    Between,
    /// After `Begin`.
    Open,
    /// After `Close`: the message `End` is next.
    Closed,
}

/// The state of a connection as far as contents are concerned.
pub struct Rounds {
    pub bounds: Bounds,
    term: Term,
    /// The epoch that is open, or the last one.
    epoch: Epoch,
    stage: Stage,
    /// More rounds of the same epoch may come.
    filling: bool,
    serial: u32,
    /// For each page, the round in which it came last; 0 for none.
    last: Vec<u32>,
    /// Likewise for each section.
    sections: Vec<u32>,
    partial: Option<Partial>,
    sequence: u32,
    chain: Chain,
    /// Since the last `Close`.
    counts: Counts,
    /// Pages in this round.
    pages: u64,
    /// At most.
    announced: u64,
    /// What this round needs, in bytes.
    needs: u64,
}

impl Rounds {
    pub fn new(bounds: Bounds) -> Self {
        Self {
            last: vec![0; bounds.pages()],
            sections: vec![0; bounds.sections.len()],
            bounds,
            term: Term(0),
            epoch: Epoch(0),
            stage: Stage::Nothing,
            filling: false,
            serial: 0,
            partial: None,
            sequence: 0,
            chain: Chain::after(Digest(0)),
            counts: Counts::default(),
            pages: 0,
            announced: 0,
            needs: 0,
        }
    }

    /// Contents of the epochs after `last` may come.
    pub fn accept(&mut self, term: Term, last: Epoch, filling: bool) {
        (self.term, self.epoch, self.filling, self.stage) = (term, last, filling, Stage::Between);
    }

    /// A frame of this kind with these numbers came.
    pub fn check(&self, kind: u32, term: Term, epoch: Epoch) -> Result<(), Refused> {
        if self.stage == Stage::Nothing {
            return Err(Refused::Outside(kind));
        }
        if term != self.term {
            return Err(Refused::Term { expected: self.term, got: term });
        }
        let expected = match (self.stage, kind) {
            (Stage::Open, BEGIN) if self.filling => self.epoch,
            (Stage::Open, BEGIN) | (Stage::Between, BEGIN) => self.epoch.next(),
            (Stage::Open, _) => self.epoch,
            _ => return Err(Refused::Outside(kind)),
        };
        if self.partial.is_some() && kind != SECTION {
            return Err(Refused::Section);
        }
        // An epoch that is open has to be closed before the next one.
        if epoch != expected || (kind == BEGIN && self.stage == Stage::Open && !self.filling) {
            return Err(Refused::Epoch { expected, got: epoch });
        }
        Ok(())
    }

    /// The crc of a frame with contents, or of one that is skipped.
    pub fn covers(&mut self, kind: u32, crc: u32) {
        if self.stage == Stage::Open && kind != CLOSE {
            self.chain.add(crc);
        }
    }

    pub fn begin(&mut self, epoch: Epoch, serial: u32, pages: u64) -> Result<(), Refused> {
        let expected = self.serial.saturating_add(1);
        if serial != expected || serial == u32::MAX {
            return Err(Refused::Serial { expected, got: serial });
        }
        (self.epoch, self.serial, self.stage) = (epoch, serial, Stage::Open);
        (self.pages, self.announced, self.needs, self.sequence) = (0, pages, 0, 0);
        Ok(())
    }

    /// `length` more bytes, besides what each record needs.
    pub fn need(&mut self, length: u64) -> Result<(), Refused> {
        let most = self.bounds.most(self.filling);
        self.needs = self.needs.saturating_add(length.saturating_add(Bounds::RECORD));
        if self.needs > most { Err(Refused::TooMuch(most)) } else { Ok(()) }
    }

    /// Pages came: they are memory, and came for the first time in this round. With `base`, it is
    /// the round in which they came last.
    pub fn pages(&mut self, address: u64, pages: u64, base: Option<u32>) -> Result<(), Refused> {
        if !address.is_multiple_of(PAGE as u64) {
            return Err(Refused::Unaligned(address));
        }
        let none = Refused::NotMemory { address, pages };
        let place = self.bounds.place(address, pages).filter(|_| pages > 0).ok_or(none)?;
        self.pages = self.pages.saturating_add(pages);
        if self.pages > self.announced {
            return Err(Refused::TooMany(self.announced));
        }
        for (last, nth) in self.last.get_mut(place).ok_or(none)?.iter_mut().zip(0u64..) {
            if *last == self.serial {
                return Err(Refused::Twice(address + nth * PAGE as u64));
            }
            if let Some(base) = base.filter(|base| *base == 0 || base != last) {
                return Err(Refused::Base { address, base, last: *last });
            }
            *last = self.serial;
        }
        Ok(())
    }

    pub fn count(&mut self, pages: u64, zeros: u64) {
        self.counts.pages = self.counts.pages.saturating_add(pages);
        self.counts.zeros = self.counts.zeros.saturating_add(zeros);
    }

    /// A piece of a section came; the number of its name.
    pub fn section(
        &mut self,
        name: &[u8],
        total: u32,
        offset: u32,
        length: u32,
    ) -> Result<usize, Refused> {
        let known = self.bounds.sections.iter().position(|known| known.as_bytes() == name);
        let name = known.ok_or(Refused::SectionName)?;
        let came = self.sections.get_mut(name).ok_or(Refused::SectionName)?;
        let next = match self.partial {
            None if offset == 0 && *came != self.serial && total as usize <= LONGEST_SECTION => 0,
            Some(partial) if (partial.name, partial.total) == (name, total) => partial.next,
            _ => return Err(Refused::Section),
        };
        let end = offset.checked_add(length).filter(|end| offset == next && *end <= total);
        let end = end.filter(|_| length > 0 || total == 0).ok_or(Refused::Section)?;
        *came = self.serial;
        self.partial = (end < total).then_some(Partial { name, total, next: end });
        self.counts.sections = self.counts.sections.saturating_add(u32::from(end == total));
        Ok(name)
    }

    /// Something is done to a disk.
    pub fn disk(
        &mut self,
        disk: u16,
        sequence: u32,
        (offset, length): (u64, u64),
    ) -> Result<(), Refused> {
        let size = self.bounds.disks.get(usize::from(disk)).ok_or(Refused::NoDisk(disk))?;
        if sequence != self.sequence {
            return Err(Refused::Sequence { expected: self.sequence, got: sequence });
        }
        if length == 0 || offset.checked_add(length).is_none_or(|end| end > *size) {
            return Err(Refused::OutsideDisk { disk, offset, length });
        }
        self.sequence = self.sequence.saturating_add(1);
        self.counts.writes = self.counts.writes.saturating_add(1);
        Ok(())
    }

    pub fn close(&mut self, counts: Counts, digest: Digest) -> Result<(), Refused> {
        if counts != self.counts || digest != self.chain.digest() {
            return Err(Refused::Whole);
        }
        (self.chain, self.counts, self.stage) =
            (Chain::after(digest), Counts::default(), Stage::Closed);
        Ok(())
    }

    /// The message `End` came: once, after all of its epoch.
    pub fn end(&mut self, term: Term, epoch: Epoch) -> Result<(), Refused> {
        if term != self.term {
            return Err(Refused::Term { expected: self.term, got: term });
        }
        if self.stage != Stage::Closed || epoch != self.epoch {
            let expected =
                if self.stage == Stage::Between { self.epoch.next() } else { self.epoch };
            return Err(Refused::Epoch { expected, got: epoch });
        }
        (self.stage, self.filling) = (Stage::Between, false);
        Ok(())
    }

    /// The operation with this number.
    pub fn operation(number: u8) -> Option<Operation> {
        Operation::ALL.get(usize::from(number)).copied()
    }
}
