//! What building a machine from a saved state writes to its memory, so that it can be put back: a
//! backup builds its machine when it suspects the primary, and drops it when that is back.
//!
//! KVM writes the wall clock of kvm-clock when its register is set, and other pages that registers
//! name once a vCPU runs; the monitor writes the generation id. These few pages are copied before.
//! The dirty log says afterwards whether they were all.
use std::{io, ops::Range};

use devices::Memory;

use crate::{
    DirtyError, Machine, MachineState,
    memory::{
        image::{self, PAGE_SIZE},
        staging::Staging,
    },
};

/// Contents of memory from before the build.
pub(crate) struct Undo {
    before: Staging,
    /// What was written; known once the machine is built.
    written: Vec<Range<u64>>,
}

/// Why memory is not as it was.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// It is not known what it was.
    #[error("guest memory was written at {0:#x} while the machine was built, and was not kept")]
    NotKept(u64),
    /// It cannot be read or written, or the machine was not built to be undone.
    #[error("guest memory cannot be put back")]
    Memory(#[from] io::Error),
}

impl Undo {
    /// Copy the pages that a machine with `state` may have written before it runs.
    pub(crate) fn before(memory: &Memory, state: &MachineState) -> io::Result<Self> {
        image::forget_dirty(memory);
        let named = state.vcpus.iter().flat_map(|vcpu| vcpu.shared_with_kvm());
        let pages = named.chain(crate::generation::places()).filter_map(|place| {
            let begin = image::offset(memory, place.start)? / PAGE_SIZE * PAGE_SIZE;
            let end = image::offset(memory, place.end - 1)? / PAGE_SIZE * PAGE_SIZE + PAGE_SIZE;
            (begin < end).then_some(begin..end)
        });
        let mut before = Staging::default();
        before.fill(memory, &image::union(&pages.collect::<Vec<_>>(), &[]))?;
        Ok(Self { before, written: Vec::new() })
    }

    /// Put them back.
    fn put_back(&self, memory: &Memory) -> Result<(), UndoError> {
        let kept = self.before.ranges();
        let known = |page: &Range<u64>| {
            kept.iter().any(|kept| kept.start <= page.start && page.end <= kept.end)
        };
        if let Some(other) = self.written.iter().find(|range| !known(range)) {
            return Err(UndoError::NotKept(other.start));
        }
        let mut piece = 0;
        while let Some((at, bytes)) = self.before.piece(piece)? {
            image::write(memory, at, bytes)?;
            piece += 1;
        }
        Ok(())
    }
}

impl Machine {
    /// The machine is built. What was written to memory meanwhile is known, and is not logged any
    /// more.
    pub(crate) fn built_with(&mut self, undo: Undo) -> Result<(), DirtyError> {
        let written = self.dirty_memory()?;
        self.log_dirty(false)?;
        self.undo = Some(Undo { written, ..undo });
        Ok(())
    }

    /// Drop a machine that was built with [`Saved::undo`](crate::Saved) and has not run, and put its
    /// memory back into its earlier state.
    ///
    /// # Errors
    /// When that is not possible: the memory is of no use then.
    pub fn unbuild(mut self) -> Result<(), UndoError> {
        let (memory, undo) = (self.memory.clone(), self.undo.take());
        drop(self);
        undo.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?.put_back(&memory)
    }
}

#[cfg(test)]
mod tests {
    use config::{MemoryConfig, types::MemorySize};

    use super::*;
    use crate::memory::allocate;

    #[test]
    fn only_what_was_kept_can_be_put_back() {
        let memory = allocate(&MemoryConfig::new(MemorySize::MIN)).unwrap();
        let mut before = Staging::default();
        image::write(&memory, 0x3000, b"before").unwrap();
        before.fill(&memory, &[0x3000..0x5000, 0x8000..0x9000]).unwrap();
        let mut undo = Undo { before, written: vec![0x3000..0x4000, 0x4000..0x5000] };
        image::write(&memory, 0x3000, b"after!").unwrap();
        undo.put_back(&memory).unwrap();
        let mut now = [0; 6];
        image::read(&memory, 0x3000, &mut now).unwrap();
        assert_eq!(&now, b"before");
        undo.written.push(0x7000..0x9000);
        let error = undo.put_back(&memory).unwrap_err().to_string();
        assert!(error.contains("0x7000"), "{error}");
    }
}
