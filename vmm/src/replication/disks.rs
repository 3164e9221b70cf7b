//! The disks of a primary. Their first copy is compared piece by piece with what the backup has;
//! from the first epoch on, each epoch has what the guest has written in it.
//!
//! ```text
//!                    attach    compare, send, again       capture of the first epoch
//!   a write:  nothing  |   puts its piece into the set        |  waits while its piece is in the
//!                      |   (before and after it is made)      |  set; goes into the log
//! ```
//! What is still in the set at the first capture is sent as it was then: so a write to such a piece
//! waits until that was read. A write that was under way at the capture is one of the requests in
//! flight in the state of the machine, which the backup carries out again, and it is in the log of
//! the epoch in which it is complete.
use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use config::incoming::Arbiter;
use lineage::pieces::{Set, bytes_of};
use machine::disk::{Change, Disk, Observer, Taken, Verdict, WriteLog};
use parking_lot::Mutex;

/// Most bytes of writes that wait to be acknowledged, and that are being made. When they are
/// reached, the guest's writes wait.
const LOG_LIMIT: u64 = 64 << 20;

/// How a sidecar says who decides.
pub fn named(arbiter: &Arbiter) -> String {
    match arbiter {
        Arbiter::Witness(identity) => format!("witness {identity}"),
        Arbiter::Fence(kind) => format!("fence {kind}"),
        Arbiter::None => String::new(),
    }
}

/// The disks that the guest can write to.
#[derive(Debug)]
pub struct Disks {
    disks: Vec<(String, Arc<Disk>)>,
    /// While they are copied or logged. A lock, as the main thread captures what another thread
    /// has attached.
    attached: Mutex<Option<Attached>>,
}

#[derive(Debug)]
struct Attached {
    log: Arc<WriteLog>,
    watches: Vec<Arc<Watch>>,
    captured: bool,
}

/// Which pieces of a disk have still to be sent.
#[derive(Debug)]
pub struct Watch {
    set: Set,
    /// What is in the set is sent as it is now, and nothing comes in any more.
    rest: AtomicBool,
}

impl Watch {
    /// The pieces.
    pub fn set(&self) -> &Set {
        &self.set
    }
}

impl Observer for Watch {
    fn before(&self, change: &Change) -> io::Result<Verdict> {
        if !self.rest.load(Ordering::Acquire) {
            self.set.insert_bytes(change.range.clone());
        } else if self.set.touches(change.range.clone()) {
            return Ok(Verdict::Wait);
        }
        Ok(Verdict::Start)
    }

    fn after(&self, change: &Change, _: &io::Result<()>) {
        if !self.rest.load(Ordering::Acquire) {
            self.set.insert_bytes(change.range.clone());
        }
    }
}

impl Disks {
    /// These disks, with their ids, in the order of their numbers.
    pub fn new(disks: Vec<(String, Arc<Disk>)>) -> Self {
        Self { disks, attached: Mutex::default() }
    }

    /// The disks.
    pub fn all(&self) -> &[(String, Arc<Disk>)] {
        &self.disks
    }

    /// The paths of their images.
    pub fn paths(&self) -> impl Iterator<Item = PathBuf> {
        self.disks.iter().map(|(_, disk)| disk.path().to_owned())
    }

    /// Notice from now on what the guest writes, all of which has to be sent. Replaces an earlier
    /// attachment.
    pub fn attach(&self) -> Vec<Arc<Watch>> {
        self.detach();
        let log = WriteLog::new(LOG_LIMIT);
        let watches: Vec<_> = self
            .disks
            .iter()
            .zip(0..)
            .map(|((_, disk), number)| {
                let set = Set::new(disk.size());
                set.insert_bytes(0..disk.size());
                let watch = Arc::new(Watch { set, rest: AtomicBool::new(false) });
                // First, so that what is not in the log is not in the set either.
                disk.observe(watch.clone());
                disk.log_writes(&log, number);
                watch
            })
            .collect();
        *self.attached.lock() = Some(Attached { log, watches: watches.clone(), captured: false });
        watches
    }

    /// Whether all changes are noticed that are under way.
    pub fn are_noticed(&self) -> bool {
        !self.disks.iter().any(|(_, disk)| disk.has_unlogged())
    }

    /// Notice nothing any more.
    pub fn detach(&self) {
        let Some(attached) = self.attached.lock().take() else { return };
        for ((_, disk), watch) in self.disks.iter().zip(&attached.watches) {
            disk.stop_logging();
            disk.unobserve(&**watch);
        }
    }

    /// What was sent as the rest is not watched any more.
    pub fn unwatch(&self) {
        let attached = self.attached.lock();
        let watches = attached.iter().flat_map(|attached| &attached.watches);
        self.disks.iter().zip(watches).for_each(|((_, disk), watch)| disk.unobserve(&**watch));
    }

    /// The end of an epoch, while the workers of all disks are parked.
    pub fn capture(&self, epoch: u64) {
        let mut attached = self.attached.lock();
        let Some(attached) = &mut *attached else { return };
        if !std::mem::replace(&mut attached.captured, true) {
            attached.log.record();
            attached.watches.iter().for_each(|watch| watch.rest.store(true, Ordering::Release));
        }
        attached.log.mark(epoch);
    }

    /// What was written up to the end of `epoch`, and not taken yet.
    pub fn take(&self, epoch: u64) -> Option<Taken> {
        self.attached.lock().as_ref().map(|attached| attached.log.take(epoch))
    }

    /// Read a piece of a disk; where it begins, and its contents.
    ///
    /// # Errors
    /// When the disk cannot be read, or has no such piece.
    pub fn read(&self, disk: usize, piece: u64) -> io::Result<(u64, Vec<u8>)> {
        let (_, disk) = self.disks.get(disk).ok_or(io::ErrorKind::NotFound)?;
        let place = bytes_of(piece, disk.size());
        let mut bytes = vec![0; usize::try_from(place.end - place.start).unwrap_or(0)];
        disk.read_at(place.start, &mut bytes)?;
        Ok((place.start, bytes))
    }

    /// A piece of the rest was read: writes to it may be made.
    pub fn sent(&self, disk: usize, piece: u64, watch: &Watch) {
        watch.set.remove(piece);
        if let Some((_, disk)) = self.disks.get(disk) {
            disk.waker().wake();
        }
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        self.detach();
    }
}
