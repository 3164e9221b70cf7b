//! An epoch that has come, until it is applied.
use std::ops::Range;

use super::{Event, Operation, PAGE, Page, reader::Write};

/// A change of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<'a> {
    /// The page at this guest-physical address has these contents.
    Page(u64, &'a Page),
    /// It becomes the exclusive or of this, and of what it is.
    Delta(u64, &'a Page),
    /// This many pages from the address on become zero.
    Zeros(u64, u64),
}

#[derive(Debug, Clone)]
enum Record {
    Page { address: u64 },
    Delta { address: u64 },
    Zeros { address: u64, pages: u64 },
}

#[derive(Debug, Clone)]
struct Done {
    disk: u16,
    operation: Operation,
    offset: u64,
    length: u64,
    data: Range<usize>,
}

/// The contents of one epoch. Its size is limited by the [`Reader`](super::Reader) whose events it
/// keeps ([`Bounds::max_epoch`](super::Bounds::max_epoch)); used again for a later epoch, it
/// allocates only what that one has more.
#[derive(Debug, Clone, Default)]
pub struct Held {
    records: Vec<Record>,
    /// One for each record that has contents.
    pages: Vec<u8>,
    /// Each with its name's place in the bounds.
    sections: Vec<(usize, Range<usize>)>,
    writes: Vec<Done>,
    /// Of sections and disk writes.
    bytes: Vec<u8>,
}

impl Held {
    /// Nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Drop what is held, and keep the room.
    pub fn clear(&mut self) {
        self.records.clear();
        self.pages.clear();
        self.sections.clear();
        self.writes.clear();
        self.bytes.clear();
    }

    /// Keep what an event brings; `Begin`, `Close` and messages bring nothing.
    pub fn take(&mut self, event: &Event<'_>) {
        match *event {
            Event::Page { address, page } => {
                self.records.push(Record::Page { address });
                self.pages.extend_from_slice(page);
            }
            Event::Delta { address, difference } => {
                self.records.push(Record::Delta { address });
                self.pages.extend_from_slice(difference);
            }
            Event::Zeros { address, pages } => self.records.push(Record::Zeros { address, pages }),
            Event::Section { name, offset, bytes, .. } => {
                let start = self.bytes.len();
                self.bytes.extend_from_slice(bytes);
                let end = self.bytes.len();
                match self.sections.last_mut() {
                    Some((last, place)) if *last == name && offset > 0 => place.end = end,
                    _ => self.sections.push((name, start..end)),
                }
            }
            Event::Disk(Write { disk, operation, offset, length, data }) => {
                let start = self.bytes.len();
                self.bytes.extend_from_slice(data);
                let data = start..self.bytes.len();
                self.writes.push(Done { disk, operation, offset, length, data });
            }
            Event::Message(_) | Event::Begin { .. } | Event::Close(_) => {}
        }
    }
    /// The changes of guest memory. They concern different pages, so their order does not matter;
    /// that of epochs does, and each must be applied exactly once.
    pub fn changes(&self) -> impl Iterator<Item = Change<'_>> {
        let mut pages = self.pages.as_chunks::<PAGE>().0.iter();
        self.records.iter().filter_map(move |record| {
            Some(match *record {
                Record::Page { address } => Change::Page(address, pages.next()?),
                Record::Delta { address } => Change::Delta(address, pages.next()?),
                Record::Zeros { address, pages } => Change::Zeros(address, pages),
            })
        })
    }

    /// The sections, each with its name's place in [`Bounds::sections`](super::Bounds::sections).
    pub fn sections(&self) -> impl Iterator<Item = (usize, &[u8])> {
        self.sections.iter().filter_map(|(name, at)| Some((*name, self.bytes.get(at.clone())?)))
    }

    /// What was done to the disks, in order.
    pub fn writes(&self) -> impl Iterator<Item = Write<'_>> {
        self.writes.iter().filter_map(|done| {
            let Done { disk, operation, offset, length, ref data } = *done;
            Some(Write { disk, operation, offset, length, data: self.bytes.get(data.clone())? })
        })
    }
}
