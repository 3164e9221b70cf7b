//! Saving into a directory: either both new files count, or both old ones stay as they were.
//!
//! ```text
//! memory.new, state.new written and synced
//! state.new  -> state      from here on the new state counts; it names its memory by an id
//! memory.new -> memory     a process killed in between leaves memory.new, which restoring finds
//! ```
mod target;

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    ops::Range,
    path::{Component, Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use machine::{
    MachineState, Memory,
    disk::DiskCopy,
    memory::{
        image as ram,
        staging::{MAX_RANGES, Staging},
    },
};
use state::{
    Config, SectionError, State,
    config::{Base, Id},
    directory::{self, DirectoryError, MAX_CHAIN, MEMORY, NEW_MEMORY, NEW_STATE, STATE},
    file::RANGES,
    hex::Hex,
    memory_file,
};

pub use self::target::Target;
use super::{
    DryRunError,
    dialogue::HandOver,
    disks::{self, DiskCopies},
    dry_run::dry_run,
    memory_file::{Progress, Writer},
    send::PIECE,
};

/// Why a state could not be saved. An earlier save is as it was.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum SaveError {
    #[error("cannot create the directory {}: its parent must exist", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("another save into {} is under way", path.display())]
    Busy { path: PathBuf },
    #[error("cannot {what} {}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot write {}: up to {needed} MiB must be free there", path.display())]
    Full { path: PathBuf, needed: u64, source: io::Error },
    #[error("cannot find out which memory the guest uses (/proc/self/pagemap)")]
    Memory(#[source] io::Error),
    #[error(
        "disk '{id}' was plugged or unplugged while the machine was being saved with its disks: save it again"
    )]
    DisksChanged { id: String },
    #[error("the base save cannot be used; leave incremental out")]
    Base(#[source] DirectoryError),
    #[error("the base save, {}, has been changed; leave incremental out", path.display())]
    BaseChanged { path: PathBuf },
    #[error("{} is part of the base save: give another directory", path.display())]
    Needed { path: PathBuf },
    #[error("{MAX_CHAIN} saves build on each other, which is the limit: leave incremental out")]
    TooDeep,
    #[error("cannot save the spot check of a block device")]
    SpotCheck(#[source] SectionError),
    #[error("cannot connect to {}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the peer has closed the stream")]
    Closed(#[source] io::Error),
    #[error("the command ended with status {status}")]
    Command { status: u8 },
    #[error("cannot write to the stream")]
    Stream(#[source] io::Error),
    #[error("what was saved could not be restored, so the save has failed")]
    DryRun(#[source] Box<DryRunError>),
    #[error(
        "the receiver does not answer; the capability return-path off sends one way \
         (migrate-set-capabilities)"
    )]
    NoAnswer,
    #[error("the receiver refused the machine: {why}")]
    Refused { why: String },
    #[error(
        "outcome unknown: the machine was handed over to the receiver, which does not answer \
         ({why}). Ask it with query-status: if it has the machine, quit this one; if it has not, \
         or has ended, cont resumes the guest here, unless the receiver still holds a disk or tap"
    )]
    Unknown { why: io::Error },
    #[error("cancelled")]
    Cancelled,
}

/// Where memory is copied from.
pub enum Source<'a> {
    /// Guest memory itself, in these ranges, ascending.
    Guest(&'a [Range<u64>]),
    /// A copy of guest memory, which does not change.
    Staged(&'a Staging),
}

/// Destination of a save.
pub trait Sink: Send {
    /// Copy memory. In the first call, memory outside of `source` is zero, or is in the base; in
    /// later calls, it is unchanged.
    ///
    /// # Errors
    /// When it cannot be written, or the save is cancelled.
    fn copy(&mut self, source: &Source<'_>, progress: &Progress) -> Result<(), SaveError>;

    /// The guest is about to be captured: do now what would take long afterwards.
    ///
    /// # Errors
    /// When it cannot be done.
    fn before_capture(&mut self) -> Result<(), SaveError> {
        Ok(())
    }

    /// The guest was captured: copy the disks as they were then, if they belong to the save. The
    /// guest may be running again.
    ///
    /// # Errors
    /// As [`Sink::copy`].
    fn copy_disks(&mut self, progress: &Progress) -> Result<(), SaveError> {
        let _ = progress;
        Ok(())
    }

    /// Add the rest and complete the save.
    ///
    /// # Errors
    /// When it cannot be written; an earlier save is as it was.
    fn finish(
        self: Box<Self>,
        config: Config,
        state: MachineState,
        progress: &Progress,
    ) -> Result<Finished, SaveError>;
}

/// How a save has ended.
pub enum Finished {
    /// It counts. With what a later save may build on.
    Over(Option<Saved>),
    /// It counts once this machine releases its disks and taps, which only one machine can hold.
    HandOver(HandOver),
}

/// A complete save: what another one needs to build on it.
#[derive(Debug, Clone)]
pub struct Saved {
    /// Its directory, and those of the saves that it builds on.
    chain: Vec<PathBuf>,
    id: Id,
    state: u32,
    /// The checksum of each page of memory.
    pages: Vec<u32>,
}

impl Saved {
    /// Its directory.
    pub fn path(&self) -> &Path {
        self.chain.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// Check that the save is still there unchanged.
    fn check(&self) -> Result<(), SaveError> {
        let (content, state) =
            directory::read(&self.path().join(STATE)).map_err(SaveError::Base)?;
        match content.config.id == self.id && state == self.state {
            true => Ok(()),
            false => Err(SaveError::BaseChanged { path: self.path().into() }),
        }
    }
}

/// A save into a directory.
pub struct Directory {
    /// Dropped before the directory that contains them.
    disks: Option<DiskCopies>,
    target: Target,
    memory: Memory,
    path: PathBuf,
    writer: Writer,
    buffer: Vec<u8>,
    size: u64,
    base: Option<Saved>,
    /// Ranges that have been written, with a base.
    changed: Vec<Range<u64>>,
    /// Most ranges in `changed` while guest memory itself is copied; those of a staged copy may be
    /// as many again.
    pub(super) most: usize,
}

impl Directory {
    /// Begin to save `memory`, of `size` bytes, into `path`; with `base`, only what has changed
    /// since that save.
    ///
    /// # Errors
    /// When the files cannot be created, or no save can build on `base`.
    pub fn create(
        path: &Path,
        memory: Memory,
        size: u64,
        base: Option<Saved>,
    ) -> Result<Self, SaveError> {
        if let Some(base) = &base {
            base.check()?;
            if base.chain.len() >= MAX_CHAIN {
                return Err(SaveError::TooDeep);
            }
            if path.canonicalize().is_ok_and(|path| base.chain.contains(&path)) {
                return Err(SaveError::Needed { path: path.into() });
            }
        }
        let target = Target::open(path)?;
        let (path, file) = target.create(NEW_MEMORY)?;
        let pages = base.as_ref().map(|base| base.pages.clone());
        let writer = Writer::new(size, file, pages).map_err(|e| write_failed(&path, size, e))?;
        let (buffer, changed) = (vec![0; PIECE as usize], Vec::new());
        Ok(Self {
            disks: None,
            target,
            memory,
            path,
            writer,
            buffer,
            size,
            base,
            changed,
            most: RANGES - MAX_RANGES,
        })
    }

    /// Also keep copies of `disks`, each with its id; the save will have the id `id`.
    ///
    /// # Errors
    /// When their files cannot be created.
    pub fn with_disks(
        mut self,
        id: u128,
        disks: Vec<(String, Arc<DiskCopy>)>,
    ) -> Result<Self, SaveError> {
        self.disks = Some(DiskCopies::create(&self.target.path, id, disks)?);
        Ok(self)
    }

    /// Copy `ranges` of guest memory itself.
    fn copy_guest(&mut self, ranges: &[Range<u64>], progress: &Progress) -> io::Result<()> {
        for piece in pieces(ranges) {
            progress.check()?;
            let length = usize::try_from(piece.end - piece.start).map_err(io::Error::other)?;
            let buffer = self.buffer.get_mut(..length).ok_or(io::ErrorKind::InvalidInput)?;
            ram::read(&self.memory, piece.start, buffer)?;
            self.writer.write(piece.start, buffer, progress)?;
            progress.done.fetch_add(piece.end - piece.start, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Sink for Directory {
    fn before_capture(&mut self) -> Result<(), SaveError> {
        self.disks.as_ref().map_or(Ok(()), DiskCopies::sync)
    }

    fn copy_disks(&mut self, progress: &Progress) -> Result<(), SaveError> {
        self.disks.as_ref().map_or(Ok(()), |disks| disks.make(progress))
    }

    fn copy(&mut self, source: &Source<'_>, progress: &Progress) -> Result<(), SaveError> {
        let written = match source {
            Source::Guest(ranges) if self.base.is_some() => {
                let all = ram::union(&self.changed, ranges);
                let many = all.len() > self.most;
                self.changed = join(all, self.most);
                // The gaps that joining has added have to be written, too.
                let joined = many.then(|| self.changed.clone());
                self.copy_guest(joined.as_deref().unwrap_or(ranges), progress)
            }
            Source::Guest(ranges) => self.copy_guest(ranges, progress),
            Source::Staged(staging) => {
                if self.base.is_some() {
                    // Not joined: the copy does not have the memory in the gaps.
                    self.changed = ram::union(&self.changed, &staging.ranges());
                }
                staging.pieces().try_for_each(|piece| {
                    progress.check()?;
                    let (at, bytes) = piece?;
                    self.writer.write(at, bytes, progress)?;
                    progress.done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    Ok(())
                })
            }
        };
        self.writer.again();
        written.map_err(|e| write_failed(&self.path, self.size, e))
    }

    fn finish(
        self: Box<Self>,
        mut config: Config,
        state: MachineState,
        progress: &Progress,
    ) -> Result<Finished, SaveError> {
        let Self { mut target, path: memory, writer, size, base, disks, changed, .. } = *self;
        let directory = target.path.canonicalize();
        let directory = directory.map_err(|source| failed("find", &target.path, source))?;
        config.base = base.as_ref().map(|base| Base {
            path: seen_from(&directory, base.path()),
            id: base.id,
            state: Hex(base.state),
        });
        if let Some(disks) = &disks {
            disks.record(&mut config)?;
        }
        let id = config.id;
        let sums = writer.finish(id.into()).map_err(|e| write_failed(&memory, size, e))?;
        let (path, file) = target.create(NEW_STATE)?;
        let mut to = BufWriter::new(Summed { to: &file, sum: crc32fast::Hasher::new() });
        let content = State { config, sections: state.into(), changed, sums: sums.blocks };
        content
            .write(&mut to)
            .and_then(|()| to.flush())
            .map_err(|source| failed("write", &path, source))?;
        let sum = to.get_ref().sum.clone().finalize();
        drop(to);
        file.sync_all().map_err(|source| failed("sync", &path, source))?;
        // The names of the new files have to be durable before the rename that replaces the old
        // state.
        target.sync()?;
        read_back(&path, sum, &memory).map_err(|why| SaveError::DryRun(Box::new(why)))?;
        // From here on the save counts, and cannot be cancelled.
        progress.commit().map_err(|_| SaveError::Cancelled)?;
        target.rename(NEW_STATE, STATE)?;
        target.done = true;
        target.rename(NEW_MEMORY, MEMORY)?;
        target.sync()?;
        match disks {
            Some(disks) => disks.keep(),
            None => disks::remove_others(&target.path, None),
        }
        let mut chain = vec![directory];
        chain.extend(base.map(|base| base.chain).unwrap_or_default());
        Ok(Finished::Over(Some(Saved { chain, id, state: sum, pages: sums.pages })))
    }
}

/// Check that the state in the file `path`, whose CRC-32 is `sum`, can be restored with `memory`.
fn read_back(path: &Path, sum: u32, memory: &Path) -> Result<(), DryRunError> {
    let bytes = fs::read(path).map_err(DryRunError::Io)?;
    if crc32fast::hash(&bytes) != sum {
        return Err(DryRunError::Changed);
    }
    let State { config, sections, .. } = State::read(&*bytes)?;
    let file = File::open(memory).map_err(DryRunError::Io)?;
    memory_file::belongs(&file, config.id.into(), config.machine.memory.size)
        .map_err(DryRunError::Memory)?;
    dry_run(&config, sections).map(drop)
}

/// `ranges`, split into parts of at most [`PIECE`] bytes.
pub fn pieces(ranges: &[Range<u64>]) -> impl Iterator<Item = Range<u64>> {
    ranges.iter().flat_map(|range| {
        let ends = |at: u64| at..range.end.min(at.saturating_add(PIECE));
        range.clone().step_by(PIECE as usize).map(ends)
    })
}

/// At most `most` ranges that contain all of `ranges`.
fn join(mut ranges: Vec<Range<u64>>, most: usize) -> Vec<Range<u64>> {
    let mut gap = ram::PAGE_SIZE;
    while ranges.len() > most {
        ranges.dedup_by(|next, before| {
            let close = next.start - before.end <= gap;
            if close {
                before.end = next.end;
            }
            close
        });
        gap *= 2;
    }
    ranges
}

/// The relative path to `to` from the directory `from`; both are absolute.
fn seen_from(from: &Path, to: &Path) -> PathBuf {
    let (mut from, mut to) = (from.components().peekable(), to.components().peekable());
    while from.peek().is_some() && from.peek() == to.peek() {
        from.next();
        to.next();
    }
    from.map(|_| Component::ParentDir).chain(to).collect()
}

/// Computes the CRC-32 of what is written.
struct Summed<W> {
    to: W,
    sum: crc32fast::Hasher,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let length = self.to.write(buf)?;
        self.sum.update(buf.get(..length).ok_or(io::ErrorKind::InvalidData)?);
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn write_failed(path: &Path, size: u64, source: io::Error) -> SaveError {
    match source.kind() {
        io::ErrorKind::Interrupted => SaveError::Cancelled,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            SaveError::Full { path: path.into(), needed: size >> 20, source }
        }
        _ => failed("write", path, source),
    }
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> SaveError {
    SaveError::File { what, path: path.into(), source }
}
