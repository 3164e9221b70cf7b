//! An epoch as it arrives at a backup: kept aside until it is whole, then applied to memory.
use std::io;

use machine::{Memory, memory::image};
use replication::contents::{self, Event, Operation, PAGE, Write};

use super::{
    keeper::Written,
    outgoing::MACHINE,
    outside::{OUTSIDE, Outside},
};

/// Most bytes of room that are kept for the next epoch.
const SPARE: usize = 64 << 20;

/// What becomes of memory.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// A page has these contents.
    Page(u64),
    /// A page becomes the exclusive or with these.
    Difference(u64),
    /// Pages become zero.
    Zeros { address: u64, pages: u64 },
}

/// The epoch.
#[derive(Default)]
pub struct Received {
    changes: Vec<Change>,
    /// The contents of pages and differences, in order.
    contents: Vec<u8>,
    /// The state of the machine, and what is known of the outside: as [`SECTIONS`] has them.
    sections: [Vec<u8>; 2],
    /// What was written to the disks, in order.
    written: Vec<Written>,
}

/// The sections of an epoch.
pub const SECTIONS: [&str; 2] = [MACHINE, OUTSIDE];

impl Received {
    /// Take what has come, unless it is a message. With `at_once`, memory changes now: nobody
    /// relies on it before the first epoch is whole.
    ///
    /// # Errors
    /// When memory cannot be written.
    pub fn take(&mut self, event: &Event<'_>, at_once: Option<&Memory>) -> io::Result<()> {
        let (change, bytes): (_, &[u8]) = match event {
            Event::Page { address, page } => (Change::Page(*address), *page),
            Event::Delta { address, difference } => (Change::Difference(*address), *difference),
            Event::Zeros { address, pages } => {
                (Change::Zeros { address: *address, pages: *pages }, &[])
            }
            Event::Section { name, offset, bytes, .. } => {
                let section = self.sections.get_mut(*name).ok_or(io::ErrorKind::InvalidInput)?;
                if *offset == 0 {
                    section.clear();
                }
                section.extend_from_slice(bytes);
                return Ok(());
            }
            Event::Disk(write) => {
                self.written.push(written(write));
                return Ok(());
            }
            Event::Message(_) | Event::Begin { .. } | Event::Close(_) => {
                return Ok(());
            }
        };
        match at_once {
            Some(memory) => apply(memory, change, bytes),
            None => {
                self.changes.push(change);
                self.contents.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// The state of the machine, as far as it has come.
    pub fn state(&self) -> &[u8] {
        let [machine, _] = &self.sections;
        machine
    }

    /// What is known of the outside, if that has come.
    pub fn outside(&self) -> Option<Outside> {
        let [_, outside] = &self.sections;
        Outside::decode(outside)
    }

    /// What was written to the disks.
    pub fn take_written(&mut self) -> Vec<Written> {
        std::mem::take(&mut self.written)
    }

    /// Drop what has come.
    pub fn clear(&mut self) {
        self.written.clear();
        self.changes.clear();
        self.contents.clear();
        self.contents.shrink_to(SPARE);
        self.sections.iter_mut().for_each(Vec::clear);
    }

    /// The epoch is whole: change memory, and give the state of the machine.
    ///
    /// # Errors
    /// When memory cannot be written: it is of no use then.
    pub fn apply(&mut self, memory: &Memory) -> io::Result<Vec<u8>> {
        let mut rest = self.contents.as_slice();
        for change in self.changes.drain(..) {
            let bytes = match change {
                Change::Page(_) | Change::Difference(_) => {
                    let (page, after) =
                        rest.split_at_checked(PAGE).ok_or(io::ErrorKind::UnexpectedEof)?;
                    rest = after;
                    page
                }
                Change::Zeros { .. } => &[],
            };
            apply(memory, change, bytes)?;
        }
        self.contents.clear();
        self.contents.shrink_to(SPARE);
        let [machine, outside] = &mut self.sections;
        outside.clear();
        Ok(std::mem::take(machine))
    }
}

/// A change of a disk that has come.
pub fn written(write: &Write<'_>) -> Written {
    let Write { disk, operation, offset, length, data } = *write;
    let contents = match operation {
        Operation::Write => Ok(data.to_vec()),
        Operation::Discard | Operation::Zero => Err(length),
    };
    Written { disk, offset, contents }
}

fn apply(memory: &Memory, change: Change, bytes: &[u8]) -> io::Result<()> {
    match change {
        Change::Page(address) => image::write(memory, address, bytes),
        Change::Difference(address) => {
            let mut page = [0; PAGE];
            image::read(memory, address, &mut page)?;
            contents::change(&mut page, bytes);
            image::write(memory, address, &page)
        }
        Change::Zeros { address, pages } => {
            let zeros = [0; PAGE];
            (0..pages).try_for_each(|page| {
                let address = address + page * PAGE as u64;
                // A page that was never touched stays so.
                let mut now = [0; PAGE];
                image::read(memory, address, &mut now)?;
                if now == zeros { Ok(()) } else { image::write(memory, address, &zeros) }
            })
        }
    }
}
