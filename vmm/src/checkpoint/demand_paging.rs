//! Memory that is read while the guest already runs (`mapped=uffd`): one thread serves page faults,
//! another one reads all the rest. A block is compared with its checksum before the guest sees any
//! of it, so no damaged memory ever reaches the guest.
//!
//! A thread that touches a page which cannot be read would never continue. Such an error therefore
//! ends the machine: the thread that finds it reports it. If the main thread does not handle the
//! report, because it waits for such a page itself, the thread ends the process.
use std::{
    io,
    ops::Range,
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, Builder},
    time::Duration,
};

use config::MemoryConfig;
use machine::{
    Event, Report,
    memory::{
        fault::{FaultError, Filler, allocate_missing},
        origin::{self, Origin},
    },
    sparse,
};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use state::{
    backing_chain::Contents,
    memory_file::{BLOCK, blocks},
};

use super::cancellable_poll;
use crate::{
    seccomp::{Confinement, Kind},
    terminal,
};

/// How long the main thread has to end the process after such a report.
const EXIT_DELAY: Duration = Duration::from_secs(5);

/// Why memory cannot be filled on demand.
#[derive(Debug, thiserror::Error)]
pub enum DemandPagingError {
    /// The host does not permit it.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The host cannot start a thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

struct DemandPager {
    contents: Contents,
    filler: Arc<Filler>,
    /// The blocks that have contents.
    blocks: Vec<Range<u64>>,
    /// Whether each block is being filled, or is there already.
    taken: Vec<AtomicBool>,
    /// Number of blocks that are not there yet.
    left: AtomicUsize,
    /// Becomes readable when all blocks are there.
    done: rustix::fd::OwnedFd,
    report: Report,
    failed: AtomicBool,
}

/// Guest memory that is filled with `contents`. The threads are confined by `confinement`.
///
/// # Errors
/// When the host does not allow it.
pub fn start(
    contents: Contents,
    config: &MemoryConfig,
    report: Report,
    confinement: &Confinement,
) -> Result<origin::Contents, DemandPagingError> {
    let filled = contents.filled();
    let (memory, filler) = allocate_missing(config, &filled)?;
    let filler = Arc::new(filler);
    let origin = Origin::Missing(filled.clone(), Arc::downgrade(&filler));
    let of = |range: &Range<u64>| {
        let (first, end) = (range.start, range.end);
        blocks(end - first).map(move |block| first + block.start..first + block.end)
    };
    let blocks: Vec<_> = filled.iter().flat_map(of).collect();
    let done = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
    let pager = Arc::new(DemandPager {
        contents,
        filler,
        taken: blocks.iter().map(|_| AtomicBool::new(false)).collect(),
        left: AtomicUsize::new(blocks.len()),
        blocks,
        done: done.map_err(|e| DemandPagingError::Thread(e.into()))?,
        report,
        failed: AtomicBool::new(false),
    });
    for (name, work) in [
        ("faults", DemandPager::serve as fn(&DemandPager, &mut [u8])),
        ("prefetch", DemandPager::fetch),
    ] {
        let pager = pager.clone();
        let first_step = confinement.first_step(Kind::Memory, name);
        let run = move || {
            let _watch = Watch(&pager);
            let mut buffer = vec![0; BLOCK as usize];
            if first_step().is_ok() {
                work(&pager, &mut buffer);
            }
        };
        Builder::new()
            .name(name.into())
            .stack_size(128 << 10)
            .spawn(run)
            .map_err(DemandPagingError::Thread)?;
    }
    Ok(origin::Contents { memory, filled, origin })
}

impl DemandPager {
    /// Serve page faults until all blocks are there.
    fn serve(&self, buffer: &mut [u8]) {
        while self.left.load(Ordering::Acquire) > 0 {
            match cancellable_poll::until(&self.filler, PollFlags::IN, &self.done, None) {
                Ok(cancellable_poll::Waited::Ready | cancellable_poll::Waited::Nothing) => {}
                Ok(cancellable_poll::Waited::Stop) => return,
                Err(e) => return self.fail(format!("cannot wait for page faults: {e}")),
            }
            match self.filler.fault() {
                Ok(Some(at)) => {
                    let index = self.blocks.partition_point(|block| block.end <= at);
                    self.fill(index, buffer);
                }
                Ok(None) => {}
                Err(e) => return self.fail(format!("cannot read page faults: {e}")),
            }
        }
    }

    /// Fill all blocks.
    fn fetch(&self, buffer: &mut [u8]) {
        for index in 0..self.blocks.len() {
            if self.failed.load(Ordering::Relaxed) {
                return;
            }
            self.fill(index, buffer);
        }
    }

    /// Fill a block, unless the other thread does: a thread that waits for a page of it resumes
    /// when that thread has filled it.
    fn fill(&self, index: usize, buffer: &mut [u8]) {
        let (Some(block), Some(taken)) = (self.blocks.get(index), self.taken.get(index)) else {
            return self.fail("a page fault outside of the memory to restore".into());
        };
        if taken.swap(true, Ordering::AcqRel) {
            return;
        }
        let data = match self.contents.read(block, buffer) {
            Ok(Some(data)) => data,
            Ok(None) => return self.fail(format!("nothing to read at {:#x}", block.start)),
            Err(why) => {
                let path = self.contents.path(block).display();
                let why = qmp::Error::generic(&why);
                return self.fail(format!("{path} cannot be used: {why}"));
            }
        };
        let filled = sparse::runs(data).try_for_each(|(start, bytes, zero)| {
            let at = block.start + start;
            match zero {
                true => self.filler.fill_zeros(&(at..at + bytes.len() as u64)),
                false => self.filler.fill(at, bytes),
            }
        });
        if let Err(e) = filled {
            return self.fail(format!("cannot fill memory at {:#x}: {e}", block.start));
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let _ = rustix::io::write(&self.done, &1u64.to_ne_bytes());
        }
    }

    /// Report that the machine cannot continue, and end the process if the main thread does not.
    fn fail(&self, why: String) {
        if self.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        log::error!("{why}");
        (self.report)(Event::MemoryLost(why));
        thread::sleep(EXIT_DELAY);
        // The main thread waits for memory itself.
        terminal::put_back();
        process::exit(1);
    }
}

/// Notices when a thread panics.
struct Watch<'a>(&'a DemandPager);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail("a thread that restores memory has panicked".into());
        }
    }
}
