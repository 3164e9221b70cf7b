//! The backup's journal: what the guest has written to its disks, epoch by epoch, on the way to the
//! images.
//!
//! ```text
//!   append -> sync: may be acknowledged -> apply -> sync_images -> trim
//! ```
//! [`replication::Journal`] says which step may come next; this carries it out on files. All images of
//! a guest share one journal, so they are always at the same epoch. The header, in two slots of which
//! the older one is overwritten, says where the first epoch is that has not been trimmed.
//!
//! After a power cut, [`JournalFile::open`] finds all whole epochs from there on, and
//! [`JournalFile::settle`] applies them. That some of them are in the images already does no harm.
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use replication::{Epoch, Journal, Lineage, Rules, Term};
use rustix::fs::{FallocateFlags, fallocate};

use crate::{
    frame::{Chain, Change, FRAME, Frame, Kind, LONGEST_DATA, checksum},
    medium::{Image, Medium},
    ring::{HEADER, Ring},
};

const MAGIC: [u8; 8] = *b"JOURNAL1";
/// Bytes of a slot of the header.
const SLOT: usize = 512;
const STEP: u64 = 4096;
/// Frames are collected up to this size before they are written.
const BATCH: usize = 1 << 20;
/// So much may be applied before the images have to be synced and the journal trimmed, in bytes.
pub const TRIM_BYTES: u64 = 32 << 20;
/// As [`TRIM_BYTES`], in time since the first of it was applied.
pub const TRIM_AFTER: Duration = Duration::from_millis(250);
/// Most epochs without changes between two with: far more than pass until the next trim.
const MOST_MISSING: u64 = 1 << 20;

/// An epoch of a term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The term.
    pub term: Term,
    /// The epoch.
    pub epoch: Epoch,
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum JournalError {
    #[error("cannot {what} the journal")]
    Io { what: &'static str, source: io::Error },
    #[error("cannot {what} the image of disk {disk}")]
    Image { disk: usize, what: &'static str, source: io::Error },
    #[error("the journal has no room: {used} of {capacity} bytes wait to be applied and trimmed")]
    Full { used: u64, capacity: u64 },
    #[error("the journal expects epoch {expected} and not {found}")]
    Order { expected: u64, found: u64 },
    #[error("a change of disk {disk} at {offset}, {length} bytes, is not inside the disk")]
    Outside { disk: usize, offset: u64, length: u64 },
    #[error("this file is no journal, or its header is damaged")]
    Damaged,
    #[error("the journal belongs to another guest, lineage {0:032x}")]
    OtherGuest(u128),
    #[error("an earlier write has failed, so it is unknown what is durable")]
    Failed,
    #[error("term {0} has epochs that are not in the images yet")]
    NotEmpty(u64),
}

/// What the header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    lineage: Lineage,
    sequence: u64,
    capacity: u64,
    /// Position of the first frame that is needed.
    start: u64,
    /// The term of all frames, and the last epoch that the images hold durably.
    applied: Place,
}

/// An epoch in the ring.
#[derive(Debug, Clone, Copy)]
struct Whole {
    epoch: Epoch,
    start: u64,
    end: u64,
}

/// A backup's journal.
#[derive(Debug)]
pub struct JournalFile<M> {
    ring: Ring<M>,
    header: Header,
    order: Journal,
    rules: Rules,
    /// Where the next epoch goes.
    head: u64,
    /// The epochs that have not been trimmed, ascending, but for those without changes.
    whole: VecDeque<Whole>,
    /// Bytes applied and not synced yet, and since when.
    applied: u64,
    since: Option<Instant>,
    failed: bool,
    buffer: Vec<u8>,
}

impl JournalFile<File> {
    /// Where the journal of a guest is whose first disk has its image at `image`.
    ///
    /// # Errors
    /// When there is no such image.
    pub fn beside(image: &Path) -> io::Result<PathBuf> {
        let mut path = image.canonicalize()?.into_os_string();
        path.push(".journal");
        Ok(path.into())
    }

    /// A file at `path` with room for `capacity` bytes of epochs, to be given to
    /// [`JournalFile::format`]. What is in one that is there already stays until then.
    ///
    /// # Errors
    /// When the host refuses it, or has no room.
    pub fn reserve(path: &Path, capacity: u64) -> Result<File, JournalError> {
        let failed = |source| JournalError::Io { what: "create", source };
        let options = File::options().read(true).write(true).create(true).truncate(false).clone();
        let file = options.open(path).map_err(failed)?;
        fallocate(&file, FallocateFlags::empty(), 0, HEADER + capacity)
            .map_err(|e| failed(e.into()))?;
        file.sync_all().map_err(failed)?;
        let parent = path.parent().filter(|path| !path.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))
            .and_then(|dir| dir.sync_all())
            .map_err(failed)?;
        Ok(file)
    }

    /// Create the journal of `lineage` at `path`, whose images hold `place` durably, for `capacity`
    /// bytes of epochs. Replaces one that is there.
    ///
    /// # Errors
    /// When the host refuses it, or has no room.
    pub fn create(
        path: &Path,
        lineage: Lineage,
        place: Place,
        capacity: u64,
    ) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Io { what: "create", source };
        let mut new = path.to_owned().into_os_string();
        new.push(".new");
        let options = File::options().read(true).write(true).create(true).truncate(true).clone();
        let file = options.open(&new).map_err(failed)?;
        fallocate(&file, FallocateFlags::empty(), 0, HEADER + capacity)
            .map_err(|e| failed(e.into()))?;
        file.sync_all().map_err(failed)?;
        let journal = Self::format(file, lineage, place, capacity, Rules::ALL)?;
        fs::rename(&new, path).map_err(failed)?;
        let parent = path.parent().filter(|path| !path.as_os_str().is_empty());
        let parent = File::open(parent.unwrap_or(Path::new("."))).map_err(failed)?;
        parent.sync_all().map_err(failed)?;
        Ok(journal)
    }

    /// Open the journal at `path`, as [`JournalFile::recover`] does.
    ///
    /// # Errors
    /// As [`JournalFile::recover`].
    pub fn open(path: &Path, lineage: Lineage, void: Term) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Io { what: "open", source };
        let file = File::options().read(true).write(true).open(path).map_err(failed)?;
        Self::recover(file, lineage, void, Rules::ALL)
    }
}

impl<M: Medium> JournalFile<M> {
    /// Write an empty journal.
    ///
    /// # Errors
    /// When the medium fails.
    pub fn format(
        medium: M,
        lineage: Lineage,
        place: Place,
        capacity: u64,
        rules: Rules,
    ) -> Result<Self, JournalError> {
        let header = Header { lineage, sequence: 0, capacity, start: 0, applied: place };
        let mut journal = Self::new(medium, header, rules);
        // Both slots, as the medium may hold another journal.
        journal.write_header(journal.header)?;
        journal.write_header(journal.header)?;
        Ok(journal)
    }

    /// Read a journal, and find the whole epochs in it: [`JournalFile::settle`] brings the images up
    /// to the last one. Epochs of terms before `void` do not count: the sidecar says `running` in
    /// `void`, so the guest has run on these images since.
    ///
    /// # Errors
    /// When it is not the journal of `lineage`, or the medium fails.
    pub fn recover(
        medium: M,
        lineage: Lineage,
        void: Term,
        rules: Rules,
    ) -> Result<Self, JournalError> {
        let mut header: Option<Header> = None;
        for index in 0..2 {
            let mut slot = [0; SLOT];
            medium.read_at(index * STEP, &mut slot).map_err(reading)?;
            if let Some(found) = Header::decode(&slot)
                && header.is_none_or(|last| last.sequence < found.sequence)
            {
                header = Some(found);
            }
        }
        let header = header.ok_or(JournalError::Damaged)?;
        if header.lineage != lineage {
            return Err(JournalError::OtherGuest(header.lineage.0));
        }
        let mut journal = Self::new(medium, header, rules);
        if header.applied.term >= void {
            journal.scan()?;
        }
        // What can be read may be in the host's memory only.
        journal.sync()?;
        Ok(journal)
    }

    fn new(medium: M, header: Header, rules: Rules) -> Self {
        Self {
            ring: Ring { medium, capacity: header.capacity },
            header,
            order: Journal::new(header.applied.epoch, rules),
            rules,
            head: header.start,
            whole: VecDeque::new(),
            applied: 0,
            since: None,
            failed: false,
            buffer: Vec::new(),
        }
    }

    /// The term whose epochs it holds.
    #[must_use]
    pub fn term(&self) -> Term {
        self.header.applied.term
    }

    /// The last epoch that the images are known to hold durably. Only a hint for a later process: an
    /// image may have been replaced.
    #[must_use]
    pub fn trimmed(&self) -> Place {
        self.header.applied
    }

    /// The order of its steps: what may be acknowledged, applied, trimmed, and whether the guest may
    /// run.
    #[must_use]
    pub fn order(&self) -> &Journal {
        &self.order
    }

    /// Bytes that wait to be applied and trimmed.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.head - self.header.start
    }

    /// Take epochs of `place.term` from now on, of which the images hold `place.epoch` durably.
    ///
    /// # Errors
    /// When epochs of an earlier term are left, or the medium fails.
    pub fn begin(&mut self, place: Place) -> Result<(), JournalError> {
        if !self.whole.is_empty() {
            return Err(JournalError::NotEmpty(self.term().0));
        }
        self.write_header(Header { start: self.head, applied: place, ..self.header })?;
        self.order = Journal::new(place.epoch, self.rules);
        Ok(())
    }

    /// Append an epoch, the one after the last. It may not be acknowledged before
    /// [`JournalFile::sync`].
    ///
    /// # Errors
    /// With [`JournalError::Full`] and [`JournalError::Order`] nothing has changed. After any other
    /// error the journal is unusable.
    pub fn append<'a>(
        &mut self,
        epoch: Epoch,
        changes: impl IntoIterator<Item = Change<'a>>,
    ) -> Result<(), JournalError> {
        self.check()?;
        let expected = self.order.last().next();
        if epoch != expected {
            return Err(JournalError::Order { expected: expected.0, found: epoch.0 });
        }
        let mut writer = Writer { at: self.head, chain: Chain::default(), batch: Vec::new() };
        for change in changes {
            match change {
                Change::Write { disk, offset, data } => {
                    for (n, piece) in data.chunks(LONGEST_DATA).enumerate() {
                        let offset = offset.saturating_add((n * LONGEST_DATA) as u64);
                        self.put(&mut writer, Kind::Write, epoch, (disk, offset), piece, 0)?;
                    }
                }
                Change::Zero { disk, offset, length } => {
                    self.put(&mut writer, Kind::Zero, epoch, (disk, offset), &[], length)?;
                }
            }
        }
        let end = writer.chain.clone().end(writer.position(), self.term(), epoch);
        self.has_room(end.position + end.size())?;
        end.encode(&[], &mut writer.batch);
        self.flush(&mut writer)?;
        self.whole.push_back(Whole { epoch, start: self.head, end: writer.at });
        self.head = writer.at;
        self.order.appended();
        Ok(())
    }

    /// As [`JournalFile::append`], for an epoch in which the disks have not changed. Nothing is
    /// written: it is as durable as the one before.
    ///
    /// # Errors
    /// As [`JournalFile::append`].
    pub fn append_nothing(&mut self, epoch: Epoch) -> Result<(), JournalError> {
        self.check()?;
        let last = self.order.last();
        if epoch != last.next() {
            return Err(JournalError::Order { expected: last.next().0, found: epoch.0 });
        }
        let durable = self.order.durable() == last;
        self.order.appended();
        if durable {
            self.order.journal_synced(epoch);
        }
        Ok(())
    }

    /// Forget the epochs after `epoch`, none of which was applied: the primary sends them again,
    /// with the same contents, or they were never acknowledged.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub fn drop_after(&mut self, epoch: Epoch) -> Result<(), JournalError> {
        let epoch = epoch.max(self.order.last_applied());
        self.order.dropped_after(epoch);
        let mut voided = Ok(());
        while let Some(whole) = self.whole.pop_back_if(|whole| whole.epoch > epoch) {
            self.head = whole.start;
            // If nothing else is written here, a recovery would still find it.
            let zeros = self.ring.write(whole.start, &[0; size_of::<u64>()]);
            voided = voided.and(zeros);
        }
        self.done("write", voided)
    }

    fn put(
        &mut self,
        writer: &mut Writer,
        kind: Kind,
        epoch: Epoch,
        (disk, offset): (u16, u64),
        data: &[u8],
        length: u64,
    ) -> Result<(), JournalError> {
        let length = if kind == Kind::Write { data.len() as u64 } else { length };
        let position = writer.position();
        let frame = Frame { kind, disk, position, term: self.term(), epoch, offset, length };
        self.has_room(position + frame.size())?;
        let crc = frame.encode(data, &mut writer.batch);
        writer.chain.add(crc);
        if writer.batch.len() >= BATCH { self.flush(writer) } else { Ok(()) }
    }

    fn has_room(&self, end: u64) -> Result<(), JournalError> {
        let capacity = self.header.capacity;
        match end - self.header.start <= capacity {
            true => Ok(()),
            false => Err(JournalError::Full { used: self.used(), capacity }),
        }
    }

    fn flush(&mut self, writer: &mut Writer) -> Result<(), JournalError> {
        let written = self.ring.write(writer.at, &writer.batch);
        self.done("write", written)?;
        writer.at += writer.batch.len() as u64;
        writer.batch.clear();
        Ok(())
    }

    /// Make all appended epochs durable: they may be acknowledged then.
    ///
    /// # Errors
    /// When they may not be. The journal is unusable then.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        self.check()?;
        let last = self.order.last();
        let synced = self.ring.medium.sync();
        self.done("sync", synced)?;
        self.order.journal_synced(last);
        Ok(())
    }

    /// Write the next epoch that may be to the images, by the disks' numbers. `None`: none may be.
    ///
    /// # Errors
    /// When an image fails, which then holds a mixture: the same epoch has to be applied again, by
    /// this process or after [`JournalFile::recover`].
    pub fn apply(&mut self, images: &[impl Image]) -> Result<Option<Epoch>, JournalError> {
        self.check()?;
        let Some(epoch) = self.order.to_apply() else { return Ok(None) };
        let Some(whole) = self.whole.iter().find(|whole| whole.epoch == epoch).copied() else {
            // The disks have not changed in it.
            self.order.applied();
            return Ok(Some(epoch));
        };
        let mut at = whole.start;
        while at < whole.end {
            let (frame, _) = self.frame(at)?.ok_or(JournalError::Damaged)?;
            self.change(&frame, images)?;
            at += frame.size();
        }
        self.order.applied();
        self.applied += whole.end - whole.start;
        self.since.get_or_insert_with(Instant::now);
        Ok(Some(epoch))
    }

    /// Make a change to an image, with the data in the buffer.
    fn change(&self, frame: &Frame, images: &[impl Image]) -> Result<(), JournalError> {
        let Frame { kind, offset, length, .. } = *frame;
        let disk = usize::from(frame.disk);
        if kind == Kind::End {
            return Ok(());
        }
        let outside = JournalError::Outside { disk, offset, length };
        let failed = |what| move |source| JournalError::Image { disk, what, source };
        let Some(image) = images.get(disk) else { return Err(outside) };
        let size = image.size().map_err(failed("measure"))?;
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(outside);
        }
        match kind {
            Kind::Write => image.write_at(offset, &self.buffer).map_err(failed("write")),
            _ => image.zero(offset, length).map_err(failed("zero a range of")),
        }
    }

    /// Whether it is time for [`JournalFile::sync_images`] and [`JournalFile::trim`].
    #[must_use]
    pub fn trim_due(&self, now: Instant) -> bool {
        let waited = |since: Instant| now.saturating_duration_since(since) >= TRIM_AFTER;
        self.applied >= TRIM_BYTES || self.since.is_some_and(waited)
    }

    /// Make durable in the images what was applied to them.
    ///
    /// # Errors
    /// When it may not be durable: the epochs are still in the journal, for another process. This one
    /// cannot use the images any more.
    pub fn sync_images(&mut self, images: &[impl Image]) -> Result<(), JournalError> {
        self.check()?;
        let last = self.order.last_applied();
        for (disk, image) in images.iter().enumerate() {
            if let Err(source) = image.sync() {
                // A second sync would succeed without having written anything.
                self.failed = true;
                return Err(JournalError::Image { disk, what: "sync", source });
            }
        }
        self.order.images_synced(last);
        (self.applied, self.since) = (0, None);
        Ok(())
    }

    /// Drop the epochs that the images hold durably.
    ///
    /// # Errors
    /// When the medium fails. The journal is unusable then.
    pub fn trim(&mut self) -> Result<(), JournalError> {
        self.check()?;
        let Some(through) = self.order.to_trim() else { return Ok(()) };
        let kept = self.whole.iter().find(|whole| whole.epoch > through);
        let start = kept.map_or(self.head, |whole| whole.start);
        let applied = Place { epoch: through, ..self.header.applied };
        self.write_header(Header { start, applied, ..self.header })?;
        self.whole.retain(|whole| whole.epoch > through);
        self.order.trimmed(through);
        Ok(())
    }

    /// Bring the images up to the last epoch, durably, and empty the journal: before a promotion, and
    /// before anything else opens them. Then [`Journal::may_run`].
    ///
    /// # Errors
    /// As those of the single steps; it can be tried again if the journal is still usable.
    pub fn settle(&mut self, images: &[impl Image]) -> Result<Place, JournalError> {
        self.sync()?;
        while self.apply(images)?.is_some() {}
        self.sync_images(images)?;
        self.trim()?;
        Ok(self.header.applied)
    }

    /// Find the whole epochs from the header's start on.
    fn scan(&mut self) -> Result<(), JournalError> {
        let mut epoch = self.order.last();
        let (mut start, mut at) = (self.head, self.head);
        let mut chain = Chain::default();
        while let Some((frame, crc)) = self.frame(at)? {
            let last = self.order.last().0;
            if at == start && (last + 1..last.saturating_add(MOST_MISSING)).contains(&frame.epoch.0)
            {
                epoch = frame.epoch;
            }
            if frame.term != self.term() || frame.epoch != epoch || epoch.0 <= last {
                break;
            }
            at += frame.size();
            if frame.kind != Kind::End {
                chain.add(crc);
                continue;
            }
            if std::mem::take(&mut chain).end(frame.position, frame.term, epoch) != frame {
                break;
            }
            // In those that are missing, the disks have not changed.
            if self.whole.is_empty() {
                self.order = Journal::new(Epoch(epoch.0 - 1), self.rules);
            }
            while self.order.last() < epoch {
                self.order.appended();
            }
            self.whole.push_back(Whole { epoch, start, end: at });
            start = at;
        }
        self.head = start;
        Ok(())
    }

    /// The frame at `position`, with its data in the buffer; `None` if there is none.
    fn frame(&mut self, position: u64) -> Result<Option<(Frame, u32)>, JournalError> {
        let mut bytes = [0; FRAME];
        self.ring.read(position, &mut bytes).map_err(reading)?;
        let Some((frame, crc)) = Frame::decode(&bytes) else { return Ok(None) };
        // Nothing reaches beyond the start, a lap later.
        if position + frame.size() - self.header.start > self.header.capacity {
            return Ok(None);
        }
        let length = usize::try_from(frame.data()).map_err(|_| JournalError::Damaged)?;
        self.buffer.resize(length, 0);
        self.ring.read(position + FRAME as u64, &mut self.buffer).map_err(reading)?;
        let covered = bytes.get(..FRAME - 4).unwrap_or_default();
        let whole = frame.position == position && checksum(covered, &self.buffer) == crc;
        Ok(whole.then_some((frame, crc)))
    }

    /// Replace the header, durably.
    fn write_header(&mut self, header: Header) -> Result<(), JournalError> {
        let header = Header { sequence: self.header.sequence.saturating_add(1), ..header };
        let at = header.sequence % 2 * STEP;
        let medium = &self.ring.medium;
        let written = medium.write_at(at, &header.encode()).and_then(|()| medium.sync());
        self.done("write the header of", written)?;
        self.header = header;
        Ok(())
    }

    fn check(&self) -> Result<(), JournalError> {
        if self.failed { Err(JournalError::Failed) } else { Ok(()) }
    }

    fn done(&mut self, what: &'static str, result: io::Result<()>) -> Result<(), JournalError> {
        self.failed |= result.is_err();
        result.map_err(|source| JournalError::Io { what, source })
    }
}

/// An epoch that is being appended.
struct Writer {
    /// Where the batch goes.
    at: u64,
    chain: Chain,
    batch: Vec<u8>,
}

impl Writer {
    /// Where the next frame goes.
    fn position(&self) -> u64 {
        self.at + self.batch.len() as u64
    }
}

fn reading(source: io::Error) -> JournalError {
    JournalError::Io { what: "read", source }
}

impl Header {
    fn encode(&self) -> [u8; SLOT] {
        let Place { term, epoch } = self.applied;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.lineage.0.to_le_bytes());
        for n in [self.sequence, self.capacity, self.start, term.0, epoch.0] {
            bytes.extend(n.to_le_bytes());
        }
        bytes.resize(SLOT - 4, 0);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        let mut slot = [0; SLOT];
        slot.copy_from_slice(&bytes);
        slot
    }

    fn decode(bytes: &[u8; SLOT]) -> Option<Self> {
        let number = |n: usize| {
            let at = 24 + 8 * n;
            Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
        };
        let header = Self {
            lineage: Lineage(u128::from_le_bytes(bytes.get(8..24)?.try_into().ok()?)),
            sequence: number(0)?,
            capacity: number(1)?,
            start: number(2)?,
            applied: Place { term: Term(number(3)?), epoch: Epoch(number(4)?) },
        };
        // So that no sum of a position and a length overflows.
        let sane = (1..1 << 62).contains(&header.capacity) && header.start < 1 << 62;
        (sane && header.encode() == *bytes).then_some(header)
    }
}
